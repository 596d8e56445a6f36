"""Where machines come from, what is left of them, and what is said where there can be none."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from dstack_core.testing import Fleet, FleetUnavailable, wait_until
from dstack_core.testing.fleet import _fleet, _image, _reaper
from dstack_core.testing.fleet._docker import Engine, EngineError

OWNER = """
import sys, time
from dstack_core.testing import Fleet
fleet = Fleet.open()
machine = fleet.boot(on_shutdown="stop")
other = fleet.boot(on_shutdown="stop")
while machine.state == "pending" or other.state == "pending":
    time.sleep(0.05)
machine.cut()
print(fleet._id, fleet._lock_file, machine.address, flush=True)
time.sleep(600)
"""


def of(fleet: Fleet, label: str) -> list[str]:
    """Ids of the containers with that label."""
    return [container["Id"] for container in fleet._engine.containers(label)]


def rules() -> str:
    """What this computer's packet filter drops before it looks at it."""
    return subprocess.run(["iptables", "-w", "-t", "raw", "-S"], capture_output=True, text=True, check=True).stdout


@pytest.mark.machines
def test_a_fleet_leaves_nothing(fleet: Fleet) -> None:
    """When a fleet is closed its machines are gone, whatever state they were in, and so is its lock."""
    with Fleet.open() as other:
        label = f"{Fleet.LABEL}={other._id}"
        machines = [other.boot() for _ in range(3)]
        wait_until(lambda: machines[0].state == "running")
        machines[0].cut()
        machines[1].stop(grace=0)
        assert len(of(fleet, label)) == 3
    assert of(fleet, label) == []
    assert not other._lock_file.exists()
    assert [machine.state for machine in machines] == ["terminated"] * 3
    assert machines[0].address not in rules()
    other.close()
    with pytest.raises(ValueError, match="This fleet is closed"):
        other.boot()
    assert of(fleet, label) == []


