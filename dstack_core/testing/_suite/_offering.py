"""Cases about offers: what a user is shown, and what the engine ranks and buys."""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Callable, Iterable
from typing import Any

import pytest

from dstack_core.plugin import (
    Availability,
    GpuRequirements,
    MachineResources,
    Offer,
    Range,
    Requirements,
    SpotPolicy,
    fitting_gpus,
)
from dstack_core.testing._suite._base import Base
from dstack_core.testing._suite._calls import together
from dstack_core.testing._suite._messages import expect
from dstack_core.testing._suite._needs import CATALOGUE, TO_ORDER, TRUTH, needs
from dstack_core.testing._suite._rig import Rig

_VENDORS = ("nvidia", "amd", "google", "intel", "tenstorrent")
_GIB = 1024
_MEMORY_PER_CPU = (128, 256 * _GIB)
_LARGEST_DISK = 1 << 30
_GPU_MEMORY = (1 * _GIB, 2048 * _GIB)
_PER_CPU_HOUR = (0.0005, 2.0)
_DEAREST = 2000.0

Key = tuple[str, str, str | None, bool]


def _key(offer: Offer) -> Key:
    return offer.instance_type, offer.region, offer.zone, offer.spot


def _named(offers: Iterable[Any], limit: int = 5) -> str:
    """A few of them, in words."""
    few = [f"{one.instance_type} in {one.zone or one.region}{' (spot)' if one.spot else ''}" for one in offers]
    return ", ".join(few[:limit]) + (f" and {len(few) - limit} more" if len(few) > limit else "")


