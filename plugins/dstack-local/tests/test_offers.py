"""What is offered: what this computer really has, and never more than is free."""

from __future__ import annotations

import json
import os
import threading
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
from dstack_local import LocalConfig, dstack_register_backends
from dstack_local._backend import LocalBackend
from dstack_local._machine import Machine, _cpus, _memory, gpu_name, look, nvidia_gpus, size_sold
from dstack_local._reservations import Reservation, ask, free, refusal, render
from hypothesis import given
from hypothesis import strategies as st

from dstack_core.plugin import (
    Availability,
    Gpu,
    GpuRequirements,
    InstanceState,
    NoCapacityError,
    Offer,
    Range,
    Requirements,
)
from dstack_core.testing import wait_until
from tests.support.local import Requests, gone, ready, state

Put = Callable[[str, str], Path]

L4, A100 = Gpu("L4", 24576, compute_capability=(8, 9)), Gpu("A100", 81920, compute_capability=(8, 0))
MACHINE = Machine(8.0, 32768, 30000, 500_000, {"GPU-1": L4, "GPU-2": L4, "GPU-3": A100}, "x86")


def offered(
    wanted: Requirements, *reserved: Reservation, machine: Machine = MACHINE, problem: str | None = None
) -> Offer:
    """The offer of a machine of which something is reserved."""
    return render(ask(wanted, machine), wanted, machine, list(reserved), problem)


def test_the_offer_is_this_computer(home: Path, backend: LocalBackend) -> None:
    """CPUs that this process may use, memory that is available, disk that is free where instances live."""
    (offer,) = backend.dstack_list_offers(Requirements())
    assert 0 < offer.resources.cpus <= len(os.sched_getaffinity(0))
    assert 0 < offer.resources.memory_mib <= os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") >> 20
    free_disk = os.statvfs(home)
    assert 0 < offer.resources.disk_mib <= (free_disk.f_bfree * free_disk.f_frsize) >> 20
    assert (offer.backend, offer.region, offer.price, offer.spot) == ("local", "local", 0.0, False)
    assert offer.availability is Availability.AVAILABLE


def test_affinity_counts() -> None:
    """A process that may use one CPU offers one."""
    allowed = os.sched_getaffinity(0)
    # A thread's affinity is its own, so that nothing else of this test run is slowed down.
    found: list[float] = []

    def pinned() -> None:
        os.sched_setaffinity(0, {min(allowed)})
        found.append(look(Path("/"), {}).cpus)

    thread = threading.Thread(target=pinned)
    thread.start()
    thread.join()
    assert found[0] <= 1


def test_control_groups_count(tmp_path: Path) -> None:
    """The tightest limit on the way up is the one that holds; both versions are read; file cache makes way."""
    second, first = tmp_path / "v2", tmp_path / "v1"
    for folder in (second, first):
        folder.mkdir()
    (second / "cpu.max").write_text("50000 100000\n")
    (second / "memory.max").write_text(f"{256 << 20}\n")
    (second / "memory.current").write_text(f"{200 << 20}\n")
    (second / "memory.stat").write_text(f"anon 1\ninactive_file {100 << 20}\n")
    (first / "cpu.cfs_quota_us").write_text("25000\n")
    (first / "cpu.cfs_period_us").write_text("100000\n")
    (first / "memory.limit_in_bytes").write_text(f"{128 << 20}\n")
    (first / "memory.usage_in_bytes").write_text(f"{100 << 20}\n")
    assert (_cpus([second]), _memory([second])) == (0.5, (256, 156))
    assert (_cpus([second, first]), _memory([second, first])) == (0.25, (128, 28))


@pytest.mark.parametrize("limit", ["max\n", "max 100000\n", "", "-1\n"])
def test_control_groups_without_a_limit_take_nothing_away(tmp_path: Path, limit: str) -> None:
    """`max` and `-1` mean no limit; a file that is not there means nothing."""
    for name in ("cpu.max", "cpu.cfs_quota_us", "memory.max", "memory.limit_in_bytes"):
        (tmp_path / name).write_text(limit)
    assert _cpus([tmp_path]) == _cpus([])
    assert _memory([tmp_path])[0] == _memory([])[0]


