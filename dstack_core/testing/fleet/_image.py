"""The machines' image: built from Debian's packages, kept as a file, imported into the engine that is used.

The file lies in the user's cache folder (`$XDG_CACHE_HOME`, else `~/.cache`), in `dstack/machines`, under the hash of
all that it is made from. It may be deleted at any time, which is also the way to have newer packages in it.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import io
import os
import platform
import shutil
import tarfile
import tempfile
import time
import uuid
from collections.abc import Iterator
from functools import cache
from importlib import resources
from pathlib import Path
from typing import IO, Any

from dstack_core.testing.fleet._daemon import FleetUnavailable
from dstack_core.testing.fleet._docker import Engine, EngineError

__all__ = ["CAPABLE", "image"]

SUITE = "bookworm"
MIRROR = "http://deb.debian.org/debian"
PACKAGES = "ca-certificates,dbus,iproute2,iptables,openssh-server,procps,python3,sudo,systemd,systemd-sysv"
KEYRING = Path("/usr/share/keyrings/debian-archive-keyring.gpg")
_KEPT_FOR = 30 * 24 * 3600
"""Seconds after which a file that nobody used is removed."""
BUILDS = "dev.dstack.machine-build"

CAPABLE = {
    "CapAdd": ["ALL"],
    # In some virtual machines this one may not be given away.
    "CapDrop": ["SYS_RESOURCE"],
    "SecurityOpt": ["seccomp=unconfined", "apparmor=unconfined"],
}
"""What a container needs to be a machine, without being `--privileged`, which is refused in some places."""

_FOLDERS = ("bin", "lib", "lib32", "lib64", "sbin")


def image(engine: Engine, *, container_engine: bool = False) -> str:
    """Name of the image in this engine, into which it is imported if need be, and built before that if need be.

    Raises:
        FleetUnavailable: it can be neither found nor built.
    """
    name = _name(container_engine)
    if engine.has_image(name):
        return name
    with _turn():
        return _ready(engine, container_engine)


def _ready(engine: Engine, container_engine: bool) -> str:
    """The image, for whose turn it is."""
    name = _name(container_engine)
    if not engine.has_image(name):
        _import(engine, name, _archive(engine, container_engine))
    return name


def _name(container_engine: bool) -> str:
    return f"dstack-machine:{_digest()}{'-engine' if container_engine else ''}"


@cache
def _recipe() -> dict[str, bytes]:
    folder = resources.files("dstack_core.testing.fleet") / "recipe"
    return {file.name: file.read_bytes() for file in sorted(folder.iterdir(), key=lambda file: file.name)}


@cache
def _digest() -> str:
    ingredients = [SUITE, MIRROR, PACKAGES, platform.machine(), *(f"{k}\n{v.hex()}" for k, v in _recipe().items())]
    return hashlib.sha256("\0".join(ingredients).encode()).hexdigest()[:16]


def folder() -> Path:
    """Where the files are kept."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "dstack" / "machines"


@contextlib.contextmanager
def _turn() -> Iterator[None]:
    """One process at a time builds and imports."""
    folder().mkdir(parents=True, exist_ok=True)
    with (folder() / "lock").open("w") as turn:
        fcntl.flock(turn, fcntl.LOCK_EX)
        yield


def _import(engine: Engine, name: str, archive: Path) -> None:
    os.utime(archive)
    _prune(archive.parent)
    try:
        with archive.open("rb") as file:
            engine.import_image(name, file, size=archive.stat().st_size)
    except EngineError:
        # Whatever is wrong with the file, the next one who needs it shall have a new one.
        archive.unlink(missing_ok=True)
        raise


def _prune(files: Path) -> None:
    """Removes images of other recipes that nobody has used for long."""
    for file in files.iterdir():
        if time.time() - file.stat().st_mtime > _KEPT_FOR:
            file.unlink()


