"""The conformance suite, by the unmodified SDK."""

from __future__ import annotations

import pytest

from dstack_core.testing import BackendSuite
from tests.support.gcp import Gcp


class TestConformance(BackendSuite):
    """Every case, none set aside."""

    backend = "gcp"

    @pytest.fixture
    def cloud(self, gcp: Gcp) -> Gcp:
        """Google Cloud, with every ability."""
        return gcp
