"""Finding the cheapest fitting offers among very many, and saying what comes nearest when none fits.

A cloud sells about a thousand kinds of machines in a hundred places, so offers are grouped by what the machine
has. A match looks at each kind once, and at single offers only as far as somebody reads.
"""

from __future__ import annotations

import heapq
from bisect import bisect_right
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import chain, islice
from math import inf
from operator import attrgetter, itemgetter

from dstack_core._models.offers import Gpu, GpuRequirements, MachineResources, Offer, Requirements
from dstack_core._models.profiles import SpotPolicy
from dstack_core._models.resources import Range

__all__ = ["Explanation", "Matches", "OfferIndex", "Shortfall", "describe", "fitting_gpus", "merge_matches"]

_price = attrgetter("price")
_first = itemgetter(0)


class _Group:
    """The offers of one kind of machine, equal in spot and in whether they are worth trying, cheapest first."""

    __slots__ = ("_parts", "offers", "resources", "spot", "worth_trying")

    def __init__(self, spot: bool, worth_trying: bool, offers: list[Offer]) -> None:
        self.resources = offers[0].resources
        self.spot = spot
        self.worth_trying = worth_trying
        self.offers = offers
        self._parts: dict[str, dict[str | None, list[Offer]]] = {}

    def where(self, field: str, values: Sequence[str]) -> list[list[Offer]]:
        """The offers with one of these values in a field: a list for each value, cheapest first."""
        if field not in self._parts:
            self._parts[field] = _split(self.offers, field)
        parts = self._parts[field]
        return [parts[value] for value in dict.fromkeys(values) if value in parts]


def _split(offers: list[Offer], field: str) -> dict[str | None, list[Offer]]:
    parts: dict[str | None, list[Offer]] = {}
    for offer in offers:
        parts.setdefault(getattr(offer, field), []).append(offer)
    return parts


class Matches:
    """The offers that satisfy some requirements: cheapest first, those not worth trying after all the others.

    Can be iterated any number of times; lazy, so the first few cost little.
    """

    __slots__ = ("_available", "_unavailable")

    def __init__(self, available: Sequence[Sequence[Offer]], unavailable: Sequence[Sequence[Offer]]) -> None:
        self._available = available
        self._unavailable = unavailable

    @property
    def available(self) -> Iterator[Offer]:
        """Those worth trying, cheapest first."""
        return _cheapest_first(self._available)

    @property
    def unavailable(self) -> Iterator[Offer]:
        """Those that fit but cannot be had now, cheapest first."""
        return _cheapest_first(self._unavailable)

    @property
    def total(self) -> int:
        """How many there are, both kinds."""
        return sum(map(len, self._available)) + sum(map(len, self._unavailable))

    def first(self, count: int) -> list[Offer]:
        """At most that many, the best ones."""
        return list(islice(self, count))

    def __iter__(self) -> Iterator[Offer]:
        return chain(self.available, self.unavailable)


def _cheapest_first(lists: Sequence[Sequence[Offer]]) -> Iterator[Offer]:
    """Merges sorted lists lazily; like `heapq.merge`, but with thousands of short lists in mind."""
    heap = [(offers[0].price, number, 0) for number, offers in enumerate(lists)]
    heapq.heapify(heap)
    while heap:
        _, number, position = heap[0]
        offers = lists[number]
        yield offers[position]
        position += 1
        if position < len(offers):
            heapq.heapreplace(heap, (offers[position].price, number, position))
        else:
            heapq.heappop(heap)


def merge_matches(matches: Iterable[Matches]) -> Iterator[Offer]:
    """One stream out of several: cheapest first, those not worth trying last."""
    matches = list(matches)
    yield from heapq.merge(*(match.available for match in matches), key=_price)
    yield from heapq.merge(*(match.unavailable for match in matches), key=_price)


