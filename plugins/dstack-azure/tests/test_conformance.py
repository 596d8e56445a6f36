"""The conformance suite, by the unmodified SDK."""

from __future__ import annotations

import pytest

from dstack_core.testing import BackendSuite
from tests.support.azure import Azure


class TestConformance(BackendSuite):
    """Every case, none set aside."""

    backend = "azure"

    @pytest.fixture
    def cloud(self, azure: Azure) -> Azure:
        """Azure, with every ability."""
        return azure