sizes = st.integers(0, 40000)
reservations = st.builds(
    Reservation,
    cpus=st.sampled_from([0, 1, 2, 5]),
    memory_mib=sizes,
    disk_mib=sizes,
    gpus=st.lists(st.sampled_from([("L4", 24576), ("A100", 81920)]), max_size=3).map(tuple),
)


@given(st.lists(reservations, max_size=8))
def test_what_is_granted_one_after_the_other_never_exceeds_the_machine(wanted: list[Reservation]) -> None:
    """Whatever is asked for, in whatever order; and no GPU is granted twice."""
    granted: list[Reservation] = []
    for one in wanted:
        left = free(MACHINE, granted)
        if refusal(one, left) is None:
            granted.append(one.assigned(left))
    assert sum(one.cpus for one in granted) <= MACHINE.cpus
    assert sum(one.memory_mib for one in granted) <= MACHINE.memory_mib
    assert sum(one.disk_mib for one in granted) <= MACHINE.disk_free_mib
    devices = [device for one in granted for device in one.gpu_ids]
    assert len(devices) == len(set(devices)) == sum(len(one.gpus) for one in granted)
    assert [Reservation.read(json.dumps(one.as_json())) for one in granted] == granted


def test_what_is_reserved_is_what_was_asked_for_and_the_offer_is_what_is_free() -> None:
    """A plain task reserves nothing, so any number of them fit; ranges are met from above, too."""
    plain = offered(Requirements())
    assert (plain.resources.cpus, plain.resources.memory_mib) == (8.0, 30000)
    assert Reservation.read(plain.data) == Reservation()
    ranged = offered(Requirements(cpus=Range(min=2, max=4), memory_mib=Range(min=1024, max=2048)))
    assert (ranged.resources.cpus, ranged.resources.memory_mib) == (4, 2048)
    assert Reservation.read(ranged.data) == Reservation(cpus=2, memory_mib=1024)


def test_what_fits_but_is_in_use_is_offered_as_not_to_be_had_now() -> None:
    """With what is lacking and what to do; what never fits is simply too small."""
    busy = Reservation(cpus=6)
    offer = offered(Requirements(cpus=Range(min=4)), busy)
    assert offer.availability is Availability.NO_CAPACITY
    assert offer.resources.cpus == 8
    assert offer.reason == (
        "This computer is in use: 4 CPUs asked for, 2 free. Wait for another run to end, or stop one."
    )
    small = offered(Requirements(cpus=Range(min=16)), busy)
    assert (small.availability, small.resources.cpus) == (Availability.AVAILABLE, 2)


def gpu_wanted(**wanted: object) -> Requirements:
    """Requirements that ask for GPUs."""
    return Requirements(gpu=GpuRequirements(**wanted))  # type: ignore[arg-type]  # as the test says


@pytest.mark.parametrize(
    ("wanted", "granted"),
    [
        (Requirements(), []),
        (gpu_wanted(), [L4]),
        (gpu_wanted(count=Range(min=2)), [L4, L4]),
        (gpu_wanted(count=Range(min=3)), [L4, L4, A100]),
        (gpu_wanted(names=("a100",)), [A100]),
        (gpu_wanted(memory_mib=Range(min=40960)), [A100]),
        (gpu_wanted(total_memory_mib=Range(min=40960)), [L4, L4]),
        (gpu_wanted(count=Range(min=0)), []),
    ],
)
def test_as_few_gpus_as_will_do_are_granted(wanted: Requirements, granted: list[Gpu]) -> None:
    """The rest stays free for others; who asks for none gets none."""
    offer = offered(wanted)
    assert Reservation.read(offer.data).gpus == tuple((gpu.name, gpu.memory_mib) for gpu in granted)
    assert list(offer.resources.gpus) == granted or not granted


def test_gpus_that_do_not_fit_are_shown_and_those_in_use_are_named() -> None:
    """So that the refusal can say what there is."""
    assert set(offered(gpu_wanted(names=("H100",))).resources.gpus) == {L4, A100}
    in_use = offered(gpu_wanted(names=("A100",)), Reservation(gpus=(("A100", 81920),), gpu_ids=("GPU-3",)))
    assert in_use.resources.gpus == (A100,)
    assert "1 x A100 asked for, 0 free" in str(in_use.reason)
    none = offered(gpu_wanted(), machine=replace(MACHINE, gpus={}))
    assert none.resources.gpus == ()


