"""What holds for every test of the workspace, whichever distribution it belongs to."""

from __future__ import annotations

pytest_plugins = ["tests.support.watchdog"]
