"""A program of its own: takes paths away from a folder, then lays an archive over what is left.

`agent unpack FOLDER ARCHIVE DELETED`; the last two are files, or `-` for none. Everything is checked before anything
is changed. No link is ever followed: what is in the way of an entry is replaced by it, and nothing outside the folder
is touched. The rules for paths are those of the server's `_models/code.py`.
"""

from __future__ import annotations

import errno
import os

from .tar import FILE, FOLDER, LINK, BadArchive, entries, shown

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Sequence

    from .tar import Entry

EXIT_REFUSED = 3
MOST_ENTRIES = 200_000
LONGEST_PATH = 4096
_MOST_HOPS = 40
"""Links that the kernel follows for one path."""
_PIECE = 1 << 20
_ENTER = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW
_NEW = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW
_NO_FOLDER = (errno.ENOTDIR, errno.ELOOP)
_LEAVE_OUT = "Take it out of the folder that was submitted, or name it in .dstackignore, and submit again."
_NO_ROOM = (
    "The disk of the machine is full. Ask for a larger one (resources), or leave large files out (.dstackignore)."
)


def run(arguments: Sequence[str]) -> int:
    """The program. What it refuses is on its standard output, for people."""
    os.umask(0o022)
    try:
        _run(*arguments)
    except BadArchive as refusal:
        os.write(1, str(refusal).encode("utf-8", "backslashreplace"))
        return EXIT_REFUSED
    return 0


def _run(folder: str, archive: str, deleted: str) -> None:
    gone = _read_paths(deleted) if deleted != "-" else []
    for path in gone:
        problem = path_problem(path)
        if problem:
            raise BadArchive("%s, which is to be deleted, %s." % (shown(path), problem))
    source = os.open(archive, os.O_RDONLY) if archive != "-" else -1
    if source >= 0:
        check(source)
    target = Target(folder)
    for path in gone:
        target.delete(path)
    if source >= 0:
        for entry in entries(source):
            target.put(entry, source)


def _read_paths(file: str) -> list[str]:
    with open(file, "rb") as paths:
        return [path.decode("utf-8", "surrogateescape") for path in paths.read().split(b"\0") if path]


# ---------------------------------------------------------------------------------------------------- the checks --


def path_problem(path: str) -> str | None:
    """What is wrong with the path of an entry; `None` if it stays within its folder."""
    if not path or path.startswith("/") or "\0" in path:
        return "is not a relative path"
    if any(part in ("", ".", "..") for part in path.split("/")):
        return "leads out of its folder, or is written in more than one way"
    return "is longer than %d bytes" % LONGEST_PATH if len(_encoded(path)) > LONGEST_PATH else None


def link_problem(path: str, target: str) -> str | None:
    """What is wrong with where a link leads; `None` if that is within the folder, as far as no other link matters."""
    if not target or target.startswith("/") or "\0" in target:
        return "leads to an absolute path"
    depth = path.count("/")
    for part in target.split("/"):
        depth += -1 if part == ".." else 0 if part in ("", ".") else 1
        if depth < 0:
            return "leads out of the folder"
    return None


def check(archive: int) -> None:
    """Looks at every entry of an archive.

    Raises:
        BadArchive: one of them would leave the folder, or is not as it should be. The text names it.
    """
    kinds: dict[str, str] = {}
    links: dict[str, str] = {}
    try:
        for entry in entries(archive):
            _check_entry(entry, kinds)
            kinds[entry.name] = entry.kind
            if entry.kind == LINK:
                links[entry.name] = entry.target
        _check_parents(kinds)
        _check_links(links)
    except BadArchive as refusal:
        raise BadArchive("%s %s" % (refusal, _LEAVE_OUT)) from None


def _check_entry(entry: Entry, before: dict[str, str]) -> None:
    if len(before) >= MOST_ENTRIES:
        raise BadArchive("%s is one entry too many: there may be %d." % (shown(entry.name), MOST_ENTRIES))
    if entry.name in before:
        raise BadArchive("%s is there twice." % shown(entry.name))
    problem = path_problem(entry.name)
    if problem is None and entry.kind == LINK:
        problem = link_problem(entry.name, entry.target)
    if problem:
        raise BadArchive("%s %s." % (shown(entry.name), problem))


def _check_parents(kinds: dict[str, str]) -> None:
    """Whatever an entry lies in must be a folder."""
    folders: set[str] = set()
    for name in kinds:
        parent = name.rpartition("/")[0]
        while parent and parent not in folders:
            kind = kinds.get(parent, FOLDER)
            if kind != FOLDER:
                raise BadArchive("%s lies in %s, which is a %s." % (shown(name), shown(parent), kind))
            if len(folders) >= MOST_ENTRIES:
                raise BadArchive("%s needs one folder too many: there may be %d." % (shown(name), MOST_ENTRIES))
            folders.add(parent)
            parent = parent.rpartition("/")[0]