@pytest.mark.machines
@pytest.mark.root
def test_a_killed_process_leaves_nothing(fleet: Fleet) -> None:
    """When a process is killed its machines end by themselves, and what was cut is mended."""
    process = subprocess.Popen([sys.executable, "-c", OWNER], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    number, lock, address = process.stdout.readline().split()
    label = f"{Fleet.LABEL}={number}"
    assert len(of(fleet, label)) == 2
    assert address in rules()
    process.send_signal(signal.SIGKILL)
    process.wait()
    process.stdout.close()
    wait_until(lambda: not of(fleet, label), what="the machines to be gone")
    wait_until(lambda: not Path(lock).exists(), what="the reaper to have ended")
    assert address not in rules()


@pytest.mark.machines
def test_the_next_fleet_ends_what_a_dead_reaper_left(fleet: Fleet, tmp_path: Path) -> None:
    """Machines of a process that is gone, as is its reaper, end when the next fleet is opened; others do not."""
    alive = fleet.boot()
    (tmp_path / "file").touch()
    dead, foreign = (_reaper.labels(fleet, tmp_path / "gone") for fleet in ("dead", "foreign"))
    hidden = _reaper.labels("hidden", tmp_path / "file" / "lock")
    spec = {"Image": _image.image(fleet._engine), "Cmd": ["/bin/sleep", "600"]}
    left = fleet._engine.create("", {**spec, "Labels": dead})
    others = [
        fleet._engine.create("", {**spec, "Labels": {**foreign, _reaper.HOST: "another-host"}}),
        fleet._engine.create("", {**spec, "Labels": hidden}),
    ]
    try:
        _reaper.reap_others(fleet._engine)
        assert left not in of(fleet, Fleet.LABEL)
        assert set(others) <= set(of(fleet, Fleet.LABEL))
        assert alive in fleet.machines
    finally:
        for container in (left, *others):
            fleet._engine.remove(container)
        alive.terminate()


@pytest.mark.machines
@pytest.mark.root
def test_an_address_where_somebody_listens_is_left_alone(fleet: Fleet, monkeypatch: pytest.MonkeyPatch) -> None:
    """Addresses that a program or another machine has are passed over; where all are taken, it says what to do."""
    with socket.create_server(("127.0.1.1", 22)):
        assert not _fleet._is_free("127.0.1.1")
    first = fleet.boot()
    candidates = [first.address, "127.0.1.255"]
    monkeypatch.setattr(_fleet, "_addresses", lambda: iter(candidates))
    second = fleet.boot()
    assert second.address == "127.0.1.255"
    with pytest.raises(FleetUnavailable, match="ListenAddress"):
        fleet.boot()
    first.terminate()
    second.terminate()


@pytest.mark.machines
def test_a_machine_that_cannot_be_switched_on_ends_and_says_why(fleet: Fleet, monkeypatch: pytest.MonkeyPatch) -> None:
    """What the container engine refuses stands on the console of a machine that is terminated."""
    with socket.socket() as taken:
        taken.bind(("127.0.1.254", 22))
        monkeypatch.setattr(_fleet, "_addresses", lambda: iter(["127.0.1.254"]))
        taken.listen()
        machine = fleet.boot()
        wait_until(lambda: machine.state == "terminated")
    assert b"address already in use" in machine.console()
    assert machine not in fleet.machines


@pytest.mark.machines
def test_a_broken_file_in_the_cache_is_not_kept(fleet: Fleet, tmp_path: Path) -> None:
    """An image file that the engine refuses is removed, so that the next one who needs it has a new one."""
    broken = tmp_path / "machine.tar"
    broken.write_bytes(b"x" * 2048)
    with pytest.raises(EngineError):
        _image._import(fleet._engine, "dstack-machine:broken", broken)
    assert not broken.exists()


@pytest.mark.parametrize(
    "answer",
    [
        b"",
        b"HTTP/1.1 200 OK\r\nContent-Length: 0\r\n\r\n",
        b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n",
        b'HTTP/1.1 500 Internal Server Error\r\nContent-Length: 19\r\n\r\n{"message": "over"}',
    ],
)
def test_an_engine_that_breaks_off_is_an_error_of_its_own(tmp_path: Path, answer: bytes) -> None:
    """Whoever waits for a container gets the same error, however the engine ends."""

    def serve() -> None:
        connection, _ = listener.accept()
        with connection:
            connection.recv(65536)
            connection.sendall(answer)

    path = str(tmp_path / "engine.sock")
    with socket.socket(socket.AF_UNIX) as listener, ThreadPoolExecutor(1) as pool:
        listener.bind(path)
        listener.listen()
        served = pool.submit(serve)
        with pytest.raises(EngineError):
            Engine(path).wait("container")
        served.result(30)


def test_files_nobody_used_for_long_are_removed(tmp_path: Path) -> None:
    """The cache does not keep the images of old recipes for ever."""
    old, new = tmp_path / "old.tar", tmp_path / "new.tar"
    for file in (old, new):
        file.write_bytes(b"")
    os.utime(old, (0, 0))
    _image._prune(tmp_path)
    assert (old.exists(), new.exists()) == (False, True)


def test_an_image_that_is_built_in_vain_leaves_nothing(tmp_path: Path) -> None:
    """A file in the cache is there as a whole, or not at all."""
    with contextlib.suppress(InterruptedError), _image._whole(tmp_path / "machine.tar") as file:
        file.write(b"half")
        raise InterruptedError
    assert list(tmp_path.iterdir()) == []
    with _image._whole(tmp_path / "machine.tar") as file:
        file.write(b"all")
    assert (tmp_path / "machine.tar").read_bytes() == b"all"
    assert len(list(tmp_path.iterdir())) == 1


def test_where_there_can_be_no_machines_it_says_what_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without an engine on this computer there is an error that says so; for tests, a skip or a failure."""
    monkeypatch.setenv("DOCKER_HOST", "tcp://192.0.2.1:2375")
    with pytest.raises(FleetUnavailable, match="only an engine on this computer"):
        Fleet.open()
    monkeypatch.delenv("DSTACK_REQUIRE_MACHINES", raising=False)
    with pytest.raises(pytest.skip.Exception, match="needs real machines: DOCKER_HOST is tcp"):
        Fleet.open_or_skip()
    monkeypatch.setenv("DSTACK_REQUIRE_MACHINES", "1")
    with pytest.raises(pytest.fail.Exception, match="DSTACK_REQUIRE_MACHINES is set, and DOCKER_HOST is tcp"):
        Fleet.open_or_skip()


def test_without_docker_it_says_what_to_install(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Where nothing answers and nothing can be started, the message names the socket and the package."""
    monkeypatch.setenv("DOCKER_HOST", f"unix://{tmp_path}/docker.sock")
    monkeypatch.setattr("shutil.which", lambda *_, **__: None)
    with pytest.raises(FleetUnavailable, match=r"no container engine answers at unix://.*docker\.io"):
        Fleet.open()
