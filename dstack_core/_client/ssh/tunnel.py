"""The connection to a run's machine: one `ssh`, which leads sockets of this computer to ports of that one."""

from __future__ import annotations

import os
import select
import subprocess
import tempfile
import threading
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import IO

from dstack_core._client.ssh.login import CONNECT_TIMEOUT, KEEP_ALIVE, LOOKS, Login
from dstack_core._home import socket_address
from dstack_core.errors import AttachError

_PATIENCE = 2.0 * CONNECT_TIMEOUT
"""Seconds for the connection to be made, all in all."""
_GOODBYE = 2.0
_READY = b"attached\n"
# It ends when its input does: also if this program is killed, nobody goes on.
_THERE = "echo attached; exec cat >/dev/null"


class Tunnel:
    """Made when it is connected; ends with `close`, with this process, or with the connection.

    Args:
        login: the machine.
        ports: for each port of the job, the one on the machine.
        folder: where its sockets may be, for this user alone.
        broken: called, from another thread, when the connection broke; with the reason.

    Raises:
        AttachError: it cannot be connected; says why.
    """

    def __init__(self, login: Login, ports: Mapping[int, int], folder: Path, broken: Callable[[str], None]) -> None:
        self._login, self._folder, self._broken = login, folder, broken
        self._closed = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="dstack-attach-ssh", daemon=True)
        self._errors = tempfile.TemporaryFile()  # noqa: SIM115  # closed with the connection
        self._ssh = self._start(ports)
        try:
            self._wait()
        except BaseException:
            self.close()
            raise
        self._thread.start()

    def place(self, port: int) -> str:
        """The socket that leads to a port of the job."""
        return socket_address(self._folder / str(port))

    def close(self) -> None:
        """Ends the connection. May be called twice."""
        self._closed.set()
        with suppress(OSError):
            _pipe(self._ssh.stdin).close()
        if not self._ended():
            self._ssh.terminate()
            if not self._ended():
                self._ssh.kill()
                self._ssh.wait()
        if self._thread.is_alive() and self._thread is not threading.current_thread():
            self._thread.join(_GOODBYE)
        _pipe(self._ssh.stdout).close()
        self._errors.close()

    def _ended(self) -> bool:
        with suppress(subprocess.TimeoutExpired):
            self._ssh.wait(_GOODBYE)
        return self._ssh.returncode is not None

    def _start(self, ports: Mapping[int, int]) -> subprocess.Popen[bytes]:
        known = self._folder / "known_hosts"
        known.write_text(self._login.known())
        argv = ["ssh", "-F", "none", "-T", "-a", "-x", "-e", "none"]
        options = {**dict(self._login.options(known)), **_OPTIONS}
        argv += [word for name, value in options.items() for word in ("-o", f"{name}={value}")]
        for port, there in ports.items():
            argv += ["-L", f"{_escaped(self.place(port))}:127.0.0.1:{there}"]
        try:
            return subprocess.Popen(
                [*argv, self._login.host, _THERE],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=self._errors,
                # Ctrl+C in a terminal is for this program, which ends it in its own way.
                start_new_session=True,
            )
        except FileNotFoundError as error:
            self._errors.close()
            raise AttachError("The command ssh is not here. Install the OpenSSH client, and attach again.") from error

    def _wait(self) -> None:
        """Until the machine has spoken: then all sockets are there."""
        output, deadline, said = _pipe(self._ssh.stdout), time.monotonic() + _PATIENCE, b""
        while _READY not in said:
            readable, _, _ = select.select([output], [], [], max(0.0, deadline - time.monotonic()))
            if not readable:
                raise AttachError(f"{self._where} did not let us in within {_PATIENCE:g} s. Attach again.")
            piece = os.read(output.fileno(), 4096)
            if not piece:
                raise AttachError(self._refusal())
            said += piece

    def _watch(self) -> None:
        output = _pipe(self._ssh.stdout)
        while os.read(output.fileno(), 4096):
            pass
        if self._closed.is_set():
            return
        self._ssh.wait()
        words = self._last_words() or f"it did not answer for {KEEP_ALIVE * LOOKS} s, or was switched off"
        self._broken(f"The connection to {self._where} broke ({words}).")

    @property
    def _where(self) -> str:
        return f"{self._login.user}@{self._login.host}:{self._login.port}"

    def _refusal(self) -> str:
        self._ssh.wait(_GOODBYE)
        words = self._last_words()
        if "host key verification failed" in words.lower():
            return (
                f"At {self._where} a machine answers whose host key is not the one that was pinned. Nothing was sent "
                "to it: its address may have gone to another machine, or somebody is in between."
            )
        if "permission denied" in words.lower():
            return (
                f"{self._where} does not let in the key {self._login.identity}. It lets in the one with which the run "
                "was submitted: attach with the same DSTACK_HOME, or pass that key as ssh_identity_file."
            )
        return f"{self._where} cannot be reached over SSH from this computer ({words or 'ssh does not say why'})."

    def _last_words(self) -> str:
        self._errors.seek(0)
        return " ".join(self._errors.read()[-2000:].decode(errors="replace").split())


_OPTIONS = {"BatchMode": "yes", "ExitOnForwardFailure": "yes", "StreamLocalBindUnlink": "yes", "LogLevel": "ERROR"}


def _escaped(path: str) -> str:
    return path.replace("\\", "\\\\").replace(":", "\\:")


def _pipe(pipe: IO[bytes] | None) -> IO[bytes]:
    if pipe is None:
        raise RuntimeError("ssh was started without pipes")
    return pipe
