"""Who logs in where with what: one machine of a run, as OpenSSH is told about it."""

from __future__ import annotations

import json
import shlex
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

from dstack_core.errors import ConfigurationError

KEEP_ALIVE, LOOKS = 5, 3
"""Seconds between two looks whether a silent machine is still there; after so many in vain it is not."""
CONNECT_TIMEOUT = 15
"""Seconds."""
_INSIDE = "/usr/local/lib/dstack/inside sshd"
# They would end a quoted word of OpenSSH's configuration, or mean something in it that differs from place to place.
_UNFIT = '"\\*?[]${}%\n\r\t'


@dataclass(frozen=True, slots=True)
class Login:
    """How one machine is logged in to.

    Attributes:
        name: of the run: what to say to `ssh`.
        alias: under which the machine's key is known. No other machine ever has it.
        host: address of the machine.
        port: of its SSH server.
        user: who to log in as.
        host_key: `ssh-ed25519 AAAA...`: whoever shows another key is somebody else.
        identity: path of the user's private key.
    """

    name: str
    alias: str
    host: str
    port: int
    user: str
    host_key: str
    identity: str

    @classmethod
    def parse(cls, text: str) -> Login:
        """What `text` made.

        Raises:
            ValueError: it is something else.
            TypeError: it is something else.
        """
        return cls(**json.loads(text))

    def text(self) -> str:
        """All of it; holds no secret."""
        return json.dumps(asdict(self))

    def known(self) -> str:
        """The line of a file of known hosts."""
        return f"{self.alias} {self.host_key}\n"

    def options(self, known_hosts: Path) -> Iterator[tuple[str, str]]:
        """Options of OpenSSH. Nothing that lies about on this computer makes another machine a known one."""
        yield "HostName", self.host
        yield "Port", str(self.port)
        yield from self._trust(known_hosts)

    def _trust(self, known_hosts: Path) -> Iterator[tuple[str, str]]:
        yield "User", self.user
        yield "IdentityFile", quoted(self.identity)
        yield "IdentitiesOnly", "yes"
        yield "HostKeyAlias", self.alias
        yield "UserKnownHostsFile", quoted(known_hosts)
        yield "GlobalKnownHostsFile", "/dev/null"
        yield "StrictHostKeyChecking", "yes"
        yield "HostKeyAlgorithms", "ssh-ed25519"
        yield "UpdateHostKeys", "no"
        yield "CheckHostIP", "no"
        yield "PreferredAuthentications", "publickey"
        yield "ControlPath", "none"
        yield "ConnectTimeout", str(CONNECT_TIMEOUT)
        yield "ServerAliveInterval", str(KEEP_ALIVE)
        yield "ServerAliveCountMax", str(LOOKS)

    def entries(self, config: Path, known_hosts: Path) -> str:
        """What stands in a configuration of OpenSSH: the machine itself, and, on it, the place of the job.

        The latter is reached by another SSH server, which is started for each connection where the job is, in a
        container or not, and speaks through the first connection.
        """
        machine = f"{self.name}.machine"
        through = f"ssh -F {shlex.quote(str(config))} {machine} {_INSIDE}"
        inside = [("HostName", self.name), ("ProxyCommand", through), *self._trust(known_hosts)]
        return _entry(machine, self.options(known_hosts)) + _entry(self.name, inside)


def _entry(host: str, options: Iterator[tuple[str, str]] | list[tuple[str, str]]) -> str:
    return "".join([f"Host {host}\n", *(f"    {name} {value}\n" for name, value in options)])


def quoted(path: str | Path) -> str:
    """A path as one word of OpenSSH's configuration.

    Raises:
        ConfigurationError: it cannot be written there.
    """
    if any(character in str(path) for character in _UNFIT):
        raise ConfigurationError(
            f"The path {str(path)!r} has a character that OpenSSH's configuration cannot hold. Use one without it; "
            "DSTACK_HOME says where dstack's own files are."
        )
    return f'"{path}"'
