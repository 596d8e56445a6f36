"""The watch over the tests themselves, in a pytest of its own."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]
TESTS = """
import threading
import pytest

@pytest.fixture
def waits():
    yield
    threading.Event().wait()

def test_hangs_after_it_failed(waits):
    assert not "failed"

@pytest.mark.parametrize("number", range(3))
def test_others(number):
    pass
"""


def test_a_test_that_hangs_after_it_failed_does_not_stop_the_others(tmp_path: Path) -> None:
    """Its process is ended with all tracebacks, and another one goes on."""
    (tmp_path / "test_it.py").write_text(TESTS)
    settings = tmp_path / "pytest.ini"
    settings.write_text("[pytest]\nteardown_timeout = 1\n")
    command = [sys.executable, "-m", "pytest", "-p", "tests.support.watchdog", "-n", "1", "-p", "no:randomly"]
    done = subprocess.run(
        [*command, "-p", "no:cacheprovider", "--rootdir", str(tmp_path), "-c", str(settings), str(tmp_path)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert "in waits" in done.stderr, done.stdout + done.stderr
    assert "3 passed" in done.stdout, done.stdout + done.stderr
    assert done.returncode == 1