class OfferIndex:
    """An immutable collection of offers that answers `match` fast.

    Args:
        offers: in any order. Offers of one machine type should share their `resources` object.
    """

    __slots__ = ("_groups", "_size")

    def __init__(self, offers: Iterable[Offer] = ()) -> None:
        self._groups, self._size = _grouped(offers)

    def __len__(self) -> int:
        return self._size

    def __iter__(self) -> Iterator[Offer]:
        return chain.from_iterable(group.offers for group in self._groups)

    def match(self, requirements: Requirements) -> Matches:
        """The offers that satisfy the requirements."""
        fits = _machine_test(requirements)
        available: list[Sequence[Offer]] = []
        unavailable: list[Sequence[Offer]] = []
        for group in self._groups:
            if _spot_fits(requirements.spot_policy, group.spot) and fits(group.resources):
                (available if group.worth_trying else unavailable).extend(_narrowed(group, requirements))
        return Matches(available, unavailable)

    def explain(self, requirements: Requirements) -> Explanation:
        """Why nothing matches, and which offer comes nearest."""
        if not self._size:
            return Explanation(None, (), "it has no offers at all")
        nearest = self._nearest(requirements)
        shortfalls = (
            *_machine_shortfalls(requirements, nearest.resources),
            *_place_shortfalls(requirements, nearest),
        )
        return Explanation(nearest, shortfalls, self._sentence(requirements, shortfalls))

    def _nearest(self, requirements: Requirements) -> Offer:
        """The offer that fails in the fewest fields; among those the one that misses by least, then the cheapest."""
        misplaced = _misplaced(requirements)

        def rank(group: _Group) -> tuple[float, float, float, Offer]:
            shortfalls = _machine_shortfalls(requirements, group.resources)
            wrong, best = min(((misplaced(offer), offer) for offer in group.offers), key=_first)
            return len(shortfalls) + wrong, sum(shortfall.missing for shortfall in shortfalls), best.price, best

        return min(map(rank, self._groups), key=lambda ranked: ranked[:3])[-1]

    def _sentence(self, requirements: Requirements, shortfalls: Sequence[Shortfall]) -> str:
        if not shortfalls:
            return "it has offers that fit"
        return "; ".join(shortfall.sentence(self._best(requirements, shortfall.field)) for shortfall in shortfalls)

    def _best(self, requirements: Requirements, field: str) -> str | None:
        """The most that any machine has of something, when that is too little; else `None`."""
        if field not in _MOST:
            return None
        wanted, has = _MOST[field]
        best = max(has(group.resources) for group in self._groups)
        low = wanted(requirements)
        return None if low is None or best >= low else _amount(field, best)


@dataclass(frozen=True, slots=True)
class Shortfall:
    """One field of the requirements that an offer does not satisfy.

    `missing` is how far it is off, from 0 (nearly there) to 1.
    """

    field: str
    wanted: str
    has: str
    missing: float = 1.0

    def sentence(self, most: str | None) -> str:
        """For people. `most` is the largest amount that any machine of the backend has."""
        if most is not None:
            return f"asks for {self.wanted}, the largest machine has {most}"
        return f"asks for {self.wanted}, the nearest offer has {self.has}"


@dataclass(frozen=True, slots=True)
class Explanation:
    """Why no offer fits. `str()` is a sentence for people."""

    nearest: Offer | None
    shortfalls: tuple[Shortfall, ...]
    reason: str

    def __str__(self) -> str:
        if self.nearest is None:
            return self.reason
        return f"{self.reason}; nearest: {describe(self.nearest)}"


def describe(offer: Offer) -> str:
    """One line for people: `g5.xlarge in us-east-1 (4 CPUs, 16GB, 1xA10G 24GB) at $1.01/h`."""
    spot = ", spot" if offer.spot else ""
    place = offer.zone or offer.region
    return f"{offer.instance_type} in {place} ({_machine(offer.resources)}{spot}) at ${offer.price:g}/h"


# --------------------------------------------------------------------------------------------------------- grouping --


def _grouped(offers: Iterable[Offer]) -> tuple[list[_Group], int]:
    kinds: dict[MachineResources, int] = {}
    kind_of_object: dict[int, int] = {}
    found: dict[tuple[int, bool, bool], list[Offer]] = {}
    size = 0
    for size, offer in enumerate(offers, 1):  # noqa: B007  # the last number is the size
        kind = kind_of_object.get(id(offer.resources))
        if kind is None:
            kind = kind_of_object[id(offer.resources)] = kinds.setdefault(offer.resources, len(kinds))
        key = (kind, offer.spot, offer.availability.worth_trying)
        group = found.get(key)
        if group is None:
            group = found[key] = []
        group.append(offer)
    for group in found.values():
        group.sort(key=_price)
    return [_Group(spot, worth_trying, group) for (_, spot, worth_trying), group in found.items()], size


