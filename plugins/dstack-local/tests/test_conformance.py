"""The conformance suite for backends, on this computer."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from uuid import UUID

import pytest
from dstack_local._processes import processes_of

from dstack_core.testing import Account, BackendSuite, Server, Truth


class Computer(Account):
    """This computer, which can tell what exists on it: folders, and processes with an instance's mark."""

    def truth(self) -> Truth:
        """An instance is there while it has a folder; what has a process and no folder any more was left over."""
        servers = [*_recorded(self.root, "*/instance.json"), *_recorded(self.root, ".ended/*.json")]
        ended = [server.id for server in servers if not server.billed]
        return Truth(servers, [f"process {pid} of {name}" for name in ended for pid in processes_of(name)])

    @property
    def root(self) -> Path:
        """Where its instances are."""
        return Path(self.values["home"]) / "local"

    def config(self) -> dict[str, str]:
        """Nothing to configure."""
        return {}


def _recorded(root: Path, pattern: str) -> Iterator[Server]:
    """One for each record; that of an ended instance moves away, and its folder goes."""
    for file in root.glob(pattern):
        name = file.parent.name if file.name == "instance.json" else file.stem
        folder = (root / name / "instance.json").exists()
        if file.name == "instance.json" or not folder:
            values = json.loads(file.read_text())
            yield Server(name, name, "local", None, UUID(values["intent"]), UUID(values["owner"]), billed=folder)


class TestLocal(BackendSuite):
    """Every case that needs no cloud which fails by order."""

    backend = "local"

    @pytest.fixture
    def cloud(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Computer:
        """A home of its own."""
        monkeypatch.setenv("DSTACK_HOME", str(tmp_path / "home"))
        return Computer({"home": str(tmp_path / "home")})
