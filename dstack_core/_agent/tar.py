"""Reads the archives that the server makes: POSIX tar, with extended headers for long names and large files.

Not by `tarfile`: what that makes of an unusual entry depends on the version of Python, it keeps all entries in memory,
and it takes longer to load than a small archive to unpack. Whatever the server does not write is refused here.
"""

from __future__ import annotations

import os

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterator

FILE, FOLDER, LINK = "file", "folder", "link"

_BLOCK = 512
_LONGEST_EXTENSION = 64 << 10
_LONGEST_NUMBER = 20
_KINDS = {b"0": FILE, b"\0": FILE, b"5": FOLDER, b"2": LINK}
_NEVER = {
    b"1": "a hard link",
    b"3": "a device",
    b"4": "a device",
    b"6": "a named pipe",
    b"S": "a sparse file",
}
_ATTRIBUTES = frozenset(b"path linkpath size mtime atime ctime uid gid uname gname comment charset hdrcharset".split())


class BadArchive(Exception):
    """The archive is not one to unpack. The text is for people, and names the entry."""


class Entry:
    """A file, folder or link. `size` bytes at `offset` of the archive are its contents; `target` is a link's."""

    __slots__ = ("executable", "kind", "name", "offset", "size", "target")

    def __init__(self, name: str, kind: str, offset: int, size: int, target: str, executable: bool) -> None:
        self.name, self.kind, self.offset, self.size = name, kind, offset, size
        self.target, self.executable = target, executable


def shown(name: str) -> str:
    """A name from an archive, for people: printable, and not too long."""
    return repr(name if len(name) <= 200 else name[:200] + "…")


def entries(archive: int) -> Iterator[Entry]:
    """All entries of an open archive, in order.

    Raises:
        BadArchive: it holds something else, or is not whole.
    """
    end = os.fstat(archive).st_size
    position = 0
    extended: dict[bytes, bytes] = {}
    while True:
        header = os.pread(archive, _BLOCK, position)
        if len(header) < _BLOCK:
            raise BadArchive("The archive is cut off at byte %d." % end)
        if header.count(0) == _BLOCK:
            return
        position += _BLOCK
        if header[156:157] == b"x":
            size = _extension_size(header)
            extended = _records(os.pread(archive, size, position))
        else:
            entry = _entry(header, position, extended)
            extended, size = {}, entry.size
            if position + size > end:
                raise BadArchive("%s has more bytes than the archive." % shown(entry.name))
            yield entry
        position += size + -size % _BLOCK


def _entry(header: bytes, position: int, extended: dict[bytes, bytes]) -> Entry:
    name = extended.get(b"path") or _joined(_text(header[345:500]), _text(header[:100]))
    shown_name = shown(_decoded(name))
    _check(header, shown_name)
    flag = header[156:157]
    kind = _KINDS.get(flag)
    if kind is None:
        raise BadArchive(
            "%s is %s." % (shown_name, _NEVER.get(flag, "of the unknown kind %r" % flag.decode("latin-1")))
        )
    for attribute in extended.keys() - _ATTRIBUTES:
        raise BadArchive("%s has the unknown attribute %r." % (shown_name, attribute.decode("latin-1")))
    size = _decimal(extended[b"size"]) if b"size" in extended else _octal(header[124:136])
    if size and kind != FILE:
        raise BadArchive("%s is a %s and has contents." % (shown_name, kind))
    if kind == FOLDER and name.endswith(b"/"):
        name = name[:-1]
    target = _decoded(extended.get(b"linkpath") or _text(header[157:257])) if kind == LINK else ""
    return Entry(_decoded(name), kind, position, size, target, bool(_octal(header[100:108]) & 0o100))


def _extension_size(header: bytes) -> int:
    _check(header, "an extended header")
    size = _octal(header[124:136])
    if size > _LONGEST_EXTENSION:
        raise BadArchive("An extended header is longer than %d bytes." % _LONGEST_EXTENSION)
    return size


def _records(data: bytes) -> dict[bytes, bytes]:
    """Lines of `LENGTH KEY=VALUE`, each as long as it says with its line break."""
    found: dict[bytes, bytes] = {}
    at = 0
    while at < len(data):
        space = data.find(b" ", at, at + _LONGEST_NUMBER)
        end = at + _decimal(data[at:space]) if space > at else 0
        key, equals, value = data[space + 1 : end - 1].partition(b"=")
        if not space < end <= len(data) or data[end - 1 : end] != b"\n" or not equals:
            raise BadArchive("An extended header cannot be read.")
        found[key] = value
        at = end
    return found


def _check(header: bytes, name: str) -> None:
    total = sum(header) - sum(header[148:156]) + 8 * 32
    if header[257:265] != b"ustar\x0000" or _octal(header[148:156]) != total:
        raise BadArchive("The header of %s is damaged, or of another kind of archive." % name)


def _octal(field: bytes) -> int:
    digits = field.strip(b" \0")
    if digits.strip(b"01234567"):
        raise BadArchive("%r in a header is no number." % digits.decode("latin-1"))
    return int(digits or b"0", 8)


def _decimal(digits: bytes) -> int:
    if not digits.isdigit() or len(digits) > _LONGEST_NUMBER:
        raise BadArchive("%r in an extended header is no number." % digits[:_LONGEST_NUMBER].decode("latin-1"))
    return int(digits)


def _text(field: bytes) -> bytes:
    return field.partition(b"\0")[0]


def _joined(prefix: bytes, name: bytes) -> bytes:
    return prefix + b"/" + name if prefix else name


def _decoded(name: bytes) -> str:
    return name.decode("utf-8", "surrogateescape")
