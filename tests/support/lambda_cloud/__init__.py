"""Lambda's cloud on this computer: what `dstack-lambda` speaks to in tests. See the README beside this file."""

from __future__ import annotations

from tests.support.lambda_cloud._cloud import LambdaCloud
from tests.support.lambda_cloud._document import Document

__all__ = ["Document", "LambdaCloud"]