@pytest.mark.parametrize(
    ("product", "name"),
    [
        ("NVIDIA A100-SXM4-80GB", "A100"),
        ("NVIDIA A100 80GB PCIe", "A100"),
        ("NVIDIA H100 80GB HBM3", "H100"),
        ("NVIDIA H100 NVL", "H100"),
        ("NVIDIA H200", "H200"),
        ("NVIDIA L4", "L4"),
        ("NVIDIA L40S", "L40S"),
        ("Tesla T4", "T4"),
        ("Tesla V100-SXM2-16GB", "V100"),
        ("NVIDIA A10G", "A10G"),
        ("NVIDIA GeForce RTX 4090", "RTX4090"),
        ("NVIDIA GeForce RTX 3080 Ti Laptop GPU", "RTX3080TI"),
        ("NVIDIA GeForce GTX 1080 Ti", "GTX1080TI"),
        ("NVIDIA RTX A6000", "A6000"),
        ("NVIDIA RTX 6000 Ada Generation", "RTX6000ADA"),
        ("Quadro RTX 8000", "RTX8000"),
        ("NVIDIA GH200 480GB", "GH200"),
        ("NVIDIA", "NVIDIA"),
    ],
)
def test_gpus_are_named_as_users_write_them(product: str, name: str) -> None:
    """Without the vendor, the memory and the socket."""
    assert gpu_name(product) == name


@pytest.mark.parametrize(
    ("reported", "gigabytes"),
    [
        (23034, 24),
        (24564, 24),
        (15360, 16),
        (40536, 40),
        (81559, 80),
        (46068, 48),
        (143771, 141),
        (11264, 11),
        (6144, 6),
    ],
)
def test_gpu_memory_is_what_the_card_is_sold_with(reported: int, gigabytes: int) -> None:
    """`memory="24GB"` means a 24 GB card, although its driver reports less."""
    assert size_sold(reported) == gigabytes * 1024


def test_an_odd_size_of_gpu_memory_is_taken_as_it_is() -> None:
    """A part of a GPU, for example."""
    assert size_sold(5000) == 5000


NVIDIA_SMI = 'echo "0, GPU-aa, NVIDIA L4, 23034, 8.9"; echo "1, GPU-bb, NVIDIA L4, 23034, 8.9"'


def test_gpus_are_found_through_nvidia_smi(programs: Put) -> None:
    """By their unique ids, which mean the same to CUDA and to container engines."""
    programs("nvidia-smi", NVIDIA_SMI)
    assert nvidia_gpus() == {"GPU-aa": L4, "GPU-bb": L4}


def test_drivers_that_do_not_know_compute_capability_are_asked_without(programs: Put) -> None:
    """They refuse the whole query."""
    programs("nvidia-smi", 'case "$1" in *compute_cap*) exit 2;; esac; echo "0, GPU-aa, Tesla T4, 15360"')
    assert nvidia_gpus() == {"GPU-aa": Gpu("T4", 16384)}


@pytest.mark.parametrize(
    "script",
    ["exit 9", "echo 'NVIDIA-SMI has failed because it could not communicate with the NVIDIA driver'", "true"],
)
def test_a_driver_that_does_not_answer_means_no_gpus(programs: Put, script: str) -> None:
    """As does a computer without nvidia-smi."""
    assert nvidia_gpus() == {}
    programs("nvidia-smi", script)
    assert nvidia_gpus() == {}


