"""`python -m dstack_core.testing.nimbus`: a Nimbus to try a backend on; its servers are processes of this computer."""

from __future__ import annotations

import argparse
import contextlib
import signal
import tempfile
from pathlib import Path
from types import FrameType

from dstack_core.testing.nimbus import NimbusServer

_GREETING = """\
Nimbus is at {url} until Ctrl+C; each of its servers is a process of this computer.
The entry under backends: in server/config.yml, with the type that your backend has:
      - type: nimbus
        url: {url}
        token: {token}"""


def main() -> None:
    """Serves until it is told to stop."""
    parser = argparse.ArgumentParser(
        prog="python -m dstack_core.testing.nimbus", description="A small cloud to try on."
    )
    parser.add_argument("--port", type=int, default=0, help="where to listen; a free port if not set")
    parser.add_argument("--token", help="what clients have to send; a random one if not set")
    options = parser.parse_args()
    signal.signal(signal.SIGTERM, _interrupt)
    with (
        contextlib.suppress(KeyboardInterrupt),
        tempfile.TemporaryDirectory(prefix="nimbus-") as folder,
        NimbusServer(port=options.port, token=options.token, agents=Path(folder)) as server,
    ):
        print(_GREETING.format(url=server.url, token=server.token), flush=True)  # noqa: T201  # for a person
        signal.pause()


def _interrupt(_number: int, _frame: FrameType | None) -> None:
    raise KeyboardInterrupt


if __name__ == "__main__":
    main()
