"""From the path of a request to a service, and from the answers of a replica back to paths of ours. No I/O.

Paths are bytes as the client sent them. Only the names of project and run are looked at, and these are plain: whatever
is encoded, or climbs with `..`, is either no name or part of what the replica gets, and reaches no other service.
"""

from __future__ import annotations

import re
from typing import NamedTuple

SERVICES = b"/services/"
MODELS = b"/models/"

_SERVICE = re.compile(rb"/services/([A-Za-z0-9_-]+)/([A-Za-z0-9_-]+)(/.*)?", re.DOTALL)
_MODEL = re.compile(rb"/models/([A-Za-z0-9_-]+)/(?:v1/)?(.*)", re.DOTALL)
_COOKIE_PATH = re.compile(rb"(;\s*path\s*=\s*)(/[^;]*)", re.IGNORECASE)


class Target(NamedTuple):
    """Where a request wants to go.

    Attributes:
        project: name of the project.
        name: name of the run.
        prefix: what stands before the replica's own path: `/services/PROJECT/RUN`.
        rest: the replica's own path, with its query; `None` if not even its first slash is there.
    """

    project: str
    name: str
    prefix: bytes
    rest: bytes | None


def service_target(path: bytes, query: bytes) -> Target | None:
    """Reads `/services/PROJECT/RUN/…`; `None` if it is not of that form."""
    found = _SERVICE.fullmatch(path)
    if found is None:
        return None
    project, name, rest = found.groups()
    if rest is not None and query:
        rest = b"%b?%b" % (rest, query)
    return Target(project.decode(), name.decode(), path[: found.end(2)], rest)


def model_target(path: bytes) -> tuple[str, bytes] | None:
    """Reads `/models/PROJECT/…`: the project, and what comes after it without a leading `v1/`."""
    found = _MODEL.fullmatch(path)
    return None if found is None else (found[1].decode(), found[2])


class Rewriting(NamedTuple):
    """How paths in an answer get back the prefix that the replica never saw.

    Attributes:
        prefix: as `/services/main/web`.
        host: as the replica was called in the request; an address with it means the replica itself.
    """

    prefix: bytes
    host: bytes

    def location(self, value: bytes) -> bytes:
        """The address of a redirect. What leads elsewhere, or is relative, stays."""
        scheme, authority, path = _split(value)
        if (authority and authority.lower() != self.host.lower()) or not path.startswith(b"/"):
            return value
        return scheme + authority + self._prefixed(path)

    def cookie(self, value: bytes) -> bytes:
        """A cookie: its path. One whose name says that its path is `/` stays, or the browser would not take it."""
        if value.lower().startswith(b"__host-"):
            return value
        return _COOKIE_PATH.sub(lambda found: found[1] + self._prefixed(found[2]), value)

    def _prefixed(self, path: bytes) -> bytes:
        has_it = path.startswith(self.prefix) and path[len(self.prefix) : len(self.prefix) + 1] in b"/?#"
        return path if has_it else self.prefix + path


def _split(address: bytes) -> tuple[bytes, bytes, bytes]:
    """Scheme with slashes, authority and the rest of an address; both empty for one that is a path."""
    found = re.match(rb"((?:https?:)?//)([^/?#]*)(.*)", address, re.IGNORECASE | re.DOTALL)
    if found is None:
        return b"", b"", address
    return found[1], found[2], found[3] or b"/"
