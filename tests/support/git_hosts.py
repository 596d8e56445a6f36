"""Real git servers on this computer: `git http-backend` behind HTTP with a password, and a real sshd.

Fixtures, to be imported into a `conftest.py`:

- `git_server`: a `GitServer`, open to all unless `token` is set.
- `ssh_server` (Debian: `openssh-server`): a `SshServer`. Where sshd is missing the tests are skipped with the reason;
  with `DSTACK_REQUIRE_ROOT=1` they fail instead.
"""

from __future__ import annotations

import base64
import os
import shutil
import socket
import subprocess
import threading
from collections.abc import Iterator, Mapping
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from dstack_core.testing import wait_until

__all__ = ["GitServer", "Repository", "SshServer", "git_server", "ssh_server"]

_ENV = {
    **{name: value for name, value in os.environ.items() if not name.startswith("GIT_")},
    "GIT_CONFIG_GLOBAL": os.devnull,
    "GIT_CONFIG_NOSYSTEM": "1",
    "GIT_AUTHOR_NAME": "A",
    "GIT_AUTHOR_EMAIL": "a@example.org",
    "GIT_COMMITTER_NAME": "C",
    "GIT_COMMITTER_EMAIL": "c@example.org",
    "GIT_ALLOW_PROTOCOL": "file:http",
}


def git(folder: Path, *arguments: str) -> str:
    """Runs git, which must succeed, and returns its output."""
    done = subprocess.run(["git", *arguments], cwd=folder, env=_ENV, capture_output=True, text=True, check=False)
    assert done.returncode == 0, f"git {arguments}: {done.stderr}"
    return done.stdout.strip()


class Repository:
    """A bare repository, and a working copy to commit to it."""

    def __init__(self, path: Path, copies: Path, branch: str = "main") -> None:
        self.path = path
        self.copy = copies / path.stem
        git(path.parent, "init", "--quiet", "--bare", f"--initial-branch={branch}", str(path))
        git(copies, "init", "--quiet", f"--initial-branch={branch}", str(self.copy))
        git(self.copy, "remote", "add", "origin", str(path))

    def commit(self, files: Mapping[str, str | None], branch: str = "main") -> str:
        """Writes files (`None`: removes), commits, pushes, and returns the commit."""
        if git(self.copy, "branch", "--show-current") != branch:
            git(self.copy, "checkout", "--quiet", "-b", branch)
        for name, text in files.items():
            path = self.copy / name
            if text is None:
                path.unlink()
            else:
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_text(text)
        return self.push(branch)

    def push(self, branch: str = "main") -> str:
        """Commits all that changed, pushes, and returns the commit."""
        git(self.copy, "add", "--all")
        git(self.copy, "commit", "--quiet", "--allow-empty", "-m", "A change")
        git(self.copy, "push", "--quiet", "origin", branch)
        return git(self.copy, "rev-parse", "HEAD")


class GitServer:
    """`git http-backend` for all repositories below `root`.

    Attributes:
        token: what every request must give as its password; `None` for no password.
        modern: whether clients may use the protocol in which any commit can be asked for by its hash.
        hold: while it is set, requests wait before they are answered.
        held: set once a request waits.
        asked: (path, authorization) of each request.
    """

    def __init__(self, root: Path, copies: Path) -> None:
        self.root, self._copies = root, copies
        self.token: str | None = None
        self.modern = True
        self.hold, self.held, self._go = threading.Event(), threading.Event(), threading.Event()
        self.asked: list[tuple[str, str]] = []
        server = self

        class Handler(_Handler):
            git_server = server

        self._http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self._http.server_port}"
        self._thread = threading.Thread(target=self._http.serve_forever, kwargs={"poll_interval": 0.05})
        self._thread.start()

    def repository(self, name: str, branch: str = "main") -> Repository:
        """A new repository, as `owner/name`; its address is `url_of(name)`."""
        path = self.root / f"{name}.git"
        path.parent.mkdir(exist_ok=True)
        return Repository(path, self._copies, branch)

    def url_of(self, name: str) -> str:
        """Where to clone it from."""
        return f"{self.url}/{name}.git"

    def admits(self, authorization: str) -> bool:
        """Whether a request may pass."""
        if self.token is None:
            return True
        kind, _, given = authorization.partition(" ")
        return kind == "Basic" and base64.b64decode(given).decode().partition(":")[2] == self.token

    def wait(self) -> None:
        """Where a request waits while it is held."""
        if self.hold.is_set():
            self.held.set()
            self._go.wait(60)

    def release(self) -> None:
        """Lets all that wait go on."""
        self.hold.clear()
        self._go.set()

    def close(self) -> None:
        """Ends it."""
        self.release()
        self._http.shutdown()
        self._thread.join()
        self._http.server_close()


