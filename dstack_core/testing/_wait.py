"""Waiting for a condition instead of for a time."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import TypeVar

T = TypeVar("T")

_FIRST_PAUSE = 0.002
_LONGEST_PAUSE = 0.1


def wait_until(condition: Callable[[], T], *, timeout: float = 30, what: str = "") -> T:
    """Calls `condition` until it returns something true, and returns that.

    Args:
        condition: called again and again, first quickly, later ten times a second.
        timeout: seconds after which to give up.
        what: what is waited for, for the message.

    Raises:
        TimeoutError: it did not become true in time.
    """
    deadline = time.monotonic() + timeout
    pause = _FIRST_PAUSE
    while not (result := condition()):
        if time.monotonic() >= deadline:
            raise TimeoutError(f"Not within {timeout:g} s: {what or condition}")
        time.sleep(pause)
        pause = min(pause * 1.5, _LONGEST_PAUSE)
    return result