class OfferCases(Base):
    """Offers are complete, in the right units, and say what cannot be had."""

    def test_there_is_something_to_buy(self, rig: Rig) -> None:
        """Is at least one offer worth trying, when anything will do?"""
        expect(
            rig.offers, "offers-any", "nothing is offered", expected="an offer", got="none", cure="offer what is sold"
        )

    def test_offers_name_their_backend(self, rig: Rig) -> None:
        """Has each offer the registered name in `backend`?"""
        wrong = [offer for offer in _all(rig) if offer.backend != rig.name]
        expect(
            not wrong,
            "offer-backend",
            "offers have the name of another backend",
            expected=repr(rig.name),
            got=Counter(offer.backend for offer in wrong),
            cure=f"write Offer(backend={rig.name!r}, …)",
        )

    def test_memory_is_in_mib(self, rig: Rig) -> None:
        """Can each machine's memory be MiB, and is it no GB, KB or bytes?"""
        low, high = _MEMORY_PER_CPU
        wrong = [
            f"{offer.instance_type}: {offer.resources.memory_mib} MiB for {offer.resources.cpus:g} CPUs"
            for offer in _all(rig)
            if not _whole(offer.resources.memory_mib)
            or not low <= offer.resources.memory_mib / max(offer.resources.cpus, 0.25) <= high
        ]
        expect(
            not wrong,
            "machine-memory",
            "memory that cannot be MiB",
            expected="a whole number of MiB, from 128 MiB to 256 GiB for each CPU",
            got=_few(wrong),
            cure="convert: 1 GiB is 1024 MiB, 1 GB is 953.67 MiB, and an SDK's own unit is in its documentation",
        )

    def test_disk_is_in_mib(self, rig: Rig) -> None:
        """Can each machine's disk be MiB, and is it no GB or bytes?"""
        wrong = [
            f"{offer.instance_type}: {offer.resources.disk_mib} MiB"
            for offer in _all(rig)
            if not _whole(offer.resources.disk_mib) or not (_disk_is_sane(offer.resources.disk_mib))
        ]
        expect(
            not wrong,
            "machine-disk",
            "a disk that cannot be in MiB",
            expected="a whole number of MiB, 0 or from 1 GiB to 1 PiB",
            got=_few(wrong),
            cure="convert: 100 GB is about 95,367 MiB, 100 GiB is 102,400 MiB",
        )

    def test_gpu_memory_is_in_mib(self, rig: Rig) -> None:
        """Can the memory of each GPU be MiB?"""
        low, high = _GPU_MEMORY
        wrong = [f"{gpu.name}: {gpu.memory_mib} MiB" for gpu in _gpus(rig) if not low <= gpu.memory_mib <= high]
        expect(
            not wrong,
            "gpu-memory",
            "GPU memory that cannot be MiB",
            expected="from 1 GiB to 2 TiB for one GPU",
            got=_few(wrong),
            cure="give the memory of one GPU, not of all together, in MiB",
        )

    def test_gpus_are_named_as_users_write_them(self, rig: Rig) -> None:
        """Are GPU names upper-case, without vendor, memory and spaces?"""
        wrong = {gpu.name for gpu in _gpus(rig) if not _is_gpu_name(gpu.name)}
        expect(
            not wrong,
            "gpu-name",
            "GPU names that nobody will ask for",
            expected="A100, L4, RTX4090, MI300X, V5E …",
            got=", ".join(sorted(wrong)),
            cure='take the model out of the cloud\'s name: "NVIDIA A100 80GB" is A100',
        )

    def test_vendors_and_architectures_are_known(self, rig: Rig) -> None:
        """Is each GPU of a known vendor, each machine x86 or arm, and the compute capability a pair, if any?"""
        gpus, machines = _gpus(rig), [offer.resources for offer in _all(rig)]
        wrong = {f"vendor {gpu.vendor!r}" for gpu in gpus if gpu.vendor not in _VENDORS}
        wrong |= {f"arch {machine.arch!r}" for machine in machines if machine.arch not in ("x86", "arm")}
        wrong |= {
            f"capability {gpu.compute_capability!r}" for gpu in gpus if not _is_capability(gpu.compute_capability)
        }
        expect(
            not wrong,
            "gpu-vendor",
            "a vendor, architecture or compute capability that no requirement can ask for",
            expected=f"{', '.join(_VENDORS)}; x86 or arm; (8, 0) or None",
            got=_few(sorted(wrong)),
            cure="translate the cloud's words: x86_64 and amd64 are x86, arm64 and aarch64 are arm",
        )

    def test_resources_are_complete(self, rig: Rig) -> None:
        """Has each machine a CPU, memory, and a tuple of GPUs?"""
        wrong = [offer for offer in _all(rig) if not _is_complete(offer.resources)]
        expect(
            not wrong,
            "machine",
            "machines that lack something",
            expected="cpus > 0, memory_mib > 0, and one Gpu for each GPU in a tuple",
            got=_named(wrong),
            cure="fill in MachineResources; a list of GPUs becomes a tuple",
        )

    def test_prices_are_numbers(self, rig: Rig) -> None:
        """Is each price a finite number of 0 or more?"""
        wrong = [f"{offer.instance_type}: {offer.price!r}" for offer in _all(rig) if not _is_price(offer.price)]
        expect(
            not wrong,
            "offer-price",
            "prices that are none",
            expected="a float of 0.0 or more",
            got=_few(wrong),
            cure="convert text and Decimal; leave out what has no price",
        )

    def test_prices_are_usd_per_hour(self, rig: Rig) -> None:
        """Can the prices be USD per hour, and are they no cents and not per minute or month?"""
        wrong = [f"{offer.instance_type}: ${offer.price:g}" for offer in _all(rig) if not _price_is_sane(offer)]
        low, high = _PER_CPU_HOUR
        expect(
            not wrong,
            "offer-price",
            "prices that cannot be USD per hour",
            expected=f"0, or from ${low} to ${high:g} for each CPU of a machine without GPUs; at most ${_DEAREST:g}",
            got=_few(wrong),
            cure="convert: cents / 100, per second * 3600, per minute * 60, per month / 730",
        )

    def test_nothing_is_offered_twice(self, rig: Rig) -> None:
        """Is each combination of type, region, zone and spot there once?"""
        counted = Counter((_key(offer), offer.resources) for offer in _all(rig))
        twice = [f"{key[0]} in {key[2] or key[1]}: {count} times" for (key, _), count in counted.items() if count > 1]
        expect(
            not twice,
            "offer-one",
            "the same thing is offered more than once",
            expected="one offer for each type, region, zone and way of buying",
            got=_few(twice),
            cure="look for pages that overlap, and for catalogues that list a type once for each of its features",
        )

    def test_a_zone_is_in_one_region(self, rig: Rig) -> None:
        """Do the offers agree about where a zone is, and is the region always named?"""
        regions: dict[str, set[str]] = {}
        for offer in _all(rig):
            regions.setdefault(offer.zone or offer.region, set()).add(offer.region)
        wrong = {zone: found for zone, found in regions.items() if len(found) > 1 or not all(found)}
        expect(
            not wrong,
            "offer-zone",
            "zones that are in several regions, or in none",
            expected="the cloud's own name of the region in `region`, and of the zone in `zone`",
            got=wrong,
            cure="do not put the zone's name into `region`",
        )

    def test_spot_is_not_dearer(self, rig: Rig) -> None:
        """Costs the same machine in the same place no more as spot than on demand?"""
        full = {_key(offer)[:3]: offer.price for offer in _all(rig) if not offer.spot}
        wrong = [offer for offer in _all(rig) if offer.spot and offer.price > full.get(_key(offer)[:3], math.inf)]
        expect(
            not wrong,
            "offer-spot",
            "spot offers that cost more than the same machine on demand",
            expected="a price of at most that of the offer that is not interrupted",
            got=_named(wrong),
            cure="look whether `spot` is the wrong way round, or its price that of another type",
        )

    def test_what_cannot_be_had_says_why(self, rig: Rig) -> None:
        """Has each offer that is not worth trying a reason, and no other one?"""
        wrong = [
            f"{offer.instance_type}: {offer.availability.value}, reason {offer.reason!r}"
            for offer in _all(rig)
            if bool(offer.reason) is offer.availability.worth_trying
        ]
        expect(
            not wrong,
            "offer-reason",
            "reasons that are missing, or that belong to an offer that can be had",
            expected="words for a person with NO_CAPACITY and NO_QUOTA, None with AVAILABLE and UNKNOWN",
            got=_few(wrong),
            cure="keep the cloud's own words in `reason`",
        )

    def test_offers_can_be_kept(self, rig: Rig) -> None:
        """Can offers be hashed, and written down in a request and read again?"""
        for offer in _all(rig)[:50]:
            hash(offer.resources)
            request = rig.request(offer)
            again = type(request).model_validate_json(request.model_dump_json()).offer
            expect(
                again == offer and again.data == offer.data,
                "machine-shared",
                "an offer does not survive being written down",
                expected=offer,
                got=again,
                cure="use the documented types: float, int, str, tuple of Gpu; put JSON text into `data`",
            )

    @needs(TO_ORDER)
    def test_asking_again_gives_the_same(self, rig: Rig) -> None:
        """Are two listings, one after the other, from two objects, the same in type, place and price?"""
        first, second = (
            {(_key(one), one.price) for one in backend.offers(Requirements())}
            for backend in (rig.backend, rig.another())
        )
        expect(
            len(first ^ second) <= len(first) // 10,
            "offers-any",
            "two listings differ in more than a tenth",
            expected=f"{len(first)} offers again",
            got=f"{len(first ^ second)} differences",
            cure="do not cut a listing off, and read all pages",
        )

    def test_eight_may_ask_at_once(self, rig: Rig) -> None:
        """Do eight threads that ask one object get the same offers as one?"""
        alone = Counter(map(_key, _all(rig)))
        answers = [outcome.get() for outcome in together([lambda: rig.backend.offers(Requirements())] * 8)]
        wrong = [len(answer) for answer in answers if Counter(map(_key, answer)) != alone]
        expect(
            not wrong,
            "threads",
            "dstack_list_offers: threads that ask at once get other offers",
            expected=f"{sum(alone.values())} offers each",
            got=wrong,
            cure="keep nothing of one call in the object, or guard it with a lock",
        )

    @needs(TRUTH)
    def test_listing_makes_nothing(self, rig: Rig) -> None:
        """Is nothing made by asking for offers?"""
        rig.backend.offers(Requirements())
        made = rig.new_servers()
        expect(
            not made,
            "offers-read",
            "asking for offers made something",
            expected="no new server",
            got=[one.name for one in made],
            cure="a dry run of a creation must be one",
        )

    def test_the_impossible_is_no_error(self, rig: Rig) -> None:
        """Is the answer to what nobody sells a list, and not an error?"""
        rig.backend.offers(Requirements(cpus=Range(min=100_000), memory_mib=Range(min=900_000_000)))
        rig.backend.offers(Requirements(gpu=GpuRequirements(names=("NO-SUCH-GPU",), count=Range(min=999))))
        rig.backend.offers(Requirements(instance_types=("no-such-type",), max_price=0.0, zones=("no-such-zone",)))

    # -- compared with the catalogue --------------------------------------------------------------------------------

    @needs(CATALOGUE)
    def test_everything_that_is_sold_is_offered(self, rig: Rig) -> None:
        """Is each type in each place and each way of buying in the listing, when anything will do?"""
        sold, offered = _sold(rig), set(map(_key, _all(rig)))
        missing = [offer for key, offer in sold.items() if key not in offered]
        expect(
            not missing,
            "offers-any",
            "something that the cloud sells is not offered",
            expected=f"{len(sold)} offers",
            got=f"{len(offered)}, without {_named(missing)}",
            cure="offer every zone and both ways of buying, and what cannot be had now as well, marked so",
        )

    @needs(CATALOGUE)
    def test_what_is_sold_out_is_shown(self, rig: Rig) -> None:
        """Is what cannot be had now offered nevertheless, and marked?"""
        offered = {_key(offer): offer for offer in _all(rig)}
        sold_out = [offer for offer in _sold(rig).values() if not offer.availability.worth_trying]
        wrong = [one for one in sold_out if _key(one) not in offered or offered[_key(one)].availability.worth_trying]
        expect(
            not wrong,
            "offers-unavailable",
            "what is sold out is hidden, or offered as if it could be had",
            expected="the offer with NO_CAPACITY or NO_QUOTA and a reason",
            got=_named(wrong),
            cure="keep it in the list: a user whose run fits nothing else has to be told",
        )

    @needs(CATALOGUE)
    def test_nothing_is_offered_that_is_not_sold(self, rig: Rig) -> None:
        """Is each offer something that the cloud sells?"""
        sold = _sold(rig)
        wrong = [offer for offer in _all(rig) if _key(offer) not in sold]
        expect(
            not wrong,
            "offers",
            "offers of what the cloud does not sell",
            expected="types, places and ways of buying that are in the catalogue",
            got=_named(wrong),
            cure="combine types with the places where they are sold, not with all places",
        )

    @needs(CATALOGUE)
    def test_prices_are_those_of_the_cloud(self, rig: Rig) -> None:
        """Is each price what the cloud takes for an hour, in USD?"""
        self._compare(rig, "price", "offer-price", lambda a, b: math.isclose(a, b, rel_tol=0.001))

    @needs(CATALOGUE)
    def test_machines_are_those_of_the_cloud(self, rig: Rig) -> None:
        """Has each machine the CPUs, memory, disk, architecture and GPUs that the cloud says, in MiB?"""
        self._compare(rig, "resources", "machine", lambda a, b: a == b)

    @needs(CATALOGUE)
    def test_availability_is_that_of_the_cloud(self, rig: Rig) -> None:
        """Is worth trying what the cloud says that it has?"""
        self._compare(rig, "availability", "offers-unavailable", _as_available)

    def _compare(self, rig: Rig, field: str, clause: str, same: Callable[[Any, Any], bool]) -> None:
        __tracebackhide__ = True
        sold = _sold(rig)
        pairs = [(offer, sold[_key(offer)]) for offer in _all(rig) if _key(offer) in sold]
        wrong = [(had, should) for had, should in pairs if not same(getattr(had, field), getattr(should, field))]
        had, should = wrong[0] if wrong else (None, None)
        expect(
            not wrong,
            clause,
            f"{len(wrong)} offers have another {field} than the cloud says, first {_named([had] if had else [])}",
            expected=getattr(should, field, None),
            got=getattr(had, field, None),
            cure="look at the units, and which column of the catalogue is read",
        )

    # -- filters ----------------------------------------------------------------------------------------------------

    @needs(TO_ORDER)
    @pytest.mark.parametrize("wanted", ["cpus", "memory", "disk", "exact size", "arch", "unset sizes"])
    def test_sizes_hide_nothing_that_fits(self, rig: Rig, wanted: str) -> None:
        """Is everything that fits still offered, when something is asked for?"""
        self._hides_nothing(rig, wanted)

    @needs(TO_ORDER)
    @pytest.mark.parametrize(
        "wanted", ["any gpu", "gpu name", "gpu memory", "gpu count", "gpu capability", "gpu vendor"]
    )
    def test_gpus_hide_nothing_that_fits(self, rig: Rig, wanted: str) -> None:
        """Is every machine with fitting GPUs still offered, when GPUs are asked for?"""
        self._hides_nothing(rig, wanted)

    @needs(TO_ORDER)
    @pytest.mark.parametrize("wanted", ["price", "spot", "on-demand", "region", "zone", "type", "container"])
    def test_places_and_prices_hide_nothing_that_fits(self, rig: Rig, wanted: str) -> None:
        """Is everything in the wanted places, at the wanted price, still offered?"""
        self._hides_nothing(rig, wanted)

    def _hides_nothing(self, rig: Rig, wanted: str) -> None:
        __tracebackhide__ = True
        everything = _all(rig)
        requirements = _asking(wanted, everything)
        if requirements is None:
            pytest.skip(f"none of the offers could be asked for by {wanted}")
        offered = set(map(_key, rig.backend.offers(requirements)))
        hidden = [offer for offer in everything if _fits(requirements, offer) and _key(offer) not in offered]
        expect(
            not hidden,
            "offers-filter",
            f"asked for {wanted}, offers are hidden that fit",
            expected=f"all that fit {requirements.model_dump(exclude_defaults=True)}",
            got=f"without {_named(hidden)}",
            cure="bounds are included; filter by what is certain alone, or leave filtering to the core",
        )


