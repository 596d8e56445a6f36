"""The suite on each mutant, for a pytest of its own: one class each, and two for backends without a fault."""

from __future__ import annotations

from collections.abc import Iterator
from importlib.metadata import EntryPoint

import pytest

from dstack_core.testing import BackendSuite, NimbusServer
from tests.mutants.backends import MUTANTS, Mutant


class Mutated(BackendSuite):
    """A backend for Nimbus, wherever it is."""

    backend = "nimbus"
    entry: str

    @classmethod
    def entry_point(cls) -> EntryPoint:
        """Of the mutant."""
        return EntryPoint("nimbus", cls.entry, "dstack.backends")

    @pytest.fixture
    def cloud(self) -> Iterator[NimbusServer]:
        """Nimbus, with every ability."""
        with NimbusServer() as server:
            yield server


SOUND = [Mutant(name, "", f"tests.mutants.plugins:{name}") for name in ("Reference", "Connects")]

for _mutant in [*SOUND, *MUTANTS]:
    globals()[f"Test{_mutant.name}"] = type(f"Test{_mutant.name}", (Mutated,), {"entry": _mutant.entry})
