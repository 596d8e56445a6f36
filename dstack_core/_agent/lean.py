"""JSON, sockets, signals and `prctl`, from the C cores that the standard library's own modules are built on.

`import json, socket, signal, ctypes` takes twice as long as everything else that the agent does before it answers, and
somebody waits for that before each run's first line. Where a core is missing, the public module takes its place.
"""

from __future__ import annotations

import os
import sys
import time

TYPE_CHECKING = False
if TYPE_CHECKING:
    import signal
    import socket
    from typing import Any

    _quote: Any
    _make_scanner: Any
else:
    try:
        import _signal as signal
        import _socket as socket
    except ImportError:
        import signal
        import socket
    try:
        from _json import encode_basestring_ascii as _quote
        from _json import make_scanner as _make_scanner
    except ImportError:
        from json.encoder import encode_basestring_ascii as _quote
        from json.scanner import make_scanner as _make_scanner

__all__ = ["from_json", "iso", "listen", "prctl", "quiet", "signal", "socket", "to_json"]


class _Strict:
    """What the scanner asks of its decoder."""

    strict = True
    object_hook = None
    object_pairs_hook = None
    parse_float = float
    parse_int = int
    parse_constant = float


_scan = _make_scanner(_Strict())


def from_json(text: str) -> Any:
    """The value of one JSON document.

    Raises:
        ValueError: it is none.
    """
    text = text.strip(" \t\r\n")
    try:
        value, end = _scan(text, 0)
    except (StopIteration, ValueError, RecursionError, SystemError):
        # The last: the core cannot find the exception that it wants to raise, which is in the module we do not load.
        raise ValueError("not a JSON document") from None
    if end != len(text):
        raise ValueError("something follows the JSON document")
    return value


def to_json(value: object) -> str:
    """One JSON document: `None`, booleans, numbers, text, lists, and dictionaries with text or numbers as keys."""
    if isinstance(value, str):
        return str(_quote(value))
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    if isinstance(value, (int, float)):
        return repr(value)
    if isinstance(value, dict):
        return "{" + ",".join(_quote(str(key)) + ":" + to_json(item) for key, item in value.items()) + "}"
    if isinstance(value, (list, tuple)):
        return "[" + ",".join(map(to_json, value)) + "]"
    raise TypeError("no JSON for " + type(value).__name__)


class _Quiet:
    """`contextlib.suppress`, whose module would be the slowest to load of all."""

    def __enter__(self) -> None: ...

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: object) -> bool:
        return isinstance(error, (OSError, ValueError))


quiet = _Quiet()
"""Passes over what cannot be helped: a file that is not there, a process that is gone, text that is no number."""


def iso(seconds: float) -> str:
    """A time since the epoch as ISO 8601 in UTC, with microseconds."""
    micros = int(seconds * 1e6)
    return time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(micros // 1000000)) + ".%06d+00:00" % (micros % 1000000)


def listen(path: str) -> Any:
    """A listening, non-blocking unix socket. Its `_accept()` gives a file descriptor."""
    server = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    server.bind(path)
    os.chmod(path, 0o600)
    server.listen(1024)
    server.setblocking(False)
    return server


def prctl(option: int, value: int) -> bool:
    """Linux's `prctl`; false where there is none."""
    if not sys.platform.startswith("linux"):
        return False
    try:
        import _ctypes

        function = _ctypes.dlsym(_ctypes.dlopen(None, 0), "prctl")  # type: ignore[arg-type]  # the program itself
        return bool(_ctypes.call_function(function, (option, value, 0, 0, 0)) == 0)
    except (ImportError, AttributeError, OSError):
        import ctypes

        return bool(ctypes.CDLL(None).prctl(option, value, 0, 0, 0) == 0)
