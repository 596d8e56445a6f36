"""Google Cloud on this computer: what the unmodified SDK speaks to in tests.

The wire is made of Google's own discovery documents: requests and answers are checked against them. What goes beyond a
single field, and everything behind it, is done here: operations, names, quotas, capacity, pages, prices, permissions,
and whatever can go wrong. README.md says what is left out.
"""

from __future__ import annotations

from tests.support.gcp._cloud import Gcp

__all__ = ["Gcp"]
