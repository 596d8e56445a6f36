"""A cloud whose servers are real machines, and a home whose server uses it.

Fixtures, to be imported into a `conftest.py` together with `fleet`, `home` and `client`:

- `cloud`: a Nimbus with the fleet's machines. When the test is over nothing of it may still cost money.
- `cloud_home`: `home`, with this cloud configured.
"""

from __future__ import annotations

import json
import subprocess
from collections.abc import Iterator
from typing import Any
from urllib.request import urlopen

import pytest

from dstack.api import Client, Profile, RunStatus, Task
from dstack_core.testing import Cloud, Fleet, Machine, NimbusServer, Truthful, wait_until
from tests.support.homes import ROOT, Home, ended

__all__ = [
    "Prepared",
    "cloud",
    "cloud_home",
    "configure",
    "fail_at",
    "machine_of",
    "nothing_billed",
    "served_through_attach",
    "start_with_grace",
]

LONG = 240.0
PLUGIN = ROOT / "tests" / "support" / "nimbus"
# A little of the machine's own system, for a job with an image where there is no registry.
_IMAGE = """
systemctl start docker
for file in /bin/sh /bin/cat /bin/hostname /bin/sleep; do echo $file; ldd $file | grep -o '/[^ )]*'; done |
  sort -u | tar -chf - -T - | docker import - small:1
"""


class Prepared:
    """A fleet whose machines' image is somewhat different.

    Args:
        fleet: where they come from.
        before: what was done to the image: a shell script.
    """

    def __init__(self, fleet: Fleet, before: str = _IMAGE) -> None:
        self._fleet = fleet
        self._before = before

    def boot(self, user_data: str, **more: Any) -> Machine:
        """Boots one, on which that is done before its set-up begins."""
        first, _, text = user_data.partition("\n")
        config = json.loads(text)
        for file in config["write_files"]:
            if file["path"].endswith("/setup"):
                file["content"] = file["content"].replace("units=/etc", f"{self._before}\nunits=/etc")
        return self._fleet.boot(f"{first}\n{json.dumps(config)}", **more)


@pytest.fixture
def cloud(fleet: Fleet) -> Iterator[NimbusServer]:
    """A Nimbus whose servers are machines without a container engine."""
    with NimbusServer(machines=fleet) as cloud:
        yield cloud


@pytest.fixture
def cloud_home(home: Home, cloud: NimbusServer, monkeypatch: pytest.MonkeyPatch) -> Home:
    """A home whose server has this cloud."""
    configure(home, cloud, monkeypatch)
    return home


def configure(home: Home, cloud: Cloud, monkeypatch: pytest.MonkeyPatch, backend_type: str = "nimbus") -> None:
    """Has the home's server use this cloud, also if a client of this process starts it."""
    backend = {"type": backend_type, **cloud.config()}
    (home.path / "server").mkdir(parents=True, mode=0o700)
    (home.path / "server" / "config.yml").write_text(
        json.dumps({"projects": [{"name": "main", "backends": [backend]}]})
    )
    home.env["PYTHONPATH"] = f"{ROOT}:{PLUGIN}"
    monkeypatch.setenv("PYTHONPATH", home.env["PYTHONPATH"])
    monkeypatch.setenv("DSTACK_HOME", str(home.path))
    monkeypatch.setenv("HOME", str(home.path.parent))


def machine_of(fleet: Fleet, cloud: Truthful) -> Machine:
    """The one machine of the cloud that is on, once it is."""
    wait_until(lambda: len(_on(fleet, cloud)) == 1, timeout=LONG, what="the machine")
    return _on(fleet, cloud)[0]


def _on(fleet: Fleet, cloud: Truthful) -> list[Machine]:
    ids = {server.id for server in cloud.truth().servers}
    return [machine for machine in fleet.machines if machine.name in ids and machine.state == "running"]


def served_through_attach(client: Client, backend: str, machine: str) -> None:
    """Runs a web server on a machine of this type, fetches a page of it from here through `attach`, and stops it."""
    task = Task(commands=["echo hello >page; exec python3 -m http.server 8000"], ports=["*:8000"])
    profile = Profile(name="one", instance_types=[machine], spot_policy="on-demand")
    run = client.runs.submit(task, backends=[backend], profile=profile)
    assert run.attach(), b"".join(run.logs(diagnose=True)).decode()

    def fetched() -> bool:
        assert run.ports is not None
        try:
            with urlopen(f"http://127.0.0.1:{run.ports[8000]}/page", timeout=30) as page:
                return bool(page.read() == b"hello\n")
        except OSError:
            return False

    wait_until(fetched, timeout=LONG, what="the page")
    run.stop()
    assert run.ports is None
    assert ended(run, LONG).status is RunStatus.TERMINATED


def nothing_billed(cloud: Truthful) -> None:
    """Waits until the cloud says that nothing costs money any more."""

    def over() -> bool:
        truth = cloud.truth()
        return not truth.leftovers and not any(server.billed for server in truth.servers)

    wait_until(over, timeout=LONG, what="the end of all that costs money")


def fail_at(home: Home, step: str, when: str) -> subprocess.Popen[bytes]:
    """Starts the home's server, which kills itself with SIGKILL before or after it has done this for the first time."""
    return _started(home, _KILLED, step, when)


def _started(home: Home, code: str, *args: str) -> subprocess.Popen[bytes]:
    server = home.start(code, *args, stdout=None, stderr=None)
    wait_until((home.path / "server.sock").exists, timeout=LONG, what="the server")
    return server


_KILLED = """
import os, runpy, sys
step, when = sys.argv[1:]
sys.argv = ["dstack_core._server", "--local"]
from dstack_core._backends import BackendHub
from dstack_core._engine import booting, instances, session
place, name = {
    "create": (BackendHub, "create_instance"),
    "greet": (booting, "greet"),
    "keep": (instances.InstanceHandler, "_note_host_key"),
    "show": (booting, "show_own_key"),
    "start": (booting, "start_agent"),
    "give": (session.JobSession, "put"),
}[step]
done = getattr(place, name)
def dies():
    os.kill(os.getpid(), 9)
if step == "keep":
    def wrapped(self, *args):
        result = done(self, *args)
        dies()
        return result
else:
    async def wrapped(*args):
        if when == "before":
            dies()
        result = await done(*args)
        if step != "greet" or result.ready:
            dies()
        return result
setattr(place, name, wrapped)
from dstack_core._server.__main__ import main
sys.exit(main())
"""


def start_with_grace(home: Home, seconds: float) -> subprocess.Popen[bytes]:
    """Starts the home's server, whose machines wait for it no longer than so; people cannot have it so short."""
    home.env["DSTACK_ORPHAN_GRACE_SECONDS"] = f"{seconds:g}"
    return _started(home, _IMPATIENT)


_IMPATIENT = """
import sys
from dstack_core._server import app
from dstack_core._server.__main__ import main
app.SHORTEST_GRACE = 1.0
sys.exit(main(["--local"]))
"""
