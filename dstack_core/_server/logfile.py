"""The server's own log: `server/server.log`, readable by its owner only, kept small."""

from __future__ import annotations

import logging
import logging.handlers
import os
from io import TextIOWrapper
from pathlib import Path

SIZE = 5 << 20
OLD_FILES = 2
FORMAT = "%(asctime)s.%(msecs)03d %(levelname)-7s %(name)s: %(message)s"


class _PrivateFile(logging.handlers.RotatingFileHandler):
    """Makes its files for the owner alone, and never lets a full disk disturb the server."""

    def _open(self) -> TextIOWrapper:
        descriptor = os.open(self.baseFilename, os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC, 0o600)
        os.fchmod(descriptor, 0o600)
        return os.fdopen(descriptor, "a", encoding="utf-8", errors="backslashreplace")

    def handleError(self, record: logging.LogRecord) -> None:  # noqa: N802  # the name is logging's
        """Drops the line: there is nowhere to say so."""


def log_to(path: Path) -> None:
    """Sends what this process logs to that file, and nothing to the terminal."""
    handler = _PrivateFile(path, maxBytes=SIZE, backupCount=OLD_FILES, delay=True)
    handler.setFormatter(logging.Formatter(FORMAT, "%Y-%m-%d %H:%M:%S"))
    root = logging.getLogger()
    root.addHandler(handler)
    root.setLevel(os.environ.get("DSTACK_SERVER_LOG_LEVEL", "INFO").upper())
    for chatty in ("uvicorn.error", "asyncio", "httpcore", "alembic"):
        logging.getLogger(chatty).setLevel(logging.WARNING)
    logging.captureWarnings(capture=True)


def warn_on_terminal() -> None:
    """Shows warnings and errors to the person in front of a server in the foreground, too."""
    handler = logging.StreamHandler()
    handler.setLevel(logging.WARNING)
    logging.getLogger().addHandler(handler)


def leave_terminal() -> None:
    """Gives up standard input and output, so that whoever started this process sees that it is up, and may go away."""
    nowhere = os.open(os.devnull, os.O_RDWR)
    for descriptor in (0, 1, 2):
        os.dup2(nowhere, descriptor)
    os.close(nowhere)
