"""The agent as one file."""

from __future__ import annotations

import subprocess
import sys
import zipfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from dstack_core._transport import agent_command, build_agent
from dstack_core._transport.archive import SOURCES


def test_built_once_and_named_for_its_contents(tmp_path: Path) -> None:
    """The same sources give the same file, which is not written again."""
    first = build_agent(tmp_path)
    stamp = first.stat().st_mtime_ns
    assert build_agent(tmp_path) == first
    assert first.stat().st_mtime_ns == stamp
    assert [path.name for path in tmp_path.iterdir()] == [first.name]


def test_built_by_many_at_once(tmp_path: Path) -> None:
    """Nobody ever sees half a file."""
    with ThreadPoolExecutor(8) as pool:
        built = set(pool.map(lambda _: build_agent(tmp_path), range(16)))
    (archive,) = built
    assert zipfile.ZipFile(archive).testzip() is None
    assert list(tmp_path.iterdir()) == [archive]


def test_sources_and_code_are_inside(tmp_path: Path) -> None:
    """Every source for other interpreters, compiled code for this one, and no path of this computer."""
    archive = zipfile.ZipFile(build_agent(tmp_path))
    names = set(archive.namelist())
    for source in SOURCES.glob("*.py"):
        assert archive.read(f"agent/{source.name}") == source.read_bytes()
        assert f"agent/{source.name}c" in names
    assert str(SOURCES).encode() not in b"".join(archive.read(name) for name in names)


def test_imports_nothing_slow_and_nothing_foreign(tmp_path: Path) -> None:
    """Start-up loads the standard library's small corners only; a user waits for it before each run's first line."""
    program = (
        "import sys; sys.path.insert(0, sys.argv[1]); import agent.__main__, agent.api, agent.loop, agent.server; "
        "print(*sorted(sys.modules))"
    )
    argv = [sys.executable, "-I", "-S", "-c", program, str(build_agent(tmp_path))]
    loaded = set(subprocess.run(argv, capture_output=True, text=True, check=True).stdout.split())
    slow = {
        "asyncio",
        "contextlib",
        "ctypes",
        "enum",
        "http",
        "json",
        "re",
        "socket",
        "subprocess",
        "threading",
        "typing",
    }
    assert not loaded & slow
    assert not {name for name in loaded if name.startswith("dstack")}


def test_command_says_what_it_is_for(tmp_path: Path) -> None:
    """Isolated from everything that is installed; without `serve` it explains itself."""
    command = agent_command(build_agent(tmp_path))
    assert command[:3] == (sys.executable, "-I", "-S")
    done = subprocess.run([*command[:-1], "what"], capture_output=True, text=True, check=False, cwd=tmp_path)
    assert done.returncode == 64
    assert "usage" in done.stderr
