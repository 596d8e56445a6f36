"""`python -m dstack_azure SUBSCRIPTION` prints the least role that this backend needs."""

from __future__ import annotations

import sys

from dstack_azure._calls import ANY_SUBSCRIPTION, role_text

if __name__ == "__main__":
    print(role_text(sys.argv[1] if len(sys.argv) > 1 else ANY_SUBSCRIPTION))  # noqa: T201  # what a person asked for
