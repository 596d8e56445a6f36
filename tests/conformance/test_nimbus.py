"""The conformance suite, as an author uses it, on the reference backend for Nimbus."""

from __future__ import annotations

from collections.abc import Iterator
from importlib.metadata import EntryPoint
from typing import ClassVar

import pytest

from dstack_core.testing import BackendSuite, NimbusServer
from dstack_core.testing._suite._creating import CreateCases
from dstack_core.testing._suite._ending import StateCases


class TestWithoutKeys(CreateCases):
    """A backend for a cloud without keys of idempotency: it looks for the intent's tag before it creates.

    It declares that, and the cases that only a key can pass are left out by themselves.
    """

    backend = "nimbus"
    aside: ClassVar[dict[str, str]] = {
        "test_create_after_the_end_makes_no_second_instance": "listings of Nimbus do not show servers that have ended",
    }

    @classmethod
    def entry_point(cls) -> EntryPoint:
        """Beside the package, not in it."""
        return EntryPoint("nimbus", "tests.mutants.plugins:LooksFirst", "dstack.backends")

    @pytest.fixture
    def cloud(self) -> Iterator[NimbusServer]:
        """The same Nimbus, whose keys nobody uses."""
        with NimbusServer() as server:
            yield server


class TestWithConnect(StateCases):
    """A backend whose machines have no address until it is asked to connect."""

    backend = "nimbus"

    @classmethod
    def entry_point(cls) -> EntryPoint:
        """Beside the package, not in it."""
        return EntryPoint("nimbus", "tests.mutants.plugins:Connects", "dstack.backends")

    @pytest.fixture
    def cloud(self) -> Iterator[NimbusServer]:
        """The same Nimbus."""
        with NimbusServer() as server:
            yield server


class TestNimbus(BackendSuite):
    """Every case, none set aside."""

    backend = "nimbus"

    @pytest.fixture
    def cloud(self) -> Iterator[NimbusServer]:
        """Nimbus, with every ability."""
        with NimbusServer() as server:
            yield server
