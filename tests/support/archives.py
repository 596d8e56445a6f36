"""Tar archives as the server makes them, and as it never would."""

from __future__ import annotations

import hashlib
import io
import tarfile
from collections.abc import Iterable, Mapping

from tests.support.real_agents import RealAgent

END = bytes(1024)


def entry(name: str, content: bytes = b"", kind: bytes = tarfile.REGTYPE, mode: int = 0o644, **facts: object) -> bytes:
    """One entry with its contents, written as Python does, with nothing checked."""
    info = tarfile.TarInfo(name)
    info.type, info.mode, info.size = kind, mode, len(content)
    for fact, value in facts.items():
        setattr(info, fact, value)
    return info.tobuf(tarfile.PAX_FORMAT) + content + bytes(-len(content) % 512)


def link(name: str, target: str) -> bytes:
    """A symbolic link."""
    return entry(name, kind=tarfile.SYMTYPE, linkname=target)


def folder(name: str) -> bytes:
    """A folder."""
    return entry(name, kind=tarfile.DIRTYPE, mode=0o755)


def archive(files: Mapping[str, bytes], *more: bytes) -> bytes:
    """Files, and entries that were made before."""
    return b"".join([*(entry(name, content) for name, content in files.items()), *more, END])


def changed(header: bytes, start: int, field: bytes, mend: bool = True) -> bytes:
    """A header with other bytes at one place, and with the checksum that belongs to them."""
    raw = bytearray(header)
    raw[start : start + len(field)] = field
    if mend:
        raw[148:156] = b" " * 8
        raw[148:156] = b"%06o\0 " % sum(raw[:512])
    return bytes(raw)


def extended(records: Mapping[str, bytes]) -> bytes:
    """An extended header, for the entry that follows."""
    body = b"".join(_record(key.encode(), value) for key, value in records.items())
    return entry("pax", body, tarfile.XHDTYPE)


def _record(key: bytes, value: bytes) -> bytes:
    rest = b" " + key + b"=" + value + b"\n"
    size = len(rest) + 1
    while len(b"%d" % size) + len(rest) != size:
        size += 1
    return b"%d" % size + rest


def names_in(data: bytes) -> list[str]:
    """The names of an archive, by Python's own reader."""
    with tarfile.open(fileobj=io.BytesIO(data)) as whole:
        return whole.getnames()


def send(agent: RealAgent, data: bytes, piece: int = 4 << 20) -> dict[str, object]:
    """Sends an archive, and gives what the job's `code` is to be."""
    name = hashlib.sha256(data).hexdigest()
    for offset in range(0, len(data), piece):
        agent.call("PUT", f"/v1/code/{name}?offset={offset}", data[offset : offset + piece])
    return {"hash": name, "size": len(data)}


def run_with(
    agent: RealAgent, data: bytes, shell: str | None, deleted: Iterable[str] = (), **spec: object
) -> dict[str, object]:
    """Sends an archive, and puts a job that starts with it."""
    return agent.run(shell, code={**send(agent, data), "deleted": list(deleted)}, **spec)
