"""Starts a server: `python -m dstack_core._server --local`, or with `--host` and `--port` in the foreground.

Exit codes: 0 after a polite end, 75 if a server is already running for this home folder, 78 if what a person wrote
(a file, an argument, a variable) cannot be used, 1 for anything else. With a code other than 0 the reason is on
standard error. A local server closes its standard streams as soon as it answers.

The socket listens before the heavy imports: a client can connect at once, and its first request waits for the rest.
"""

from __future__ import annotations

import argparse
import contextlib
import gc
import os
import sys
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from dstack_core._home import ensure_home
from dstack_core._server.logfile import log_to
from dstack_core._server.sockets import AlreadyRunningError, Lock, UnixListener
from dstack_core.errors import ConfigurationError

if TYPE_CHECKING:
    from dstack_core._server.app import Compose

EX_TEMPFAIL = 75
EX_CONFIG = 78
TOKEN_VARIABLE = "DSTACK_SERVER_TOKEN"  # noqa: S105  # the name of a variable


def main(argv: Sequence[str] | None = None, compose: Compose | None = None) -> int:
    """Runs a server until it is told to stop.

    Args:
        argv: the arguments, `sys.argv[1:]` by default.
        compose: what puts the parts together; the real ones by default.

    Returns:
        The exit code.
    """
    options = _parser().parse_args(argv)
    # What this process starts, and whoever looks at it, need not know.
    os.environ.pop(TOKEN_VARIABLE, None)
    try:
        with _held_home() as (home, lock, listener):
            # Imported late: see the top of this file.
            from dstack_core._server import app

            app.run(options, home, lock, listener, compose or partial(app.composed, local=options.local))
    except AlreadyRunningError as exc:
        return _fail(EX_TEMPFAIL, str(exc))
    except ConfigurationError as exc:
        return _fail(EX_CONFIG, str(exc))
    except Exception as exc:  # noqa: BLE001  # the last line of defence: the log has the rest
        return _fail(1, _unforeseen(exc))
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser("dstack server", description="Runs a dstack server.")
    parser.add_argument("--local", action="store_true", help="listen on the unix socket only; exit when idle")
    parser.add_argument("--host", default="127.0.0.1", help="address to listen on (default: %(default)s)")
    parser.add_argument("--port", type=int, default=3000, help="port to listen on; 0 picks one (default: %(default)s)")
    parser.add_argument(
        "--token",
        default=os.environ.get(TOKEN_VARIABLE),
        help=f"what clients must bring; better in ${TOKEN_VARIABLE}, as arguments can be seen by all users. "
        "Without it a token is made at the first start, and printed",
    )
    parser.add_argument(
        "--idle-exit",
        type=float,
        metavar="SECONDS",
        help="exit after so long without a run or a request (--local: $DSTACK_SERVER_IDLE_SECONDS or 300)",
    )
    return parser


@contextlib.contextmanager
def _held_home() -> Iterator[tuple[Path, Lock, UnixListener]]:
    """The home folder, locked, with the socket in it and the log open."""
    home = ensure_home()
    (home / "server").mkdir(mode=0o700, exist_ok=True)
    lock = Lock(home / "server" / "server.lock", home / "server.sock")
    log_to(home / "server" / "server.log")
    listener = UnixListener(home / "server.sock")
    try:
        yield home, lock, listener
    finally:
        listener.remove()
        lock.release()


def _unforeseen(exc: Exception) -> str:
    from dstack_core._server.refusals import describe, log_failure

    number = log_failure("The server broke down", exc)
    return f"{describe(exc).splitlines()[-1]} (look for {number} in server/server.log of the home folder)"


def _fail(code: int, message: str) -> int:
    # Whoever started this may have gone away.
    with contextlib.suppress(OSError):
        print(f"dstack server: {message}", file=sys.stderr)  # noqa: T201  # for the person or program that started this
    return code


if __name__ == "__main__":
    # Nothing that is made during start-up is garbage: looking for some costs a tenth of the start.
    gc.disable()
    # A short step of one thread waits for the long ones of others; a run takes dozens of such steps.
    sys.setswitchinterval(0.0005)
    sys.exit(main())
