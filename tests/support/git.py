"""git repositories for tests, with an identity and no settings of this computer."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

ENVIRONMENT = {
    "GIT_CONFIG_GLOBAL": "/dev/null",
    "GIT_CONFIG_NOSYSTEM": "1",
    "GIT_AUTHOR_NAME": "T",
    "GIT_AUTHOR_EMAIL": "t@example.com",
    "GIT_COMMITTER_NAME": "T",
    "GIT_COMMITTER_EMAIL": "t@example.com",
}


def git(folder: Path, *arguments: str, given: str | None = None) -> str:
    """Runs git, with `given` as its input, and returns what it printed."""
    settings = ("-c", "init.defaultBranch=main", "-c", "protocol.file.allow=always", "-c", "safe.directory=*")
    command = ["git", *settings, "-C", str(folder), *arguments]
    environment = {"PATH": os.environ["PATH"], "HOME": str(folder), **ENVIRONMENT}
    done = subprocess.run(command, input=given, check=False, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, f"git {' '.join(arguments)}: {done.stderr}"
    return done.stdout.strip()


def commit(folder: Path, **files: str | bytes) -> str:
    """Writes files (`__` stands for `/`, a last `_` for nothing), commits everything, and returns the commit's hash."""
    for name, content in files.items():
        path = folder / name.replace("__", "/")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
    git(folder, "add", "--all")
    git(folder, "commit", "--allow-empty", "--message", "a commit")
    return git(folder, "rev-parse", "HEAD")


def new_clone(folder: Path, address: str = "https://git.example.com/team/code.git") -> Path:
    """A repository `folder/copy` with one commit, pushed to `folder/server.git`, which it knows by that address."""
    copy = folder / "copy"
    copy.mkdir(parents=True)
    git(folder, "init", "--bare", "server.git")
    git(copy, "init")
    commit(copy, first="first\n")
    git(copy, "remote", "add", "origin", str(folder / "server.git"))
    git(copy, "push", "--set-upstream", "origin", "main")
    # Pushes go on to the folder.
    git(copy, "remote", "set-url", "origin", address)
    git(copy, "remote", "set-url", "--push", "origin", str(folder / "server.git"))
    return copy
