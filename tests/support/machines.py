"""Real machines for the tests of this repository, and the way to them.

Fixtures, to be imported into a `conftest.py` or a test module:

- `fleet` (session): a `Fleet`. Tests that use it are marked `machines`.
- `machine_key` (session): a pair of ssh keys.
"""

from __future__ import annotations

import json
import socket
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from dstack_core.testing import Fleet, Machine

__all__ = ["Key", "answers", "fleet", "machine_key"]


@dataclass(frozen=True)
class Key:
    """A pair of ssh keys.

    Attributes:
        path: of the private one.
        public: the other, as in `authorized_keys`.
    """

    path: Path
    public: str

    def user_data(self, **more: object) -> str:
        """User-data that lets root in with this key, and whatever else is given."""
        config = {"disable_root": False, "users": [{"name": "root", "ssh_authorized_keys": [self.public]}], **more}
        return f"#cloud-config\n{json.dumps(config)}"

    def ssh(self, machine: Machine, *command: str) -> subprocess.CompletedProcess[str]:
        """Runs a command over ssh, as root, whatever the host key is."""
        return subprocess.run(self.argv(machine, *command), capture_output=True, text=True, check=False, timeout=120)

    def argv(self, machine: Machine, *command: str) -> list[str]:
        """The same as a command line."""
        options = {
            "BatchMode": "yes",
            "ConnectTimeout": "10",
            "IdentitiesOnly": "yes",
            "LogLevel": "ERROR",
            "StrictHostKeyChecking": "no",
            "UserKnownHostsFile": "/dev/null",
        }
        flags = [word for key, value in options.items() for word in ("-o", f"{key}={value}")]
        return ["ssh", "-F", "none", "-i", str(self.path), *flags, f"root@{machine.address}", "--", *command]


@pytest.fixture(scope="session")
def fleet() -> Iterator[Fleet]:
    """A fleet for the whole session."""
    with Fleet.open_or_skip() as fleet:
        yield fleet


@pytest.fixture(scope="session")
def machine_key(tmp_path_factory: pytest.TempPathFactory) -> Key:
    """A pair of keys."""
    path = tmp_path_factory.mktemp("keys") / "id_ed25519"
    subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-C", "tests", "-f", str(path)], check=True)
    return Key(path, path.with_suffix(".pub").read_text().strip())


def answers(machine: Machine) -> bool:
    """Whether sshd answers."""
    try:
        with socket.create_connection((machine.address, 22), timeout=2) as connection:
            connection.settimeout(2)
            return connection.recv(4) == b"SSH-"
    except OSError:
        return False
