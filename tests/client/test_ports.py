"""Local ports: held, looked at, found, and who has them."""

from __future__ import annotations

import os
import socket
import subprocess
import sys

import pytest

from dstack.api import DevEnvironment, PortUsedError, Service, Task
from dstack_core._client.ports import PortReservation, holder_of, listen, listen_from, wanted_by


@pytest.fixture
def port() -> int:
    """A local port that was free a moment ago."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        return int(free.getsockname()[1])


def is_free(port: int) -> bool:
    """Whether a program can listen on a local port now."""
    try:
        listen(port).close()
    except PortUsedError:
        return False
    return True


def test_what_configurations_want() -> None:
    """The ports of a task and a dev environment, and the one port of a service."""
    task = Task(commands=["true"], ports=["8080", "80:8000", "*:90"])
    assert wanted_by(task) == [(8080, 8080), (8000, 80), (90, None)]
    assert wanted_by(DevEnvironment(ports=["81"])) == [(81, 81)]
    assert wanted_by(Service(commands=["true"], port=8080)) == [(8080, 80)]
    assert wanted_by(Task(commands=["true"])) == []


def test_a_reservation_holds_its_ports(port: int) -> None:
    """Nobody else gets them until they are released; releasing twice does nothing."""
    reserved = PortReservation([(80, port)])
    assert reserved.ports == {80: port}
    assert not is_free(port)
    reserved.release()
    reserved.release()
    assert is_free(port)


def test_a_port_that_is_taken_names_its_holder(port: int) -> None:
    """The port, who has it, and how to choose another one."""
    with listen(port), pytest.raises(PortUsedError) as refusal:
        PortReservation([(80, port)])
    assert refusal.value.port == port
    assert f"(pid {os.getpid()})" in str(refusal.value.holder)
    assert "ports=['*:80']" in str(refusal.value)


def test_a_port_that_is_taken_on_all_addresses(port: int) -> None:
    """A program that listens on 0.0.0.0 has the port, too."""
    with socket.create_server(("0.0.0.0", port)), pytest.raises(PortUsedError):
        listen(port)


def test_a_refused_reservation_holds_nothing(port: int) -> None:
    """If one of several ports is taken, the others are free again."""
    with listen_from(port + 1) as taken, pytest.raises(PortUsedError):
        PortReservation([(80, port), (81, taken.getsockname()[1])])
    assert is_free(port)


def test_any_port_is_the_next_free_one(port: int) -> None:
    """Starts at the job's own port."""
    with listen_from(port) as first, listen_from(port) as second:
        assert port <= first.getsockname()[1] < second.getsockname()[1]


def test_fixed_ports_come_before_any_ports(port: int) -> None:
    """A free choice takes no port that was asked for."""
    reserved = PortReservation([(port, None), (80, port)])
    assert reserved.ports[80] == port
    assert reserved.ports[port] > port
    reserved.release()


def test_a_port_that_the_job_itself_takes_is_not_held(port: int) -> None:
    """A process here listens itself on a port that is mapped to itself; other ports are held for it."""
    with listen_from(port + 1) as other:
        held = int(other.getsockname()[1])
    reserved = PortReservation([(port, port), (80, held)], job_listens_here=True)
    assert is_free(port)
    assert not is_free(held)
    reserved.release()
    with listen(port), pytest.raises(PortUsedError):
        PortReservation([(port, port)], job_listens_here=True)


def test_connections_that_ended_do_not_count(port: int) -> None:
    """A port whose last connections are being forgotten by the system is free."""
    with listen(port) as listener, socket.create_connection(("127.0.0.1", port)):
        listener.accept()[0].close()
    assert is_free(port)


def test_the_holder_is_another_process() -> None:
    """Its name and process id."""
    code = "import socket; s = socket.create_server(('127.0.0.1', 0)); print(s.getsockname()[1], flush=True); input()"
    with subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as holder:
        assert holder.stdout is not None
        port = int(holder.stdout.readline())
        assert str(holder_of(port)).endswith(f"(pid {holder.pid})")
        holder.communicate(b"\n")
    assert holder_of(port) is None


def test_a_forgotten_reservation_gives_its_ports_back(port: int) -> None:
    """Without the object there is no claim."""
    PortReservation([(80, port)])
    assert is_free(port)
