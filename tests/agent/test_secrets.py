"""Secrets are in the job's environment and nowhere else."""

from __future__ import annotations

from pathlib import Path

from tests.support.real_agents import RealAgent

SECRET = "s3cr3t-value-of-a-token"


def test_environment_is_in_no_process_list_and_no_file(agent: RealAgent) -> None:
    """Not in any command line while the job runs, nor in any file that the agent leaves."""
    agent.run("echo ready; exec sleep 600", env={"TOKEN": SECRET})
    agent.wait_for_output(b"ready\n")
    assert not _command_lines_with(SECRET)
    agent.stop(0)
    agent.wait()
    assert not _files_with(agent.directory, SECRET)
    assert SECRET not in str(agent.state())


def test_errors_do_not_repeat_them(agent: RealAgent) -> None:
    """A job that cannot start, and a body that is no JSON, are reported without their contents."""
    agent.run(argv=["/no/such"], env={"TOKEN": SECRET})
    assert SECRET not in str(agent.wait())
    response = agent.request("PUT", "/v1/jobs/2", {"env": {"TOKEN": SECRET}})
    assert SECRET.encode() not in response.data  # type: ignore[attr-defined]  # see `RealAgent.request`
    assert not _files_with(agent.directory, SECRET)


def _command_lines_with(text: str) -> list[str]:
    found = []
    for process in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            line = process.read_bytes()
        except OSError:
            continue
        if text.encode() in line:
            found.append(str(process))
    return found


def _files_with(directory: Path, text: str) -> list[Path]:
    return [path for path in directory.rglob("*") if path.is_file() and text.encode() in path.read_bytes()]
