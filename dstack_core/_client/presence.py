"""Tells the server, while a dev environment is attached, that somebody is at work with it."""

from __future__ import annotations

import contextlib
import threading
from typing import TYPE_CHECKING

from dstack_core.errors import ClientError, NotFoundError

if TYPE_CHECKING:
    from uuid import UUID

    from dstack_core._client.api import APIClient

PERIOD = 20.0
"""Seconds between two words, or less: a quarter of what the dev environment stays without any."""
_PATIENCE = 2.0
"""Seconds that `close` waits for a word that is on its way."""


class Presence:
    """Says so from a thread of its own, until it is closed. A server that does not answer is told the next time.

    Args:
        api_client: speaks to the server.
        project: of the run.
        run_id: of the run.
        inactivity: seconds after which the run ends by itself if nobody is there.
    """

    def __init__(self, api_client: APIClient, project: str, run_id: UUID, inactivity: float) -> None:
        self._api = api_client
        self._project = project
        self._run_id = run_id
        self._period = min(PERIOD, inactivity / 4)
        self._closed = threading.Event()
        self._thread = threading.Thread(target=self._work, name="dstack-presence", daemon=True)
        self._thread.start()

    def _work(self) -> None:
        # The run may be gone for good, with its record.
        with contextlib.suppress(NotFoundError):
            self._say()
            while not self._closed.wait(self._period):
                self._say()

    def _say(self) -> None:
        try:
            self._api.note_activity(self._project, self._run_id)
        except NotFoundError:
            raise
        except ClientError:
            # Attached is attached: what is wrong with the server is found out by whoever asks it for something.
            return

    def close(self) -> None:
        """Nobody is there any more. May be called twice."""
        self._closed.set()
        if self._thread is not threading.current_thread():
            self._thread.join(_PATIENCE)