# --------------------------------------------------------------------------------------------------------- matching --


def _machine_test(requirements: Requirements) -> Callable[[MachineResources], bool]:
    cpus, memory, disk, arch = requirements.cpus, requirements.memory_mib, requirements.disk_mib, requirements.arch
    gpu = requirements.gpu

    def fits(machine: MachineResources) -> bool:
        return (
            machine.cpus in cpus
            and machine.memory_mib in memory
            and machine.disk_mib in disk
            and (arch is None or machine.arch == arch)
            and (gpu is None or _gpus_fit(gpu, machine.gpus))
        )

    return fits


def _gpus_fit(wanted: GpuRequirements, gpus: Sequence[Gpu]) -> bool:
    fitting = fitting_gpus(wanted, gpus)
    if len(fitting) not in wanted.count:
        return False
    if not fitting or wanted.total_memory_mib is None:
        return True
    return sum(gpu.memory_mib for gpu in fitting) in wanted.total_memory_mib


def fitting_gpus(wanted: GpuRequirements, gpus: Sequence[Gpu]) -> list[Gpu]:
    """Those of a machine's GPUs that are of a wanted kind, whatever their number."""
    names = frozenset(name.upper() for name in wanted.names)
    return [gpu for gpu in gpus if _gpu_fits(wanted, names, gpu)]


def _gpu_fits(wanted: GpuRequirements, names: frozenset[str], gpu: Gpu) -> bool:
    if wanted.vendor is not None and gpu.vendor.lower() != wanted.vendor.lower():
        return False
    if names and gpu.name.upper() not in names:
        return False
    if wanted.memory_mib is not None and gpu.memory_mib not in wanted.memory_mib:
        return False
    least = wanted.compute_capability
    return least is None or (gpu.compute_capability is not None and gpu.compute_capability >= least)


def _spot_fits(policy: SpotPolicy, spot: bool) -> bool:
    return policy is SpotPolicy.AUTO or spot == (policy is SpotPolicy.SPOT)


def _narrowed(group: _Group, requirements: Requirements) -> list[list[Offer]]:
    """Those of one kind of machine that are cheap enough and in the right place, in sorted lists."""
    regions, zones, types = requirements.regions, requirements.zones, requirements.instance_types
    if zones:
        lists = group.where("zone", zones)
    elif regions:
        lists = group.where("region", regions)
    else:
        lists = group.where("instance_type", types) if types else [group.offers]
    if zones and regions:
        lists = [[offer for offer in offers if offer.region in regions] for offers in lists]
    if types and (zones or regions):
        lists = [[offer for offer in offers if offer.instance_type in types] for offers in lists]
    return [cheap for offers in lists if (cheap := _up_to(requirements.max_price, offers))]


def _up_to(limit: float | None, offers: list[Offer]) -> list[Offer]:
    if limit is None or not offers or offers[-1].price <= limit:
        return offers
    return offers[: bisect_right(offers, limit, key=_price)]


# ------------------------------------------------------------------------------------------------------- explaining --


def _machine_shortfalls(requirements: Requirements, machine: MachineResources) -> tuple[Shortfall, ...]:
    found = [
        *_out_of("cpus", requirements.cpus, machine.cpus),
        *_out_of("memory", requirements.memory_mib, machine.memory_mib),
        *_out_of("disk", requirements.disk_mib, machine.disk_mib),
    ]
    if requirements.arch not in (None, machine.arch):
        found.append(Shortfall("arch", f"{requirements.arch} CPUs", machine.arch))
    if requirements.gpu is not None and not _gpus_fit(requirements.gpu, machine.gpus):
        found.append(_gpu_shortfall(requirements.gpu, machine.gpus))
    return tuple(found)


def _out_of(field: str, wanted: Range[int], has: float) -> Iterator[Shortfall]:
    if has in wanted:
        return
    limit = wanted.min if wanted.min is not None and has < wanted.min else wanted.max
    far = 1.0 if limit is None else abs(has - limit) / max(has, limit)
    least = "at most " if limit is not None and has > limit else ""
    yield Shortfall(field, least + _amount(field, limit or 0), _amount(field, has), far)


