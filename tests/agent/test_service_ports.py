"""Where a service's process listens: its own port, another one, or none to be had."""

from __future__ import annotations

import socket

import pytest

from tests.support.real_agents import RealAgent, StartAgent

SAY = "echo $PORT; sleep 600"


@pytest.fixture
def port() -> int:
    """A port that was free a moment ago."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        return int(free.getsockname()[1])


def told(agent: RealAgent) -> tuple[int, dict[str, int]]:
    """What the job sees in PORT, and what the agent says of its ports."""
    agent.wait("running")
    agent.wait_for_output(b"\n")
    return int(agent.log()[0]), agent.state()["ports"]


def test_a_free_port_of_the_machine(agent: RealAgent, port: int) -> None:
    """Processes that may share the machine get a port of their own, below those of outgoing connections."""
    agent.run(SAY, ports=[port], service_port=port)
    given, ports = told(agent)
    assert ports == {str(port): given}
    assert 20000 <= given < 30000


def test_two_agents_give_two_ports(start_agent: StartAgent, port: int) -> None:
    """Of one computer."""
    given = []
    for agent in (start_agent(), start_agent()):
        agent.run(SAY, ports=[port], service_port=port)
        given.append(told(agent)[0])
    assert len(set(given)) == 2


def test_the_services_own_port_if_it_may_be_kept(agent: RealAgent, port: int) -> None:
    """And if it is free."""
    agent.run(SAY, ports=[port], service_port=port, keep_port=True)
    assert told(agent) == (port, {str(port): port})


def test_another_one_where_it_is_taken(agent: RealAgent) -> None:
    """Whoever listens on it, on whichever address."""
    with socket.create_server(("0.0.0.0", 0)) as taken:
        port = taken.getsockname()[1]
        agent.run(SAY, ports=[port], service_port=port, keep_port=True)
        given, ports = told(agent)
    assert given != port
    assert ports == {str(port): given}


def test_a_port_that_is_being_given_up_is_waited_for(agent: RealAgent) -> None:
    """The process of the replica before may just be ending."""
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        agent.run(SAY, ports=[port], service_port=port, keep_port=True)
        assert agent.state()["status"] == "preparing"
    assert told(agent) == (port, {str(port): port})


def test_the_users_own_choice_is_left_to_him(agent: RealAgent, port: int) -> None:
    """PORT as he set it; traffic goes to the port that he declared."""
    agent.run(SAY, ports=[port], service_port=port, env={"PORT": "1234"})
    assert told(agent) == (1234, {str(port): port})


def test_the_users_own_choice_that_is_taken(agent: RealAgent) -> None:
    """It fails before it starts, with the port and the cure."""
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        agent.run(SAY, ports=[port], service_port=port, env={"PORT": str(port)})
        state = agent.wait()
    assert (state["reason"], state["exit_code"]) == ("port_failed", None)
    assert f"Port {port} is taken" in state["message"]
    assert "Remove PORT from `env`" in state["message"]


def test_what_is_no_service_is_told_nothing(start_agent: StartAgent) -> None:
    """The ports of a task are its own business."""
    agent = start_agent(env={"PORT": "77"})
    agent.run(SAY, ports=[8000])
    assert told(agent) == (77, {"8000": 8000})
