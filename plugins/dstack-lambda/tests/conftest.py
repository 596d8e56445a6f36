"""Fixtures of this room: Lambda's cloud on this computer, and a home folder for what processes share."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest
from dstack_lambda import LambdaConfig
from dstack_lambda._backend import LambdaBackend

from tests.support.homes import client, home
from tests.support.lambda_cloud import LambdaCloud
from tests.support.machines import fleet

__all__ = ["backend_of", "client", "fleet", "home", "kept", "lambda_cloud"]


@pytest.fixture(autouse=True)
def kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Nothing of this computer's own configuration is read, and nothing is kept."""
    monkeypatch.setenv("DSTACK_HOME", str(tmp_path / "dstack"))
    return tmp_path


@pytest.fixture
def lambda_cloud() -> Iterator[LambdaCloud]:
    """Lambda's cloud, of which this test alone knows; all that was said was as its document wants it."""
    with LambdaCloud() as cloud:
        yield cloud
    assert cloud.wrong == []


@pytest.fixture
def backend_of() -> Iterator[Callable[..., LambdaBackend]]:
    """Makes a backend for a cloud, as another process would have it; `more` is for its configuration."""
    with ExitStack() as stack:

        def made(cloud: LambdaCloud, **more: object) -> LambdaBackend:
            backend = LambdaBackend(LambdaConfig.model_validate({"type": "lambda", **cloud.config(), **more}))
            stack.callback(backend.close)
            return backend

        yield made