def _gpu_shortfall(wanted: GpuRequirements, gpus: Sequence[Gpu]) -> Shortfall:
    """GPUs of the wanted kind but in another number are nearer than other GPUs, and those nearer than none."""
    fitting = fitting_gpus(wanted, gpus)
    missing = 0.5 if fitting else 0.8 if gpus else 1.0
    return Shortfall("gpu", _wanted_gpus(wanted), _gpu_names(gpus) or "no GPU", missing)


def _place_shortfalls(requirements: Requirements, offer: Offer) -> tuple[Shortfall, ...]:
    found = []
    if not _spot_fits(requirements.spot_policy, offer.spot):
        found.append(Shortfall("spot_policy", requirements.spot_policy.value, "spot" if offer.spot else "on-demand"))
    if requirements.max_price is not None and offer.price > requirements.max_price:
        far = 1 - requirements.max_price / offer.price
        found.append(Shortfall("max_price", f"at most ${requirements.max_price:g}/h", f"${offer.price:g}/h", far))
    for field, wanted, has in (
        ("regions", requirements.regions, offer.region),
        ("zones", requirements.zones, offer.zone),
        ("instance_types", requirements.instance_types, offer.instance_type),
    ):
        if wanted and has not in wanted:
            found.append(Shortfall(field, f"{field.replace('_', ' ')} {', '.join(wanted)}", str(has)))
    return tuple(found)


def _misplaced(requirements: Requirements) -> Callable[[Offer], int]:
    """How many of the fields fail that differ between the offers of one kind of machine."""
    regions, zones, types = requirements.regions, requirements.zones, requirements.instance_types
    limit = inf if requirements.max_price is None else requirements.max_price
    policy = requirements.spot_policy
    return lambda offer: (
        (offer.price > limit)
        + (not _spot_fits(policy, offer.spot))
        + (bool(regions) and offer.region not in regions)
        + (bool(zones) and offer.zone not in zones)
        + (bool(types) and offer.instance_type not in types)
    )


_MOST: dict[str, tuple[Callable[[Requirements], float | None], Callable[[MachineResources], float]]] = {
    "cpus": (lambda wanted: wanted.cpus.min, lambda machine: machine.cpus),
    "memory": (lambda wanted: wanted.memory_mib.min, lambda machine: machine.memory_mib),
    "disk": (lambda wanted: wanted.disk_mib.min, lambda machine: machine.disk_mib),
}


def _amount(field: str, value: float) -> str:
    return f"{value:g} CPUs" if field == "cpus" else f"{_gb(value)} {field}"


def _gb(mib: float) -> str:
    if mib >= 1 << 20:
        return f"{round(mib / (1 << 20), 2):g}TB"
    return f"{round(mib / 1024, 1):g}GB" if mib >= 1024 else f"{mib:g}MB"


def _machine(machine: MachineResources) -> str:
    gpus = _gpu_names(machine.gpus)
    return f"{machine.cpus:g} CPUs, {_gb(machine.memory_mib)}{', ' + gpus if gpus else ''}"


def _gpu_names(gpus: Sequence[Gpu]) -> str:
    return ", ".join(f"{gpus.count(gpu)}x{gpu.name} {_gb(gpu.memory_mib)}" for gpu in dict.fromkeys(gpus))


def _wanted_gpus(wanted: GpuRequirements) -> str:
    kind = " or ".join(wanted.names) or (f"{wanted.vendor} GPU" if wanted.vendor else "GPU")
    parts = [f"{_span(wanted.count)} x {kind}" if wanted.count != Range(min=1) else kind]
    if wanted.memory_mib is not None:
        parts.append(f"{_span(wanted.memory_mib, _gb)} each")
    if wanted.total_memory_mib is not None:
        parts.append(f"{_span(wanted.total_memory_mib, _gb)} in total")
    if wanted.compute_capability is not None:
        parts.append("compute capability {}.{}".format(*wanted.compute_capability))
    return ", ".join(parts)


def _span(span: Range[int], text: Callable[[float], str] = str) -> str:
    # A single value is a minimum, and is shown as users write it.
    if span.min is not None and span.max in (None, span.min):
        return text(span.min)
    low = "" if span.min is None else text(span.min)
    return f"{low}..{'' if span.max is None else text(span.max)}"