class _Handler(BaseHTTPRequestHandler):
    git_server: GitServer

    def do_GET(self) -> None:
        self._answer()

    def do_POST(self) -> None:
        self._answer()

    def _answer(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        server, authorization = self.git_server, self.headers.get("Authorization", "")
        server.asked.append((self.path, authorization))
        server.wait()
        if not server.admits(authorization):
            self.send_response(401)
            self.send_header("WWW-Authenticate", 'Basic realm="git"')
            self.send_header("Content-Length", "0")
            self.end_headers()
            return
        done = subprocess.run(["git", "http-backend"], input=body, env=self._cgi(), capture_output=True, check=False)
        self._pass_on(done.stdout)

    def _cgi(self) -> dict[str, str]:
        path, _, query = self.path.partition("?")
        env = {
            **_ENV,
            "GIT_PROJECT_ROOT": str(self.git_server.root),
            "GIT_HTTP_EXPORT_ALL": "1",
            "REQUEST_METHOD": self.command,
            "PATH_INFO": path,
            "QUERY_STRING": query,
            "CONTENT_TYPE": self.headers.get("Content-Type", ""),
            "CONTENT_LENGTH": self.headers.get("Content-Length", "0"),
            "HTTP_CONTENT_ENCODING": self.headers.get("Content-Encoding", ""),
        }
        if self.git_server.modern:
            env["GIT_PROTOCOL"] = self.headers.get("Git-Protocol", "")
        return env

    def _pass_on(self, output: bytes) -> None:
        head, _, body = output.partition(b"\r\n\r\n")
        headers = dict(line.split(": ", 1) for line in head.decode().split("\r\n"))
        self.send_response(int(headers.pop("Status", "200").split()[0]))
        for name, value in headers.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format: str, *arguments: object) -> None:
        """Says nothing."""


@pytest.fixture
def git_server(tmp_path: Path) -> Iterator[GitServer]:
    """A git server for the test."""
    for name in ("served", "copies"):
        (tmp_path / name).mkdir()
    server = GitServer(tmp_path / "served", tmp_path / "copies")
    yield server
    server.close()


_CONFIG = """
ListenAddress 127.0.0.1
Port {port}
HostKey {folder}/host_key
AuthorizedKeysFile {folder}/authorized_keys
PidFile none
StrictModes no
UsePAM no
PasswordAuthentication no
KbdInteractiveAuthentication no
PermitRootLogin yes
PermitUserEnvironment no
"""


class SshServer:
    """sshd, for the user who runs the tests, with one key that may enter."""

    def __init__(self, program: str, folder: Path) -> None:
        self._folder = folder
        self.port = _free_port()
        self.key = self._new_key("key")
        self.other_key = self._new_key("other")
        self._new_key("host_key")
        shutil.copy(folder / "key.pub", folder / "authorized_keys")
        (folder / "config").write_text(_CONFIG.format(port=self.port, folder=folder))
        argv = [program, "-D", "-e", "-f", str(folder / "config")]
        with (folder / "log").open("wb") as log:
            self._process = subprocess.Popen(argv, stderr=log, stdin=subprocess.DEVNULL)
        wait_until(self._answers, timeout=30, what="sshd to answer")

    def url_of(self, repository: Path) -> str:
        """Where to clone a repository of this computer from."""
        return f"ssh://{os.environ.get('USER') or 'root'}@127.0.0.1:{self.port}{repository}"

    def close(self) -> None:
        """Ends it."""
        self._process.terminate()
        self._process.wait(30)

    def _new_key(self, name: str) -> str:
        path = self._folder / name
        subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", str(path)], check=True)
        return path.read_text()

    def _answers(self) -> bool:
        assert self._process.poll() is None, (self._folder / "log").read_text()
        try:
            with socket.create_connection(("127.0.0.1", self.port), timeout=5) as connection:
                return connection.recv(4) == b"SSH-"
        except OSError:
            return False


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@pytest.fixture
def ssh_server(tmp_path: Path) -> Iterator[SshServer]:
    """An sshd for the test."""
    program = shutil.which("sshd", path=f"{os.environ.get('PATH', '')}:/usr/sbin:/sbin")
    if program is None:
        reason = "there is no sshd; install Debian's openssh-server"
        if os.environ.get("DSTACK_REQUIRE_ROOT") == "1":
            pytest.fail(f"DSTACK_REQUIRE_ROOT is set, and {reason}")
        pytest.skip(reason)
    if os.geteuid() == 0:
        # Where Debian's sshd separates its privileges; its service makes it when it starts.
        Path("/run/sshd").mkdir(mode=0o755, exist_ok=True)
    folder = tmp_path / "sshd"
    folder.mkdir(mode=0o700)
    server = SshServer(program, folder)
    yield server
    server.close()
