"""What goes wrong: by a script, by chance, or for a while."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

from dstack_core.errors import Scope
from dstack_core.plugin import (
    AuthenticationError,
    BackendError,
    InvalidRequestError,
    NoCapacityError,
    QuotaExceededError,
    RateLimitedError,
    UnknownOutcomeError,
)

Hook = Literal["offers", "create", "get", "list", "terminate"]

Kind = Literal[
    "lost before",
    "lost after",
    "bug before",
    "bug after",
    "throttled",
    "no capacity",
    "quota",
    "unauthorized",
    "invalid",
    "ignored",
    "page lost",
    "mismatch",
    "late shortage",
]
"""What may happen to a call.

- `lost before`, `lost after`: the connection broke before, or after, the cloud did it: an `UnknownOutcomeError`
- `bug before`, `bug after`: the same, but what comes out is an exception that no backend may raise
- `throttled`, `no capacity`, `quota`, `unauthorized`, `invalid`: refused, and certainly not done
- `ignored`: the call succeeds, and nothing happens (`terminate` alone)
- `page lost`: the second page of a listing does not come (`list` alone)
- `mismatch`: refused, since the token was used with another request; only what was made before (`create` alone)
- `late shortage`: accepted, and given up for want of capacity before it runs; only what is new (`create` alone)
"""

_AFTERWARDS = ("lost after", "bug after", "ignored", "page lost", "mismatch", "late shortage")


@dataclass(frozen=True)
class Drought:
    """A time without capacity. A field that is `None` means all of them.

    Attributes:
        begin: from then on, in seconds on the cloud's clock.
        end: until then, likewise.
        instance_type: which machines are short.
        region: where.
        zone: where in that region.
        spot: only spot instances (`True`), or only others (`False`).
        scope: how far the cloud says that the shortage reaches.
    """

    begin: float = 0.0
    end: float = float("inf")
    instance_type: str | None = None
    region: str | None = None
    zone: str | None = None
    spot: bool | None = None
    scope: Scope = "zone"

    def covers(self, at: float, instance_type: str, region: str, zone: str | None, *, spot: bool) -> bool:
        """Whether an instance of that kind cannot be had then."""
        wanted = ((self.instance_type, instance_type), (self.region, region), (self.zone, zone), (self.spot, spot))
        return self.begin <= at < self.end and all(short is None or short == asked for short, asked in wanted)


@dataclass
class Faults:
    """What happens to the calls of a cloud.

    Attributes:
        seed: decides what is left to chance.
        chances: how likely a kind of fault is, for each call of a hook: `{("create", "lost after"): 0.1}`.
        droughts: times without capacity.
        quotas: how many instances may be alive in a region, by its name.
        struck: how often each fault happened, as `"create: lost after"`.
    """

    seed: int = 0
    chances: dict[tuple[Hook, Kind], float] = field(default_factory=dict)
    droughts: list[Drought] = field(default_factory=list)
    quotas: dict[str, int] = field(default_factory=dict)
    struck: Counter[str] = field(default_factory=Counter)

    def __post_init__(self) -> None:
        self._rng = random.Random(self.seed)  # noqa: S311  # reproducible on purpose
        self._scripted: dict[Hook, list[Kind | None]] = {}

    def script(self, hook: Hook, *kinds: Kind | None) -> None:
        """Says what happens to the next calls of a hook, one after the other; `None`: nothing."""
        self._scripted.setdefault(hook, []).extend(kinds)

    def heal(self) -> None:
        """Ends everything that is or was going to go wrong."""
        self.chances.clear()
        self.droughts.clear()
        self.quotas.clear()
        self._scripted.clear()

    def draw(self, hook: Hook) -> Kind | None:
        """What happens to this call."""
        scripted = self._scripted.get(hook)
        if scripted:
            return scripted.pop(0)
        for (where, kind), chance in self.chances.items():
            if where == hook and self._rng.random() < chance:
                return kind
        return None

    def before(self, hook: Hook, kind: Kind | None) -> None:
        """Raises what keeps a call from being carried out."""
        if kind is not None and kind not in _AFTERWARDS:
            self.struck[f"{hook}: {kind}"] += 1
            raise _error(kind, hook)

    def after(self, hook: Hook, kind: Kind | None) -> None:
        """Raises what keeps the answer from coming."""
        if kind in ("lost after", "bug after", "page lost"):
            self.struck[f"{hook}: {kind}"] += 1
            raise _error(kind, hook)


_REFUSALS: Mapping[str, type[BackendError]] = {
    "throttled": RateLimitedError,
    "no capacity": NoCapacityError,
    "quota": QuotaExceededError,
    "unauthorized": AuthenticationError,
    "invalid": InvalidRequestError,
}


def _error(kind: Kind, hook: Hook) -> Exception:
    said = f"simulated: {hook}: {kind}"
    if kind.startswith("bug"):
        return RuntimeError(said)
    return _REFUSALS.get(kind, UnknownOutcomeError)(said)