# -- helpers ----------------------------------------------------------------------------------------------------------


def _all(rig: Rig) -> list[Offer]:
    """All offers, asked for once in a case."""
    if not hasattr(rig, "all_offers"):
        rig.all_offers = rig.backend.offers(Requirements())  # type: ignore[attr-defined]  # kept for this case alone
    return rig.all_offers  # type: ignore[attr-defined,no-any-return]  # as above


def _sold(rig: Rig) -> dict[Key, Offer]:
    return {_key(offer): offer for offer in rig.cloud.catalogue()}


def _gpus(rig: Rig) -> list[Any]:
    return list(dict.fromkeys(gpu for offer in _all(rig) for gpu in offer.resources.gpus))


def _few(words: Iterable[str], limit: int = 4) -> str:
    listed = list(words)
    return "; ".join(listed[:limit]) + (f"; and {len(listed) - limit} more" if len(listed) > limit else "")


def _whole(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _disk_is_sane(mib: int) -> bool:
    return mib == 0 or _GIB <= mib <= _LARGEST_DISK


def _is_gpu_name(name: str) -> bool:
    odd = re.search(r"NVIDIA|AMD|INTEL|TESLA|GEFORCE|[0-9]GI?B", name)
    return bool(re.fullmatch(r"[A-Z0-9][A-Z0-9_.-]*", name)) and not odd


def _is_capability(value: object) -> bool:
    return value is None or (isinstance(value, tuple) and len(value) == 2 and all(map(_whole, value)))


def _is_complete(resources: MachineResources) -> bool:
    return resources.cpus > 0 and resources.memory_mib > 0 and isinstance(resources.gpus, tuple)


def _is_price(price: object) -> bool:
    return isinstance(price, int | float) and not isinstance(price, bool) and 0 <= price < math.inf


def _price_is_sane(offer: Offer) -> bool:
    if offer.price == 0:
        return True
    low, high = _PER_CPU_HOUR
    if offer.resources.gpus:
        return low * offer.resources.cpus <= offer.price <= _DEAREST
    lowest = low / 5 if offer.spot else low
    return lowest <= offer.price / max(offer.resources.cpus, 0.25) <= high


def _as_available(had: Availability, should: Availability) -> bool:
    return had.worth_trying == should.worth_trying


def _asking(wanted: str, offers: list[Offer]) -> Requirements | None:
    """Requirements that some offers fit and, where possible, some do not; `None` if nothing could be asked for."""
    middle = sorted(offers, key=lambda offer: (offer.resources.cpus, offer.resources.memory_mib))[len(offers) // 2]
    size = middle.resources
    with_gpus = [offer for offer in offers if offer.resources.gpus]
    gpu = with_gpus[0].resources.gpus[0] if with_gpus else None
    made: dict[str, Callable[[], Requirements]] = {
        "cpus": lambda: Requirements(cpus=Range(min=int(size.cpus))),
        "memory": lambda: Requirements(memory_mib=Range(min=size.memory_mib)),
        "disk": lambda: Requirements(disk_mib=Range(min=size.disk_mib)),
        "exact size": lambda: Requirements(
            cpus=Range(min=int(size.cpus), max=math.ceil(size.cpus)),
            memory_mib=Range(min=size.memory_mib, max=size.memory_mib),
        ),
        "arch": lambda: Requirements(arch=middle.resources.arch),
        "unset sizes": lambda: Requirements(
            cpus=Range(min=2), memory_mib=Range(min=8192), unset=frozenset({"cpus", "memory_mib"})
        ),
        "price": lambda: Requirements(max_price=middle.price),
        "spot": lambda: Requirements(spot_policy=SpotPolicy.SPOT),
        "on-demand": lambda: Requirements(spot_policy=SpotPolicy.ONDEMAND),
        "region": lambda: Requirements(regions=(middle.region,)),
        "zone": lambda: Requirements(zones=(middle.zone,) if middle.zone else ()),
        "type": lambda: Requirements(instance_types=(middle.instance_type,)),
        "container": lambda: Requirements(container=True),
        "any gpu": lambda: Requirements(gpu=GpuRequirements()),
        "gpu name": lambda: Requirements(gpu=GpuRequirements(names=(gpu.name,) if gpu else ())),
        "gpu memory": lambda: Requirements(gpu=GpuRequirements(memory_mib=Range(min=gpu.memory_mib if gpu else 0))),
        "gpu count": lambda: Requirements(gpu=GpuRequirements(count=Range(min=2))),
        "gpu capability": lambda: Requirements(
            gpu=GpuRequirements(compute_capability=gpu.compute_capability if gpu else None)
        ),
        "gpu vendor": lambda: Requirements(gpu=GpuRequirements(vendor=gpu.vendor if gpu else None)),
    }
    if gpu is None and "gpu" in wanted:
        return None
    requirements = made[wanted]()
    return requirements if any(_fits(requirements, offer) for offer in offers) else None


def _fits(wanted: Requirements, offer: Offer) -> bool:
    """Whether an offer satisfies requirements, as the core sees it."""
    machine = offer.resources
    return (
        machine.cpus in wanted.cpus
        and machine.memory_mib in wanted.memory_mib
        and machine.disk_mib in wanted.disk_mib
        and wanted.arch in (None, machine.arch)
        and (wanted.max_price is None or offer.price <= wanted.max_price)
        and (wanted.spot_policy is SpotPolicy.AUTO or offer.spot == (wanted.spot_policy is SpotPolicy.SPOT))
        and (not wanted.regions or offer.region in wanted.regions)
        and (not wanted.zones or offer.zone in wanted.zones)
        and (not wanted.instance_types or offer.instance_type in wanted.instance_types)
        and (wanted.gpu is None or _gpus_fit(wanted.gpu, machine))
    )


def _gpus_fit(wanted: GpuRequirements, machine: MachineResources) -> bool:
    fitting = fitting_gpus(wanted, list(machine.gpus))
    return len(fitting) == len(machine.gpus) and len(fitting) in wanted.count
