"""A container engine, spoken to over its socket. Standard library only: nothing needs to be installed for it."""

from __future__ import annotations

import http.client
import io
import json
import socket
import tarfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import IO, Any
from urllib.parse import quote, urlencode

_CHUNK = 1 << 20
_ANSWERS_WITHIN = 120
_STDOUT = 1


class EngineError(Exception):
    """The engine refused something.

    Attributes:
        status: of HTTP; 0 if the engine could not be reached at all.
    """

    def __init__(self, status: int, message: str) -> None:
        super().__init__(message)
        self.status = status


@dataclass(frozen=True)
class MachineResult:
    """How a command inside a container went.

    Attributes:
        code: its exit code.
        output: what it wrote to its standard output.
        errors: what it wrote to its standard error.
    """

    code: int
    output: bytes
    errors: bytes


class _Connection(http.client.HTTPConnection):
    def __init__(self, path: str, timeout: float | None) -> None:
        super().__init__("localhost", timeout=timeout)
        self._path = path

    def connect(self) -> None:
        """Opens the unix socket."""
        self.sock = socket.socket(socket.AF_UNIX)
        self.sock.settimeout(self.timeout)
        self.sock.connect(self._path)


class Engine:
    """An engine that speaks Docker's API on a unix socket. Safe to use from several threads.

    Args:
        path: of the socket.
    """

    def __init__(self, path: str) -> None:
        self.path = path

    # -- images -----------------------------------------------------------------------------------------------------

    def has_image(self, name: str) -> bool:
        """Whether it has an image of that name."""
        try:
            self._call("GET", f"/images/{quote(name, safe=':')}/json")
        except EngineError as error:
            if error.status == http.HTTPStatus.NOT_FOUND:
                return False
            raise
        return True

    def import_image(self, name: str, archive: IO[bytes], *, size: int) -> None:
        """Makes an image of one layer from a tar file of `size` bytes."""
        repo, _, tag = name.partition(":")
        query = {"fromSrc": "-", "repo": repo, "tag": tag}
        headers = {"Content-Type": "application/x-tar", "Content-Length": str(size)}
        answer = self._exchange("POST", f"/images/create?{urlencode(query)}", archive, headers, timeout=None)
        for line in self._read(answer).splitlines():
            if "error" in (said := json.loads(line)):
                raise EngineError(answer.status, str(said["error"]))

    # -- containers -------------------------------------------------------------------------------------------------

    def create(self, name: str, spec: Mapping[str, Any]) -> str:
        """Makes a container, which does not run yet, and returns its id."""
        return str(self._call("POST", f"/containers/create?{urlencode({'name': name})}", spec)["Id"])

    def start(self, container: str) -> None:
        """Starts it."""
        self._call("POST", f"/containers/{container}/start")

    def wait(self, container: str) -> int:
        """Returns when it does not run any more, with its exit code."""
        answer = self._call("POST", f"/containers/{container}/wait", timeout=None)
        if not answer:
            raise EngineError(0, f"The container engine at {self.path} ended")
        return int(answer["StatusCode"])

    def kill(self, container: str, signal: str = "SIGKILL") -> None:
        """Sends a signal to its first process; nothing happens if it does not run."""
        self._call("POST", f"/containers/{container}/kill?signal={quote(signal)}", accept=(404, 409))

    def remove(self, container: str) -> None:
        """Removes it with its disks, whether it runs or not, and whether it is there or not."""
        self._call("DELETE", f"/containers/{container}?force=1&v=1", accept=(404, 409))

    def inspect(self, container: str) -> dict[str, Any]:
        """All that the engine knows of it."""
        return dict(self._call("GET", f"/containers/{container}/json"))

    def containers(self, label: str) -> list[dict[str, Any]]:
        """All containers with this label (`key` or `key=value`), running or not."""
        query = urlencode({"all": 1, "filters": json.dumps({"label": [label]})})
        return list(self._call("GET", f"/containers/json?{query}"))

    def log(self, container: str) -> bytes:
        """All that a container with a terminal has printed."""
        return self._read(self._exchange("GET", f"/containers/{container}/logs?stdout=1&stderr=1"))

    def put(self, container: str, files: Mapping[str, tuple[bytes, int]]) -> None:
        """Writes files into it: path → contents and mode. They belong to root; folders are made as needed."""
        headers = {"Content-Type": "application/x-tar"}
        self._read(self._exchange("PUT", f"/containers/{container}/archive?path=/", packed(files), headers))

    def run(self, container: str, *argv: str, into: IO[bytes] | None = None) -> MachineResult:
        """Runs a command as root inside of a running container.

        Args:
            container: where.
            argv: the command.
            into: where its output is written as it comes; it is returned if not set.
        """
        made = self._call(
            "POST",
            f"/containers/{container}/exec",
            {"AttachStdout": True, "AttachStderr": True, "Cmd": list(argv)},
        )["Id"]
        headers = {"Content-Type": "application/json"}
        answer = self._exchange("POST", f"/exec/{made}/start", b'{"Detach": false}', headers, timeout=None)
        output, errors = io.BytesIO(), io.BytesIO()
        with answer:
            for stream, chunk in _frames(answer):
                (errors if stream != _STDOUT else into or output).write(chunk)
        code = int(self._call("GET", f"/exec/{made}/json")["ExitCode"])
        return MachineResult(code, output.getvalue(), errors.getvalue())

    def version(self) -> str:
        """Its version; raises `EngineError` if it does not answer."""
        return str(self._call("GET", "/version", timeout=20)["Version"])

    # -- the wire ---------------------------------------------------------------------------------------------------

    def _call(
        self,
        method: str,
        path: str,
        body: Mapping[str, Any] | None = None,
        *,
        accept: tuple[int, ...] = (),
        timeout: float | None = _ANSWERS_WITHIN,
    ) -> Any:
        content = None if body is None else json.dumps(body).encode()
        headers = {"Content-Type": "application/json"}
        answer = self._exchange(method, path, content, headers, accept=accept, timeout=timeout)
        return json.loads(self._read(answer) or b"null")

    def _read(self, answer: http.client.HTTPResponse) -> bytes:
        try:
            with answer:
                return answer.read()
        except (OSError, http.client.HTTPException) as error:
            raise EngineError(0, f"The container engine at {self.path} broke off: {error!r}") from error

    def _exchange(
        self,
        method: str,
        path: str,
        body: bytes | IO[bytes] | None = None,
        headers: Mapping[str, str] | None = None,
        *,
        accept: tuple[int, ...] = (),
        timeout: float | None = _ANSWERS_WITHIN,
    ) -> http.client.HTTPResponse:
        connection = _Connection(self.path, timeout)
        try:
            connection.request(method, path, body, {"Connection": "close", **(headers or {})})
            answer = connection.getresponse()
            if connection.sock is not None:
                # The answer holds it open until it is read.
                connection.sock.close()
        except OSError as error:
            connection.close()
            raise EngineError(0, f"The container engine at {self.path} does not answer: {error}") from error
        except http.client.HTTPException as error:
            connection.close()
            raise EngineError(0, f"The container engine at {self.path} broke off: {error!r}") from error
        if answer.status >= http.HTTPStatus.BAD_REQUEST and answer.status not in accept:
            raise EngineError(answer.status, _message(self._read(answer)))
        return answer


def packed(files: Mapping[str, tuple[bytes, int]]) -> bytes:
    """A tar file with these files: path → contents and mode."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as archive:
        for path, (content, mode) in files.items():
            entry = tarfile.TarInfo(path.lstrip("/"))
            entry.size, entry.mode = len(content), mode
            archive.addfile(entry, io.BytesIO(content))
    return buffer.getvalue()


def _frames(answer: http.client.HTTPResponse) -> Iterator[tuple[int, bytes]]:
    """What a command wrote: number of the stream and bytes, a frame of eight bytes before each piece."""
    while len(head := answer.read(8)) == 8:
        left = int.from_bytes(head[4:], "big")
        while left and (chunk := answer.read(min(left, _CHUNK))):
            left -= len(chunk)
            yield head[0], chunk


def _message(body: bytes) -> str:
    try:
        return str(json.loads(body)["message"])
    except (ValueError, KeyError, TypeError):
        return body.decode(errors="replace")
