"""Azure on this computer: what the unmodified SDK speaks to in tests. What it is not, is in its README."""

from __future__ import annotations

from tests.support.azure._cloud import Azure

__all__ = ["Azure"]
