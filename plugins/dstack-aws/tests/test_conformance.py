"""The conformance suite, by the unmodified SDK."""

from __future__ import annotations

import pytest

from dstack_core.testing import BackendSuite
from tests.support.ec2 import Ec2


class TestConformance(BackendSuite):
    """Every case, none set aside."""

    backend = "aws"

    @pytest.fixture
    def cloud(self, ec2: Ec2) -> Ec2:
        """EC2, with every ability."""
        return ec2
