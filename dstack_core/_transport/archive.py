"""The agent as one file that any Python from 3.8 on can start."""

from __future__ import annotations

import hashlib
import importlib.util
import py_compile
import sys
import tempfile
import zipfile
from pathlib import Path

SOURCES = Path(__file__).parent.parent / "_agent"
_MAIN = "from agent.__main__ import main\n\nmain()\n"
START = "import sys; sys.path.insert(0, sys.argv.pop(1)); from agent.__main__ import main; main()"
_EPOCH = (1980, 1, 1, 0, 0, 0)


def build_agent(directory: Path) -> Path:
    """Writes `agent-<hash>.pyz` into `directory`, unless it is there, and returns its path.

    The hash is that of the contents, so an agent that was started from it can never find it changed. It holds the
    sources for every interpreter, and the compiled code for this one; nothing is compiled or inflated at its start.
    """
    sources = {"__main__.py": _MAIN.encode()}
    sources |= {f"agent/{path.name}": path.read_bytes() for path in sorted(SOURCES.glob("*.py"))}
    digest = hashlib.sha256(importlib.util.MAGIC_NUMBER)
    for name, source in sources.items():
        digest.update(f"{name}:{len(source)}\n".encode() + source)
    archive = directory / f"agent-{digest.hexdigest()[:16]}.pyz"
    if not archive.exists():
        directory.mkdir(mode=0o700, parents=True, exist_ok=True)
        _write(archive, sources)
    return archive


def agent_command(archive: Path, lease: float = 600.0, instance: str | None = None) -> tuple[str, ...]:
    """Argv that starts the agent on this computer, in its working directory.

    `lease`: seconds after which it ends itself if no server ever speaks to it. `instance`: what it is the agent of, so
    that it takes no job that is meant for another one, whose address it may have got.

    Short of `python ARCHIVE serve`, which works as well: running an archive costs a third of the agent's whole start.
    """
    # Isolated and without site-packages: nothing that is installed here can get in, and nothing of it is loaded.
    of = () if instance is None else (instance,)
    return (sys.executable, "-I", "-S", "-c", START, str(archive), "serve", f"{lease:g}", *of)


def _write(archive: Path, sources: dict[str, bytes]) -> None:
    with tempfile.TemporaryDirectory(dir=archive.parent, prefix=".agent-") as folder:
        fresh = Path(folder) / "pyz"
        with zipfile.ZipFile(fresh, "w", zipfile.ZIP_STORED) as target:
            for name, source in sources.items():
                target.writestr(zipfile.ZipInfo(f"{name}c", _EPOCH), _compiled(Path(folder), name, source))
                target.writestr(zipfile.ZipInfo(name, _EPOCH), source)
        fresh.chmod(0o600)
        fresh.replace(archive)


def _compiled(folder: Path, name: str, source: bytes) -> bytes:
    path = folder / "source.py"
    path.write_bytes(source)
    mode = py_compile.PycInvalidationMode.UNCHECKED_HASH
    target = py_compile.compile(str(path), f"{path}c", dfile=name, doraise=True, optimize=-1, invalidation_mode=mode)
    if target is None:
        raise RuntimeError(f"{name} could not be compiled")
    return Path(target).read_bytes()
