"""`python -m dstack_gcp` prints the least IAM role that this backend needs."""

from __future__ import annotations

from dstack_gcp._calls import role_text

if __name__ == "__main__":
    print(role_text(), end="")  # noqa: T201  # what a person asked for