def test_each_instance_sees_its_own_gpus_alone(
    home: Path, backend: LocalBackend, requests: Requests, programs: Put
) -> None:
    """Two of one GPU each get different ones, a third gets none, and one that asked for none sees none."""
    programs("nvidia-smi", NVIDIA_SMI)
    wanted = [requests(gpu=GpuRequirements(names=("L4",))) for _ in range(3)]
    instances = [backend.dstack_create_instance(request) for request in wanted[:2]]
    seen = [ready(home, instance) for instance in instances]
    assert {environment["CUDA_VISIBLE_DEVICES"] for environment in seen} == {"GPU-aa", "GPU-bb"}
    assert {environment["DSTACK_GPUS"] for environment in seen} == {"GPU-aa", "GPU-bb"}
    with pytest.raises(NoCapacityError, match="1 x L4 asked for, 0 free"):
        backend.dstack_create_instance(wanted[2])
    plain = backend.dstack_create_instance(requests())
    assert ready(home, plain)["CUDA_VISIBLE_DEVICES"] == ""
    wait_until(lambda: gone(backend, instances[0]))
    assert backend.dstack_create_instance(wanted[2]).ref.id == wanted[2].name


# -- container engines -----------------------------------------------------------------------------------------------

NO_DAEMON = "echo 'Cannot connect to the Docker daemon at unix:///var/run/docker.sock.' >&2; exit 1"
NO_PERMISSION = "echo 'permission denied while trying to connect to the Docker daemon socket' >&2; exit 1"


def container_offer(backend: LocalBackend) -> Offer:
    """What is offered for a job with an image."""
    (offer,) = backend.dstack_list_offers(Requirements(container=True))
    return offer


@pytest.mark.parametrize(
    ("engines", "words"),
    [
        ({}, "neither docker nor podman is installed. Install one, or leave out `image`."),
        ({"docker": NO_DAEMON}, "docker is installed, but its daemon is not running. Start it"),
        ({"docker": NO_PERMISSION}, "this user may not use it. Add the user to its group"),
        ({"podman": "echo 'no subuid ranges found' >&2; exit 125"}, "podman does not work: no subuid ranges found"),
        (
            {"docker": NO_DAEMON, "podman": "exit 1"},
            "daemon is not running. Start it (sudo systemctl start docker). podman",
        ),
    ],
)
def test_without_a_container_engine_the_offer_says_why_and_what_to_do(
    backend: LocalBackend, programs: Put, engines: dict[str, str], words: str
) -> None:
    """Before the run is accepted; jobs without an image are not concerned."""
    for name, script in engines.items():
        programs(name, script)
    offer = container_offer(backend)
    assert offer.availability is Availability.NO_CAPACITY
    assert words in str(offer.reason)
    assert backend.dstack_check_config() == [offer.reason]
    assert backend.dstack_list_offers(Requirements())[0].availability is Availability.AVAILABLE


@pytest.mark.parametrize(
    "engines", [{"docker": "echo 27.1"}, {"podman": "echo 4.9"}, {"docker": NO_DAEMON, "podman": "echo 4"}]
)
def test_one_engine_that_works_is_enough(backend: LocalBackend, programs: Put, engines: dict[str, str]) -> None:
    """Whichever it is."""
    for name, script in engines.items():
        programs(name, script)
    assert container_offer(backend).availability is Availability.AVAILABLE
    assert backend.dstack_check_config() == []


def test_terminate_removes_the_containers_of_the_instance(
    home: Path, tmp_path: Path, backend: LocalBackend, requests: Requests, programs: Put
) -> None:
    """Those with its label; as long as the engine cannot, the directory stays and terminate is tried again."""
    log, broken = tmp_path / "docker.log", tmp_path / "broken"
    programs("docker", f'echo "$@" >> {log}; case "$1" in ps) echo c0ffee;; rm) test ! -e {broken};; esac')
    instance = backend.dstack_create_instance(requests(container=True))
    ready(home, instance)
    broken.touch()
    backend.dstack_terminate_instance(instance.ref)
    assert state(backend, instance) is InstanceState.STOPPING
    broken.unlink()
    backend.dstack_terminate_instance(instance.ref)
    assert not (home / "local" / instance.ref.id).exists()
    assert f"ps --all --quiet --filter label=dstack.instance={instance.ref.id}" in log.read_text()
    assert "rm --force --volumes c0ffee" in log.read_text()


def test_what_the_package_declares() -> None:
    """Always configured, nothing cached, nothing asked of it that nobody set."""
    (info,) = dstack_register_backends()
    assert info.default_config == LocalConfig()
    assert (info.offers_ttl, info.visibility_window) == (0, 0)
    assert info.existing_machines
    assert info.native_idempotency
