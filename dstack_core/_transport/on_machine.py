"""What the server has a machine do over SSH before there is an agent on it. Each of it may be repeated.

1. `greet`: begins the machine's set-up, says how far it is, and the host key that it has made for itself by now.
2. `show_own_key`: from now on it proves itself with that one. The first was in its user-data, which others can read.
3. `start_agent`: the agent's program is sent, looked at there, put in its place, and started as a service.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import Self

from dstack_core._models.instances import Endpoint
from dstack_core._transport.agent_protocol import AgentUnreachable, Transport
from dstack_core._transport.cloud_init import AGENT, ALIVE, BEGIN_SETUP, FOLDER, SETUP
from dstack_core.errors import DstackError

_OWN_KEY = "/etc/ssh/dstack_own_key"
_SHOWN_KEY = "/etc/ssh/ssh_host_ed25519_key"

# The key is made while the set-up goes on: each is waited for once.
_GREET = f"""\
mkdir -p /run/dstack; cut -d. -f1 /proc/uptime >{ALIVE}
[ -s {SETUP} ] || [ ! -x {BEGIN_SETUP} ] || setsid -f {BEGIN_SETUP} </dev/null >/dev/null 2>&1
if [ ! -s {_OWN_KEY} ]; then
  umask 077; rm -f {_OWN_KEY}.new*
  ssh-keygen -q -t ed25519 -N '' -C '' -f {_OWN_KEY}.new && mv {_OWN_KEY}.new.pub {_OWN_KEY}.pub &&
    mv {_OWN_KEY}.new {_OWN_KEY}
fi
left=80; until [ -s {SETUP} ] || [ $((left -= 1)) -lt 0 ]; do sleep 0.025; done
[ ! -s {SETUP} ] || cat {_OWN_KEY}.pub {SETUP}
"""
_SHOW_OWN_KEY = f"""\
set -e; umask 077
for end in .pub ''; do cp {_OWN_KEY}$end {_SHOWN_KEY}.new$end; mv {_SHOWN_KEY}.new$end {_SHOWN_KEY}$end; done
systemctl reload ssh 2>/dev/null || systemctl reload sshd
"""


class MachineBroken(DstackError):
    """The machine answers, and will never run a job; says why."""


@dataclass(frozen=True, slots=True)
class Greeting:
    """How far a machine is.

    Attributes:
        ready: its set-up is over.
        own_key: the host key that it made for itself, if its set-up is over.
    """

    ready: bool
    own_key: str = ""

    @classmethod
    def parse(cls, output: str) -> Self:
        """From what the machine said."""
        key, _, state = output.partition("\n")
        if not state.startswith(("done", "failed")):
            return cls(ready=False)
        if state.startswith("failed"):
            raise MachineBroken(f"the set-up of the machine {state.strip()}")
        return cls(ready=True, own_key=" ".join(key.split()[:2]))


async def greet(transport: Transport, way: Endpoint) -> Greeting:
    """Says to the machine that somebody cares for it, and asks how far it is.

    Raises:
        AgentUnreachable: nobody answers (yet), or somebody else.
        MachineBroken: its set-up failed.
    """
    said = await transport.run(way, _GREET)
    return Greeting.parse(said.output.decode(errors="replace"))


async def show_own_key(transport: Transport, way: Endpoint) -> None:
    """Has the machine prove itself with its own key from the next connection on.

    Raises:
        AgentUnreachable: nobody answers, or it could not be done.
    """
    said = await transport.run(way, _SHOW_OWN_KEY)
    if said.code != 0:
        raise AgentUnreachable(f"The machine's SSH server does not take its own key: {_words(said.errors)}")


class Program:
    """The agent's program, as it is sent.

    Args:
        archive: the file.
    """

    def __init__(self, archive: Path) -> None:
        self._archive = archive
        self._known: tuple[bytes, str] | None = None

    def read(self) -> tuple[bytes, str]:
        """Its bytes, and their SHA-256. The file is read once: it never changes."""
        if self._known is None:
            content = self._archive.read_bytes()
            self._known = (content, hashlib.sha256(content).hexdigest())
        return self._known


async def start_agent(transport: Transport, way: Endpoint, program: Program) -> None:
    """Sends the agent's program, and starts it. Nothing is started that is not what was sent.

    One command does it all, as each costs a few ways to the machine and back. What is there already is not replaced:
    it may run.

    Raises:
        AgentUnreachable: nobody answers, or the connection broke.
        MachineBroken: the program cannot be kept or started there.
    """
    content, digest = program.read()
    said = await transport.run(way, _keep_and_start(digest), content)
    if said.code != 0:
        what = "started" if said.code == _NOT_STARTED else "kept"
        raise MachineBroken(f"the agent's program cannot be {what} on the machine: {_words(said.errors)}")


_NOT_STARTED = 70


def _keep_and_start(digest: str) -> str:
    return f"""\
set -e; umask 077; mkdir -p {FOLDER}
if echo '{digest}  {AGENT}' | sha256sum -c --status 2>/dev/null; then cat >/dev/null
else
  cat >{AGENT}.new
  echo '{digest}  {AGENT}.new' | sha256sum -c --status || {{ echo 'it arrived damaged' >&2; rm {AGENT}.new; exit 1; }}
  mv {AGENT}.new {AGENT}
fi
systemctl start dstack-agent || exit {_NOT_STARTED}
"""


def _words(errors: bytes) -> str:
    return " ".join(errors.decode(errors="replace").split()) or "it does not say why"
