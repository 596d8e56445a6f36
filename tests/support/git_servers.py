"""Real git servers on this computer: git's own HTTP backend behind a small web server, and sshd."""

from __future__ import annotations

import base64
import os
import pwd
import shutil
import socket
import subprocess
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Self

from dstack_core.testing import wait_until

USER_PASSWORDS = {"oauth2": "a-token-that-nobody-may-see"}
TOKEN = USER_PASSWORDS["oauth2"]


class GitOverHttp:
    """Serves the repositories of a folder over HTTP; all of them want the token, unless they are public.

    Attributes:
        url: its address.
        asked: the header `Authorization` of each request, or `None`.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.public = False
        self.asked: list[str | None] = []
        outer = self

        class Handler(_Handler):
            server_of_git = outer

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._thread = threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.05})
        self.url = f"http://127.0.0.1:{self._server.server_port}"

    def allows(self, header: str | None) -> bool:
        """Whether a request with that header may read."""
        self.asked.append(header)
        if self.public:
            return True
        scheme, _, encoded = (header or "").partition(" ")
        user, _, password = base64.b64decode(encoded or "").decode().partition(":")
        return scheme == "Basic" and USER_PASSWORDS.get(user) == password

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._server.shutdown()
        self._thread.join(20)
        self._server.server_close()


class _Handler(BaseHTTPRequestHandler):
    server_of_git: GitOverHttp
    protocol_version = "HTTP/1.0"

    def log_message(self, format: str, *args: object) -> None:
        """Says nothing."""

    def do_GET(self) -> None:
        """Answers."""
        self._answer()

    def do_POST(self) -> None:
        """Answers."""
        self._answer()

    def _answer(self) -> None:
        body = self.rfile.read(int(self.headers.get("content-length") or 0))
        if not self.server_of_git.allows(self.headers.get("authorization")):
            self.send_response(401)
            self.send_header("www-authenticate", 'Basic realm="git"')
            self.end_headers()
            return
        path, _, query = self.path.partition("?")
        environment = {
            "PATH": os.environ["PATH"],
            "GIT_PROJECT_ROOT": str(self.server_of_git.folder),
            "GIT_HTTP_EXPORT_ALL": "1",
            "GIT_CONFIG_COUNT": "1",
            "GIT_CONFIG_KEY_0": "safe.directory",
            "GIT_CONFIG_VALUE_0": "*",
            "PATH_INFO": path,
            "QUERY_STRING": query,
            "REQUEST_METHOD": self.command,
            "CONTENT_TYPE": self.headers.get("content-type") or "",
            "CONTENT_LENGTH": str(len(body)),
            "GIT_PROTOCOL": self.headers.get("git-protocol") or "",
        }
        done = subprocess.run(["git", "http-backend"], input=body, env=environment, capture_output=True, check=False)
        head, _, content = done.stdout.partition(b"\r\n\r\n")
        fields = dict(line.split(": ", 1) for line in head.decode().split("\r\n") if ": " in line)
        self.send_response(int(fields.pop("Status", "200").split()[0]))
        for name, value in fields.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(content)


class GitOverSsh:
    """An sshd of this user that lets in who has the key `key`.

    Attributes:
        port: where it listens.
        key: a private key that opens it.
        other_key: one that does not.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.key, self.other_key = folder / "id_good", folder / "id_other"
        self.user = pwd.getpwuid(os.getuid()).pw_name
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            self.port: int = probe.getsockname()[1]

    def url(self, repository: Path) -> str:
        """The address of a repository."""
        return f"ssh://{self.user}@127.0.0.1:{self.port}{repository}"

    def listens(self) -> bool:
        """Whether it takes connections."""
        with socket.socket() as probe:
            return probe.connect_ex(("127.0.0.1", self.port)) == 0


@contextmanager
def git_over_ssh(folder: Path) -> Iterator[GitOverSsh]:
    """Starts an sshd, and ends it."""
    server = GitOverSsh(folder)
    for name in ("host", "id_good", "id_other"):
        subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", str(folder / name)], check=True)
    (folder / "allowed").write_text((folder / "id_good.pub").read_text())
    (folder / "allowed").chmod(0o600)
    if os.geteuid() == 0:
        Path("/run/sshd").mkdir(exist_ok=True)
    options = {
        "ListenAddress": f"127.0.0.1:{server.port}",
        "HostKey": folder / "host",
        "AuthorizedKeysFile": folder / "allowed",
        "PidFile": "none",
        "UsePAM": "no",
        "PermitRootLogin": "prohibit-password",
        "StrictModes": "no",
    }
    arguments = [word for name, value in options.items() for word in ("-o", f"{name}={value}")]
    sshd = shutil.which("sshd") or "/usr/sbin/sshd"
    process = subprocess.Popen([sshd, "-D", "-e", "-f", "/dev/null", *arguments], stderr=subprocess.DEVNULL)
    try:
        wait_until(server.listens, what="sshd")
        yield server
    finally:
        process.terminate()
        process.wait()
