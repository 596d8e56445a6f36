"""What a cloud under test can do. `BackendSuite` asks for each ability, and leaves out the cases that need another one.

Only `Cloud` is required. An ability is had by having its methods: there is nothing to declare or to inherit.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from enum import Enum
from typing import Any, Literal, Protocol, runtime_checkable
from uuid import UUID

from dstack_core.plugin import Offer

__all__ = [
    "Account",
    "Booting",
    "Catalogued",
    "Cloud",
    "Counting",
    "Event",
    "Eventful",
    "Failure",
    "Fault",
    "Faulty",
    "Lagging",
    "Server",
    "Stocked",
    "Truth",
    "Truthful",
    "Unmarking",
]


class Fault(str, Enum):
    """What can go wrong with a call of the cloud's API.

    `NO_CAPACITY`, `QUOTA` and `INVALID` befall only calls that make a server; the others befall whatever is called.

    Attributes:
        THROTTLE: too many requests; nothing happened.
        NO_CAPACITY: none of these servers can be had now.
        QUOTA: the account may not have more of them.
        UNAUTHORIZED: the credentials are wrong.
        FORBIDDEN: the credentials lack a permission.
        INVALID: the request as such is refused.
        SERVER_ERROR: the cloud's own failure, as HTTP 500 to 504.
        DROP: the connection breaks instead of an answer.
        HANG: no answer comes before `heal`.
    """

    THROTTLE = "throttle"
    NO_CAPACITY = "no capacity"
    QUOTA = "quota"
    UNAUTHORIZED = "unauthorized"
    FORBIDDEN = "forbidden"
    INVALID = "invalid"
    SERVER_ERROR = "server error"
    DROP = "drop"
    HANG = "hang"


class Event(str, Enum):
    """What can happen to a server without anybody asking the backend.

    Attributes:
        STOPPED: switched off or deallocated, and still billed.
        SPOT_INTERRUPTION: taken away by the cloud.
        SHUTDOWN_FROM_INSIDE: its own system shut down, which ended it.
        FAILURE: it broke, and is gone.
    """

    STOPPED = "stopped"
    SPOT_INTERRUPTION = "spot interruption"
    SHUTDOWN_FROM_INSIDE = "shutdown from inside"
    FAILURE = "failure"


@dataclass(frozen=True)
class Failure:
    """What the cloud will say when a fault befalls a call. What is left out is not checked.

    Attributes:
        words: part of the cloud's own message.
        scope: how far a shortage or quota reaches, as the cloud says.
        retry_after: seconds to wait, as the cloud says.
    """

    words: str = ""
    scope: Literal["zone", "region", "type", "account"] | None = None
    retry_after: float | None = None


@dataclass(frozen=True)
class Server:
    """One server that exists in the cloud, as the cloud itself knows it.

    Attributes:
        id: the cloud's own id.
        name: its name.
        region: where it is.
        labels: the tags that it has now; `None` if there are no tags in this cloud.
        intent: the intent that is written on it, in a tag or in its name; `None` without one.
        owner: the owner that is written on it, likewise.
        billed: whether it costs money now.
        born_with: the tags that were part of the call that made it; `None` if the cloud cannot tell.
    """

    id: str
    name: str
    region: str
    labels: Mapping[str, str] | None = None
    intent: UUID | None = None
    owner: UUID | None = None
    billed: bool = True
    born_with: Mapping[str, str] | None = None


@dataclass(frozen=True)
class Truth:
    """What exists in the cloud right now, without any lag.

    Attributes:
        servers: all servers, ended ones included for as long as the cloud shows them.
        leftovers: disks, addresses and the like whose server is gone, each in a few words.
    """

    servers: Sequence[Server] = ()
    leftovers: Sequence[str] = ()


@runtime_checkable
class Cloud(Protocol):
    """The least: something that the backend can be configured for."""

    def config(self) -> dict[str, Any]:
        """The backend's entry under `backends:`, without `type`. Plain values, as in a file."""
        ...


@runtime_checkable
class Truthful(Protocol):
    """The cloud tells what exists in it."""

    def truth(self) -> Truth:
        """What exists right now."""
        ...


@runtime_checkable
class Catalogued(Protocol):
    """The cloud tells what it sells."""

    def catalogue(self) -> Sequence[Offer]:
        """Everything, as the backend has to offer it: in MiB and USD per hour, with availability; `data` is free."""
        ...


@runtime_checkable
class Faulty(Protocol):
    """Calls of the cloud's API can be made to fail."""

    def fail(self, kind: Fault, times: int = 1, *, after: bool = False, skip: int = 0) -> Failure:
        """Makes the next calls fail, whoever makes them. Replaces what was left of an earlier order.

        Args:
            kind: how.
            times: how many calls.
            after: what the call asks for is done first, and only the answer is lost. Befalls only calls that change
                something; has a meaning for `SERVER_ERROR`, `DROP` and `HANG`.
            skip: so many of the calls that it could befall go well first.

        Returns:
            What the cloud will say.
        """
        ...

    def heal(self) -> None:
        """Takes back what is left; calls that hang are answered."""
        ...


@runtime_checkable
class Lagging(Protocol):
    """Listings can be made to lag behind."""

    def lag(self, seconds: float) -> None:
        """From now on, servers are missing in listings while they are younger than this."""
        ...


@runtime_checkable
class Stocked(Protocol):
    """There can be servers that the backend did not make."""

    def stock(self, count: int) -> None:
        """Makes servers of other people, in all regions: some by hand, without our tags, some of another owner."""
        ...


@runtime_checkable
class Booting(Protocol):
    """How long machines take to boot can be set."""

    def boot(self, seconds: float) -> None:
        """From now on, a server is pending for so long after it was accepted, those that are pending now included."""
        ...


@runtime_checkable
class Eventful(Protocol):
    """Something can happen to a server."""

    def befall(self, server: str, event: Event) -> None:
        """Makes it happen to the server with this id, at once."""
        ...


@runtime_checkable
class Unmarking(Protocol):
    """Somebody can take the tags off a server."""

    def unmark(self, server: str) -> None:
        """Removes all tags, labels or whatever they are called, from the server with this id, at once."""
        ...


@runtime_checkable
class Counting(Protocol):
    """The cloud counts the calls of its API."""

    def calls(self) -> int:
        """How many it got so far."""
        ...


@dataclass(frozen=True)
class Account:
    """An account of a real cloud, or this computer: configured, and nothing more is known of it.

    Attributes:
        values: the backend's entry under `backends:`, without `type`.
    """

    values: Mapping[str, Any] = field(default_factory=dict)

    def config(self) -> dict[str, Any]:
        """The entry."""
        return dict(self.values)


for _public in __all__:
    globals()[_public].__module__ = "dstack_core.testing"
