"""Docker or podman on this computer: which one can be used, and if none, why and what to do."""

from __future__ import annotations

import shutil
import subprocess
import time

_GOOD_FOR, _BAD_FOR = 30.0, 3.0


class Containers:
    """Asks the container engines, and remembers the answer for a while."""

    def __init__(self) -> None:
        self._problem: str | None = None
        self._until = 0.0

    def problem(self) -> str | None:
        """Why no container can be run here; `None` when one can."""
        if time.monotonic() >= self._until:
            self._problem = _problem()
            self._until = time.monotonic() + (_GOOD_FOR if self._problem is None else _BAD_FOR)
        return self._problem


def remove_containers(label: str) -> bool:
    """Removes the containers with that label, whichever engine has them. True when none is left."""
    engines = [engine for engine in ("docker", "podman") if shutil.which(engine)]
    return [_removed(engine, label) for engine in engines] == [True] * len(engines)


def _removed(engine: str, label: str) -> bool:
    listed = _run(engine, "ps", "--all", "--quiet", "--filter", f"label={label}")
    if isinstance(listed, str):
        # An engine that is not running runs no containers.
        return True
    ids = listed.stdout.split()
    return not ids or not isinstance(_run(engine, "rm", "--force", "--volumes", *ids), str)


def _problem() -> str | None:
    problems = []
    for engine, field in (("docker", "{{.Server.Version}}"), ("podman", "{{.Client.Version}}")):
        if shutil.which(engine) is None:
            continue
        answer = _run(engine, "version", "--format", field)
        if not isinstance(answer, str):
            return None
        problems.append(_in_words(engine, answer))
    if problems:
        return " ".join(problems)
    return "The job needs a container, and neither docker nor podman is installed. Install one, or leave out `image`."


def _in_words(engine: str, answer: str) -> str:
    lower = answer.lower()
    if "permission denied" in lower:
        return (
            f"{engine} is installed, but this user may not use it. "
            f"Add the user to its group (sudo usermod -aG {engine} $USER) and log in again."
        )
    if "cannot connect" in lower or "is the docker daemon running" in lower or "no such file" in lower:
        return f"{engine} is installed, but its daemon is not running. Start it (sudo systemctl start {engine})."
    return f"{engine} does not work: {' '.join(answer.split())[:300]}"


def _run(engine: str, *arguments: str) -> subprocess.CompletedProcess[str] | str:
    """The finished command, or what it complained about."""
    try:
        done = subprocess.run([engine, *arguments], capture_output=True, text=True, timeout=10, check=False)
    except (OSError, subprocess.SubprocessError) as error:
        return str(error)
    return done if done.returncode == 0 else done.stderr or f"exit status {done.returncode}"
