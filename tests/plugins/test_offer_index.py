"""The index finds what going through all offers would find, in the same order, and explains when there is nothing."""

from __future__ import annotations

from dataclasses import replace
from itertools import islice

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dstack_core._models.offer_index import OfferIndex, merge_matches
from dstack_core.plugin import (
    Availability,
    Gpu,
    GpuRequirements,
    MachineResources,
    Offer,
    Range,
    Requirements,
    SpotPolicy,
    fitting_gpus,
)

GPUS = [
    Gpu("A100", 40960, compute_capability=(8, 0)),
    Gpu("A100", 81920, compute_capability=(8, 0)),
    Gpu("T4", 16384, compute_capability=(7, 5)),
    Gpu("MI300X", 196608, vendor="amd"),
]

machines = st.builds(
    MachineResources,
    cpus=st.sampled_from([0.5, 1, 2, 4, 8, 64]),
    memory_mib=st.sampled_from([512, 4096, 16384, 98304]),
    disk_mib=st.sampled_from([0, 51200, 102400]),
    gpus=st.builds(lambda gpu, count: (gpu,) * count, st.sampled_from(GPUS), st.sampled_from([0, 0, 1, 2, 8])),
    arch=st.sampled_from(["x86", "arm"]),
)
offers = st.builds(
    Offer,
    backend=st.just("toy"),
    instance_type=st.sampled_from(["small", "large"]),
    region=st.sampled_from(["r1", "r2", "r3"]),
    resources=machines,
    price=st.sampled_from([0.0, 0.1, 0.5, 0.5, 2.0, 30.0]),
    zone=st.sampled_from([None, "z1", "z2"]),
    spot=st.booleans(),
    availability=st.sampled_from(Availability),
)


def ranges(*values: int) -> st.SearchStrategy[Range[int]]:
    """Ranges with these ends."""
    open_ended = st.sampled_from(values).map(lambda low: Range(min=low))
    both = st.tuples(st.sampled_from(values), st.sampled_from(values))
    return open_ended | both.map(lambda ends: Range(min=min(ends), max=max(ends)))


def some(*values: str) -> st.SearchStrategy[tuple[str, ...]]:
    """Nothing, one or more of these."""
    return st.lists(st.sampled_from(values), max_size=2).map(tuple)


gpu_requirements = st.builds(
    GpuRequirements,
    vendor=st.sampled_from([None, None, "nvidia", "amd"]),
    names=some("a100", "T4", "MI300X"),
    count=ranges(0, 1, 2, 8),
    memory_mib=st.none() | ranges(16384, 40960, 81920),
    total_memory_mib=st.none() | ranges(16384, 81920, 700000),
    compute_capability=st.sampled_from([None, None, (7, 5), (8, 0), (9, 0)]),
)
requirements = st.builds(
    Requirements,
    cpus=ranges(0, 1, 2, 8),
    arch=st.sampled_from([None, None, "x86", "arm"]),
    memory_mib=ranges(0, 512, 16384, 98304),
    disk_mib=ranges(0, 0, 102400),
    gpu=st.none() | gpu_requirements,
    spot_policy=st.sampled_from(SpotPolicy),
    max_price=st.sampled_from([None, None, 0.0, 0.5, 100.0]),
    regions=some("r1", "r2"),
    zones=some("z1", "z2"),
    instance_types=some("small"),
)


def fits(wanted: Requirements, offer: Offer) -> bool:
    """The contract, word by word, for one offer."""
    machine = offer.resources
    return (
        machine.cpus in wanted.cpus
        and machine.memory_mib in wanted.memory_mib
        and machine.disk_mib in wanted.disk_mib
        and wanted.arch in (None, machine.arch)
        and (wanted.gpu is None or gpus_fit(wanted.gpu, machine))
        and wanted.spot_policy in (SpotPolicy.AUTO, SpotPolicy.SPOT if offer.spot else SpotPolicy.ONDEMAND)
        and (wanted.max_price is None or offer.price <= wanted.max_price)
        and (not wanted.regions or offer.region in wanted.regions)
        and (not wanted.zones or offer.zone in wanted.zones)
        and (not wanted.instance_types or offer.instance_type in wanted.instance_types)
    )


def gpus_fit(wanted: GpuRequirements, machine: MachineResources) -> bool:
    """The same for its GPUs."""
    fitting = [
        gpu
        for gpu in machine.gpus
        if wanted.vendor in (None, gpu.vendor)
        and (not wanted.names or gpu.name in [name.upper() for name in wanted.names])
        and (wanted.memory_mib is None or gpu.memory_mib in wanted.memory_mib)
        and (wanted.compute_capability is None or (gpu.compute_capability or (0, 0)) >= wanted.compute_capability)
    ]
    total = sum(gpu.memory_mib for gpu in fitting)
    enough = wanted.total_memory_mib is None or not fitting or total in wanted.total_memory_mib
    return len(fitting) in wanted.count and enough


@settings(max_examples=300, deadline=None)
@given(st.lists(offers, max_size=40), requirements)
def test_it_finds_what_going_through_all_would_find(sold: list[Offer], wanted: Requirements) -> None:
    """The same offers, cheapest first, those not worth trying last, and the right number of them."""
    matches = OfferIndex(sold).match(wanted)
    expected = [offer for offer in sold if fits(wanted, offer)]
    found = list(matches)
    assert matches.total == len(found) == len(expected)
    assert sorted(map(repr, found)) == sorted(map(repr, expected))
    ranks = [(not offer.availability.worth_trying, offer.price) for offer in found]
    assert ranks == sorted(ranks)
    assert matches.first(3) == found[:3]
    assert [*matches.available, *matches.unavailable] == found


