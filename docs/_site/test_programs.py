"""Every program of README and the pages is checked by mypy, the ones that cannot run here included."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from tests.docs.test_blocks import NOT_RUN, PROGRAMS
from tests.support.blocks import ROOT


def test_programs_are_typed(tmp_path: Path) -> None:
    """mypy, strict, finds nothing in the programs that a reader copies."""
    files = {}
    for block in PROGRAMS:
        if block.page not in NOT_RUN:
            name = f"{block.page.removesuffix('.md').replace('/', '_').replace('-', '_')}_{block.line}.py"
            files[name] = tmp_path / name
            files[name].write_text(block.text)
    config = ["--config-file", str(ROOT / "pyproject.toml"), "--cache-dir", str(ROOT / ".mypy_cache")]
    done = subprocess.run(
        [sys.executable, "-m", "mypy", *config, *map(str, files.values())],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
