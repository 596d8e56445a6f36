"""A plugin of pytest that writes down what became of each case, with the whole message, one JSON object a line."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    """The end of each case, and whatever failed before or after it."""
    if report.when == "call" or report.failed:
        crash = getattr(report.longrepr, "reprcrash", None)
        message = (crash.message if crash else report.longreprtext) if report.failed else ""
        with Path(os.environ["MUTANTS_REPORT"]).open("a") as file:
            file.write(json.dumps({"id": report.nodeid, "message": message}) + "\n")
