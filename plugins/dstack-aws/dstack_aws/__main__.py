"""`python -m dstack_aws` prints the least IAM policy that this backend needs."""

from __future__ import annotations

from dstack_aws._calls import policy_text

if __name__ == "__main__":
    print(policy_text())  # noqa: T201  # what a person asked for
