"""The conformance suite, over HTTP to a cloud that knows Lambda's document."""

from __future__ import annotations

import pytest

from dstack_core.testing import BackendSuite
from tests.support.lambda_cloud import LambdaCloud


class TestConformance(BackendSuite):
    """Every case, none set aside."""

    backend = "lambda"

    @pytest.fixture
    def cloud(self, lambda_cloud: LambdaCloud) -> LambdaCloud:
        """Lambda's cloud, with every ability."""
        return lambda_cloud