def _archive(engine: Engine, container_engine: bool) -> Path:
    path = folder() / f"{_name(container_engine).partition(':')[2]}.tar"
    if not path.exists():
        build = _with_engine if container_engine else _from_packages
        with _whole(path) as file:
            build(engine, file)
    return path


@contextlib.contextmanager
def _whole(path: Path) -> Iterator[IO[bytes]]:
    """A new file, which is there as a whole or not at all."""
    with tempfile.NamedTemporaryFile(dir=path.parent, prefix=".new-", delete=False) as file:
        try:
            yield file
            file.flush()
            Path(file.name).replace(path)
        finally:
            Path(file.name).unlink(missing_ok=True)


def _from_packages(engine: Engine, into: IO[bytes]) -> None:
    if not shutil.which("debootstrap", path="/usr/sbin:/usr/bin"):
        raise FleetUnavailable("the machines' image is built with debootstrap, which is not here (Debian: debootstrap)")
    if not KEYRING.exists():
        raise FleetUnavailable(
            f"Debian's packages are checked with {KEYRING}, which is not here (debian-archive-keyring)"
        )
    name = f"dstack-machine-build:{_digest()}"
    bare = _bare()
    engine.import_image(name, io.BytesIO(bare), size=len(bare))
    roots = ["/usr", "/etc", *(f"/{name}" for name in _FOLDERS if _is_folder(name))]
    binds = [f"{path}:{path}:ro" for path in roots]
    with _builder(engine, name, {"Binds": binds, "Tmpfs": {"/build": "exec,dev,suid,size=3g"}}) as builder:
        engine.put(builder, {f"recipe/{name}": (content, 0o644) for name, content in _recipe().items()})
        engine.start(builder)
        _run(engine, builder, into, "/bin/sh", "/recipe/build.sh", SUITE, MIRROR, PACKAGES)


def _with_engine(engine: Engine, into: IO[bytes]) -> None:
    with _builder(engine, _ready(engine, container_engine=False), {}) as builder:
        engine.start(builder)
        _run(engine, builder, into, "/bin/sh", "-c", _recipe()["engine.sh"].decode())


@contextlib.contextmanager
def _builder(engine: Engine, name: str, more: dict[str, Any]) -> Iterator[str]:
    """A container to build in, with the network of this computer, which is removed in the end."""
    proxies = [f"{key}={value}" for key, value in os.environ.items() if key.lower().endswith("_proxy")]
    builder = engine.create(
        f"dstack-machine-build-{uuid.uuid4().hex[:12]}",
        {
            "Image": name,
            "Env": proxies,
            # Ends by itself, should nobody be left to remove it.
            "Cmd": ["/bin/sleep", "1800"],
            "Labels": {BUILDS: "1"},
            "HostConfig": {**CAPABLE, "NetworkMode": "host", "AutoRemove": True, **more},
        },
    )
    try:
        yield builder
    finally:
        engine.remove(builder)


def _run(engine: Engine, builder: str, into: IO[bytes], *argv: str) -> None:
    result = engine.run(builder, *argv, into=into)
    if result.code != 0:
        said = result.errors.decode(errors="replace")[-2000:]
        raise FleetUnavailable(f"the machines' image cannot be built; the last that was said:\n{said}")


def _bare() -> bytes:
    """A file system with nothing in it: this computer's own /usr and /etc are mounted there."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as archive:
        for name in _FOLDERS:
            if (Path("/") / name).is_symlink():
                link = tarfile.TarInfo(name)
                link.type, link.linkname = tarfile.SYMTYPE, str((Path("/") / name).readlink())
                archive.addfile(link)
        for name in ("build", "recipe", "tmp", "var"):
            entry = tarfile.TarInfo(name)
            entry.type, entry.mode = tarfile.DIRTYPE, 0o755
            archive.addfile(entry)
    return buffer.getvalue()


def _is_folder(name: str) -> bool:
    path = Path("/") / name
    return path.is_dir() and not path.is_symlink()