def _check_links(links: dict[str, str]) -> None:
    for name in links:
        if _leads_out(name, links):
            raise BadArchive("%s leads out of the folder through another link." % shown(name))


def _leads_out(name: str, links: dict[str, str]) -> bool:
    """Whether a link leaves the folder on its way, with the other links of the archive followed as the kernel would."""
    place = name.split("/")[:-1]
    rest = links[name].split("/")[::-1]
    hops = 0
    while rest:
        part = rest.pop()
        if part == "..":
            if not place:
                return True
            place.pop()
        elif part not in ("", "."):
            place.append(part)
            target = links.get("/".join(place))
            if target is not None:
                hops += 1
                if hops > _MOST_HOPS:
                    return False
                place.pop()
                rest += target.split("/")[::-1]
    return False


# --------------------------------------------------------------------------------------------------- the changes --


class Target:
    """The folder. Keeps the place of the last entry open, as the next one is mostly beside it."""

    def __init__(self, folder: str) -> None:
        self._path = os.fsencode(folder)
        self._root = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
        self._parent: bytes | None = None
        self._open = -1

    def put(self, entry: Entry, source: int) -> None:
        """Writes one entry."""
        name = _encoded(entry.name)
        try:
            if entry.kind == FOLDER:
                self._enter(name)
            else:
                parent, _, base = name.rpartition(b"/")
                self._put(entry, source, self._enter(parent), base, name)
        except OSError as error:
            no_room = error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
            cure = _NO_ROOM if no_room else "Rename it or leave it out (.dstackignore)."
            raise BadArchive("%s cannot be written: %s. %s" % (shown(entry.name), error.strerror, cure)) from None

    def _put(self, entry: Entry, source: int, place: int, base: bytes, name: bytes) -> None:
        try:
            self._make(entry, source, place, base)
        except FileExistsError:
            self._remove(name)
            self._make(entry, source, place, base)

    def _make(self, entry: Entry, source: int, place: int, base: bytes) -> None:
        if entry.kind != FILE:
            os.symlink(_encoded(entry.target), base, dir_fd=place)
            return
        file = os.open(base, _NEW, 0o755 if entry.executable else 0o644, dir_fd=place)
        try:
            _copy(source, entry.offset, entry.size, file)
        finally:
            os.close(file)

    def delete(self, path: str) -> None:
        """Takes away what is there under this path, if anything, and the folders that are empty then."""
        name = _encoded(path)
        try:
            if self._enter(name.rpartition(b"/")[0], make=False) >= 0:
                self._remove(name)
                self._leave()
                self._remove_empty(name)
        except OSError as error:
            raise BadArchive("%s cannot be deleted: %s." % (shown(path), error.strerror)) from None

    def _remove_empty(self, name: bytes) -> None:
        parent = name.rpartition(b"/")[0]
        while parent:
            try:
                os.rmdir(os.path.join(self._path, parent))
            except OSError:
                return
            parent = parent.rpartition(b"/")[0]

    def _remove(self, name: bytes) -> None:
        """By its path: the folders that it lies in were entered before, so none of them is a link."""
        path = os.path.join(self._path, name)
        if os.path.isdir(path) and not os.path.islink(path):
            import shutil

            shutil.rmtree(path)
        elif os.path.lexists(path):
            os.unlink(path)

    def _enter(self, folder: bytes, make: bool = True) -> int:
        """The open folder of that path, made if need be; without `make` -1 if there is none."""
        if folder != self._parent:
            self._leave()
            place = os.dup(self._root)
            for part in folder.split(b"/") if folder else ():
                try:
                    inner = _enter_or_make(place, part) if make else _enter_if_there(place, part)
                finally:
                    os.close(place)
                if inner < 0:
                    return -1
                place = inner
            self._open, self._parent = place, folder
        return self._open

    def _leave(self) -> None:
        if self._open >= 0:
            os.close(self._open)
        self._open, self._parent = -1, None


def _enter_if_there(place: int, part: bytes) -> int:
    try:
        return os.open(part, _ENTER, dir_fd=place)
    except OSError as error:
        if error.errno in (*_NO_FOLDER, errno.ENOENT):
            return -1
        raise


def _enter_or_make(place: int, part: bytes) -> int:
    try:
        return os.open(part, _ENTER, dir_fd=place)
    except FileNotFoundError:
        pass
    except OSError as error:
        if error.errno not in _NO_FOLDER:
            raise
        # A file, or a link that must not be followed.
        os.unlink(part, dir_fd=place)
    os.mkdir(part, 0o755, dir_fd=place)
    return os.open(part, _ENTER, dir_fd=place)


def _copy(source: int, offset: int, size: int, file: int) -> None:
    end = offset + size
    while offset < end:
        data = os.pread(source, min(_PIECE, end - offset), offset)
        if not data:
            raise OSError(errno.EIO, "the archive is shorter than it was")
        offset += len(data)
        while data:
            data = data[os.write(file, data) :]


def _encoded(name: str) -> bytes:
    return name.encode("utf-8", "surrogateescape")
