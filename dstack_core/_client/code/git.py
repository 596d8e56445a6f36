"""The `git` command. It is asked, rather than the files below `.git`, as it alone knows all that may be in there."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Mapping
from typing import NamedTuple

from dstack_core.errors import ConfigurationError

_ENVIRONMENT = {
    # Words that do not change with the user's language, no question that nobody sees, and no write to the repository.
    "LC_ALL": "C",
    "GIT_TERMINAL_PROMPT": "0",
    "GIT_OPTIONAL_LOCKS": "0",
}
# These would have git look at another repository than the one in the folder.
_ELSEWHERE = ("GIT_DIR", "GIT_WORK_TREE", "GIT_INDEX_FILE", "GIT_PREFIX", "GIT_COMMON_DIR", "GIT_OBJECT_DIRECTORY")


class GitAnswer(NamedTuple):
    """What git said. `error` is for people."""

    ok: bool
    output: bytes
    error: str

    @property
    def text(self) -> str:
        """The output, without the line's end."""
        return os.fsdecode(self.output).strip()

    def fields(self) -> list[str]:
        """The output of a command that ends each field with a zero byte."""
        return [os.fsdecode(field) for field in self.output.split(b"\0")[:-1]]


def run_git(
    *arguments: str,
    folder: str | None = None,
    env: Mapping[str, str] | None = None,
    timeout: float | None = None,
    given: bytes = b"",
) -> GitAnswer:
    """Runs git, without a shell.

    Args:
        arguments: of the command. They show in the list of processes: never a secret.
        folder: where it runs.
        env: added to its environment.
        timeout: seconds after which it is ended.
        given: its standard input.

    Raises:
        ConfigurationError: git is not installed.
    """
    environment = {name: value for name, value in os.environ.items() if name not in _ELSEWHERE}
    environment |= {**_ENVIRONMENT, **(env or {})}
    place = ("-C", folder) if folder is not None else ()
    try:
        done = subprocess.run(
            ["git", *place, *arguments], input=given, env=environment, capture_output=True, timeout=timeout, check=False
        )
    except FileNotFoundError:
        raise ConfigurationError("git is not installed on this computer. Install it, or use a LocalRepo.") from None
    except subprocess.TimeoutExpired:
        return GitAnswer(ok=False, output=b"", error=f"no answer within {timeout:g} seconds")
    return GitAnswer(done.returncode == 0, done.stdout, done.stderr.decode(errors="replace").strip())
