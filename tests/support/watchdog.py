"""No test may hang for ever, not even while it cleans up after a failure.

pytest and pytest-timeout both give up watching a test as soon as it has failed, so that a debugger can be opened on it.
A fixture that then waits for something that never comes would stop the whole run, without a word.

Nor may it matter how the run was started: what a shell puts into the background ignores Ctrl+C, and so would all that
the tests start.
"""

from __future__ import annotations

import faulthandler
import os
import signal
import sys
from collections.abc import Generator

import pytest

_STDERR = pytest.StashKey[int]()


def pytest_addoption(parser: pytest.Parser) -> None:
    """Adds the setting."""
    parser.addini(
        "teardown_timeout",
        "Seconds that the end of a test may take: after them the tracebacks of all threads, and the end of the process",
        default="300",
    )


def pytest_configure(config: pytest.Config) -> None:
    """Keeps the real stderr, which is another file while a test runs, and takes notice of Ctrl+C."""
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    assert sys.__stderr__ is not None
    config.stash[_STDERR] = os.dup(sys.__stderr__.fileno())


def pytest_unconfigure(config: pytest.Config) -> None:
    """Lets go of it."""
    os.close(config.stash[_STDERR])


@pytest.hookimpl(wrapper=True, tryfirst=True)
def pytest_runtest_teardown(item: pytest.Item) -> Generator[None]:
    """Watches the end of a test on its own, whatever became of the test. pytest ends the watch after it."""
    seconds = float(item.config.getini("teardown_timeout"))
    faulthandler.dump_traceback_later(seconds, exit=True, file=item.config.stash[_STDERR])
    return (yield)