@settings(max_examples=200, deadline=None)
@given(st.lists(offers, max_size=20), requirements)
def test_it_explains_exactly_when_nothing_fits(sold: list[Offer], wanted: Requirements) -> None:
    """The nearest offer fails in some field, unless there are offers that fit; it fails in as few as possible."""
    index = OfferIndex(sold)
    explanation = index.explain(wanted)
    assert (explanation.nearest is None) == (not sold)
    if explanation.nearest is not None:
        assert fits(wanted, explanation.nearest) == (index.match(wanted).total > 0)
        assert (explanation.shortfalls == ()) == fits(wanted, explanation.nearest)
    assert str(explanation)


@settings(max_examples=100, deadline=None)
@given(st.lists(st.lists(offers, max_size=10), max_size=4), requirements)
def test_several_backends_make_one_stream(sold: list[list[Offer]], wanted: Requirements) -> None:
    """As if all the offers came from one."""
    merged = list(merge_matches(OfferIndex(some_offers).match(wanted) for some_offers in sold))
    together = OfferIndex([offer for some_offers in sold for offer in some_offers]).match(wanted)
    assert [(o.price, o.availability.worth_trying) for o in merged] == [
        (o.price, o.availability.worth_trying) for o in together
    ]


SMALL = MachineResources(cpus=4, memory_mib=8 * 1024, disk_mib=100 * 1024)
LARGE = MachineResources(cpus=8, memory_mib=24 * 1024, disk_mib=100 * 1024, gpus=(GPUS[2],))
TWO = [Offer("toy", "small", "r1", SMALL, 0.1), Offer("toy", "large", "r2", LARGE, 1.5, zone="r2a", spot=True)]


@pytest.mark.parametrize(
    ("wanted", "words"),
    [
        (
            Requirements(memory_mib=Range(min=96 * 1024)),
            "the largest machine has 24GB memory; nearest: large in r2a (8 CPUs, 24GB, 1xT4 16GB, spot) at $1.5/h",
        ),
        (
            Requirements(memory_mib=Range(min=98304)),
            "asks for 96GB memory, the largest machine has 24GB memory; nearest",
        ),
        (Requirements(cpus=Range(min=64)), "asks for 64 CPUs, the largest machine has 8 CPUs"),
        (
            Requirements(cpus=Range(min=1, max=2)),
            "asks for at most 2 CPUs, the nearest offer has 4 CPUs; nearest: small",
        ),
        (
            Requirements(gpu=GpuRequirements(names=("H100",), count=Range(min=8))),
            "asks for 8 x H100, the nearest offer has 1xT4 16GB",
        ),
        (
            Requirements(gpu=GpuRequirements(memory_mib=Range(min=80 * 1024), compute_capability=(9, 0))),
            "asks for GPU, 80GB each, compute capability 9.0, the nearest offer has 1xT4 16GB",
        ),
        (Requirements(max_price=0.05), "asks for at most $0.05/h, the nearest offer has $0.1/h"),
        (Requirements(regions=("eu",)), "asks for regions eu, the nearest offer has r1"),
        (
            Requirements(spot_policy=SpotPolicy.SPOT, regions=("r1",)),
            "asks for spot, the nearest offer has on-demand; nearest: small",
        ),
        (
            Requirements(gpu=GpuRequirements(), max_price=1.0, arch="arm"),
            "asks for arm CPUs, the nearest offer has x86; asks for",
        ),
        (Requirements(), "it has offers that fit"),
    ],
)
def test_explanations_are_sentences(wanted: Requirements, words: str) -> None:
    """What is asked for, the most there is, and the nearest offer with its price."""
    assert words in str(OfferIndex(TWO).explain(wanted))


def test_nothing_to_sell_is_said_so() -> None:
    """Not a crash, and not an offer."""
    assert str(OfferIndex().explain(Requirements())) == "it has no offers at all"
    assert list(OfferIndex().match(Requirements())) == []


def test_the_nearest_offer_is_the_one_that_misses_by_least() -> None:
    """Of two that are too small, the larger one."""
    nearest = OfferIndex(TWO).explain(Requirements(memory_mib=Range(min=1 << 20))).nearest
    assert nearest is TWO[1]


def test_equal_machines_are_one_kind_even_as_different_objects() -> None:
    """A backend that does not share the object loses speed, not offers."""
    sold = [replace(TWO[0], resources=replace(SMALL), price=float(price)) for price in (3, 1, 2)]
    assert [offer.price for offer in OfferIndex(sold).match(Requirements())] == [1, 2, 3]
    assert len(OfferIndex(sold)) == len(list(OfferIndex(sold))) == 3


def test_names_and_vendors_of_gpus_may_be_written_in_any_case() -> None:
    """Users write `a100` and `NVIDIA`."""
    assert fitting_gpus(GpuRequirements(names=("a100",), vendor="NVIDIA"), GPUS) == GPUS[:2]


def test_a_match_over_very_many_offers_looks_at_few_of_them() -> None:
    """The first fifty of a hundred thousand, and their number, cost a look at each kind of machine and little more."""
    looked = 0

    class Counting(Range[int]):
        def __contains__(self, value: object) -> bool:
            nonlocal looked
            looked += 1
            return super().__contains__(value)

    kinds = [replace(SMALL, memory_mib=1024 + number) for number in range(100)]
    sold = [Offer("toy", "t", f"r{number % 7}", kinds[number % 100], number / 100) for number in range(10_000)]
    index = OfferIndex(sold)
    wanted = Requirements.model_construct(**{**Requirements().__dict__, "cpus": Counting(min=1)})
    matches = index.match(wanted)
    assert [offer.price for offer in islice(matches, 50)] == [number / 100 for number in range(50)]
    assert matches.total == 10_000
    assert looked <= 100
