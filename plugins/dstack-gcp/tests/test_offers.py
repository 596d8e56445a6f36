"""Offers: what they cost all in, how they are kept, and that nothing waits for what can be shown already."""

from __future__ import annotations

import json
import subprocess
import sys
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from dstack_gcp import GcpConfig
from dstack_gcp._account import Account
from dstack_gcp._catalogue import OLDEST, SHELF_AGE, Catalogue, cache_folder
from dstack_gcp._gpus import ATTACHABLE, gpu, quota_metric
from dstack_gcp._market import attached_to
from dstack_gcp._prices import FAMILIES
from dstack_gcp._quotas import quotas_of
from pydantic import ValidationError

from dstack_core.plugin import BackendError, Offer, Range, Requirements, UnknownOutcomeError
from dstack_core.testing import Fault
from tests.support.gcp import Gcp

NOW = datetime(2026, 11, 2, 12, tzinfo=UTC)


class Clock:
    """A time that a test sets."""

    def __init__(self) -> None:
        self.now = NOW

    def __call__(self) -> datetime:
        return self.now


def catalogue_of(gcp: Gcp, clock: Clock, **more: object) -> Catalogue:
    """As another process would have it: nothing in memory."""
    config = GcpConfig.model_validate({"type": "gcp", **gcp.config(), "regions": ["us-central1"], **more})
    return Catalogue(Account(config), config, cache_folder(), clock)


def one(offers: list[Offer], name: str, *, spot: bool = False, zone: str = "us-central1-a") -> Offer:
    """The one offer of this name."""
    (found,) = [offer for offer in offers if (offer.instance_type, offer.spot, offer.zone) == (name, spot, zone)]
    return found


def test_importing_the_package_loads_no_sdk() -> None:
    """Nor does the declaration of the backend."""
    code = "import sys, dstack_gcp; dstack_gcp.dstack_register_backends(); print('\\n'.join(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True)
    assert not {"google.cloud", "google.auth", "google.api_core", "requests", "grpc"} & set(done.stdout.split())


def test_the_second_process_asks_nobody(gcp: Gcp) -> None:
    """What one process read is there for the next."""
    clock = Clock()
    first = catalogue_of(gcp, clock).offers(Requirements())
    calls = gcp.calls()
    assert catalogue_of(gcp, clock).offers(Requirements()) == first
    assert gcp.calls() == calls


def test_what_is_old_is_shown_while_it_is_read_anew(gcp: Gcp) -> None:
    """A plan does not wait for a price list: even while Google does not answer at all."""
    clock = Clock()
    catalogue = catalogue_of(gcp, clock)
    first = catalogue.offers(Requirements())
    clock.now += SHELF_AGE
    gcp.fail(Fault.HANG, 1000)
    assert catalogue.offers(Requirements()) == first
    gcp.heal()
    catalogue.wait()
    calls = gcp.calls()
    assert catalogue.offers(Requirements()) == first
    assert gcp.calls() == calls


def test_a_refresh_that_fails_changes_nothing(gcp: Gcp) -> None:
    """And is tried again by whoever asks next."""
    clock = Clock()
    catalogue = catalogue_of(gcp, clock)
    first = catalogue.offers(Requirements())
    clock.now += SHELF_AGE
    calls = gcp.calls()
    gcp.fail(Fault.SERVER_ERROR, 1000)
    assert catalogue.offers(Requirements()) == first
    catalogue.wait()
    assert gcp.calls() > calls
    gcp.heal()
    assert catalogue.offers(Requirements()) == first
    catalogue.wait()


def test_what_is_far_too_old_is_not_shown(gcp: Gcp) -> None:
    """Prices of last month are no prices."""
    clock = Clock()
    catalogue = catalogue_of(gcp, clock)
    catalogue.offers(Requirements())
    clock.now += OLDEST + timedelta(seconds=1)
    gcp.fail(Fault.SERVER_ERROR, 1000)
    with pytest.raises(UnknownOutcomeError):
        catalogue.offers(Requirements())


@pytest.mark.parametrize("text", ["", "{", "[]", '{"format": 0}', json.dumps({"format": 1, "at": "x", "part": {}})])
def test_a_broken_file_is_none(gcp: Gcp, text: str) -> None:
    """Half a file, one of another version, or one that somebody edited: it is read anew."""
    clock = Clock()
    first = catalogue_of(gcp, clock).offers(Requirements())
    files = list(cache_folder().glob("*/*.json"))
    assert len(files) == 3
    for file in files:
        file.write_text(text)
    assert catalogue_of(gcp, clock).offers(Requirements()) == first
    assert all(json.loads(file.read_text())["format"] == 1 for file in files)


def test_a_folder_that_cannot_be_written_is_no_obstacle(gcp: Gcp, kept: Path) -> None:
    """There is a file where the folder should be."""
    (kept / "dstack").write_text("")
    assert catalogue_of(gcp, Clock()).offers(Requirements())


def test_files_hold_no_secret_and_are_for_one_person(gcp: Gcp) -> None:
    """Neither in their names nor inside."""
    catalogue_of(gcp, Clock()).offers(Requirements())
    secret = json.loads(gcp.config()["creds"]["data"])["private_key"].splitlines()[1]
    (folder,) = cache_folder().iterdir()
    assert folder.stat().st_mode & 0o777 == 0o700
    for file in folder.iterdir():
        assert secret not in str(file) + file.read_text()


def test_an_error_is_the_error_of_all_who_wait(gcp: Gcp) -> None:
    """And not of those who ask later."""
    catalogue = catalogue_of(gcp, Clock())
    gcp.fail(Fault.SERVER_ERROR, 1000)
    with pytest.raises(BackendError):
        catalogue.offers(Requirements())
    catalogue.wait()
    gcp.heal()
    assert catalogue.offers(Requirements())


def test_a_price_is_the_sum_of_its_parts(gcp: Gcp) -> None:
    """Cores, memory, GPUs, local disks, boot disk and address, by the published prices of us-central1."""
    offers = catalogue_of(gcp, Clock()).offers(Requirements())
    around = 100 * 0.1 / 730 + 0.005
    expected = {
        "n1-standard-4": 4 * 0.031611 + 15 * 0.004237,
        "n1-standard-4+1xt4": 4 * 0.031611 + 15 * 0.004237 + 0.35,
        "n1-standard-4+8xv100": 4 * 0.031611 + 15 * 0.004237 + 8 * 2.48,
        "e2-micro": 0.25 * 0.02181159 + 1 * 0.00292353,
        "a2-highgpu-1g": 12 * 0.031611 + 85 * 0.004237 + 2.933908,
        "a2-ultragpu-1g": 12 * 0.031611 + 170 * 0.004237 + 3.92833 + 375 * 0.08 / 730,
    }
    for name, price in expected.items():
        assert one(offers, name).price == pytest.approx(price + around, abs=1e-5), name
    spot = one(offers, "n1-standard-4+1xt4", spot=True)
    assert spot.price == pytest.approx(0.4 * expected["n1-standard-4+1xt4"] + 100 * 0.1 / 730 + 0.0025, abs=1e-5)


def test_without_a_public_address_nothing_is_paid_for_it(gcp: Gcp) -> None:
    """Half a cent an hour less."""
    outside = one(catalogue_of(gcp, Clock()).offers(Requirements()), "e2-micro")
    inside = one(catalogue_of(gcp, Clock(), public_ips=False).offers(Requirements()), "e2-micro")
    assert outside.price - inside.price == pytest.approx(0.005, abs=1e-6)


def test_a_larger_disk_costs_more(gcp: Gcp) -> None:
    """A disk is made as large as asked for, and paid for."""
    catalogue = catalogue_of(gcp, Clock())
    usual = one(catalogue.offers(Requirements()), "e2-standard-4")
    larger = one(catalogue.offers(Requirements(disk_mib=Range(min=500 * 1024 + 1))), "e2-standard-4")
    assert larger.resources.disk_mib == 501 * 1024
    assert larger.price - usual.price == pytest.approx(401 * 0.1 / 730, abs=1e-5)
    capped = catalogue.offers(Requirements(disk_mib=Range(max=50 * 1024)))
    assert {offer.resources.disk_mib for offer in capped} == {50 * 1024}


def test_a_quota_is_compared_with_what_is_needed(gcp: Gcp) -> None:
    """One that is too small for the largest is large enough for others; spot GPUs have one of their own."""
    gcp.plane.quota("us-central1 CPUS", 4)
    offers = catalogue_of(gcp, Clock()).offers(Requirements())
    reasons = {
        (offer.instance_type, offer.spot): offer.reason for offer in offers if not offer.availability.worth_trying
    }
    said = "needs {}, and the project may have {} (quota {} in us-central1)"
    assert reasons["n1-standard-16", False] == said.format(16, 4, "CPUS")
    assert ("n1-standard-4", False) not in reasons
    assert reasons["a2-ultragpu-1g", False] == said.format(1, 0, "NVIDIA_A100_80GB_GPUS")
    assert ("a2-ultragpu-1g", True) not in reasons
    assert reasons["n1-standard-4+1xv100", True] == said.format(1, 0, "PREEMPTIBLE_NVIDIA_V100_GPUS")
    assert reasons["a3-highgpu-8g", False] == "needs 8, and the project may have 4 (quota GPUS_ALL_REGIONS)"


def test_quotas_of_the_project_that_may_not_be_read_hide_nothing(gcp: Gcp) -> None:
    """They are found out when they are met."""
    gcp.denied = {"compute.projects.get"}
    assert one(catalogue_of(gcp, Clock()).offers(Requirements()), "a3-highgpu-8g").availability.worth_trying


def test_only_what_is_sold_in_a_zone_is_offered_there(gcp: Gcp) -> None:
    """T4 in two zones, V100 in one; no workstations' GPUs, and no machines without a price."""
    offers = catalogue_of(gcp, Clock()).offers(Requirements())
    zones = {
        name: sorted(str(offer.zone)[-1] for offer in offers if offer.instance_type == name and not offer.spot)
        for name in ("n1-standard-4+1xt4", "n1-standard-4+1xv100", "g2-standard-4")
    }
    assert zones == {"n1-standard-4+1xt4": ["a", "b"], "n1-standard-4+1xv100": ["a"], "g2-standard-4": ["b", "c"]}
    names = {offer.instance_type for offer in offers}
    assert not {"f1-micro", "m1-ultramem-40"} & names
    # Twelve cores at most with one V100.
    assert "n1-standard-16+1xv100" not in names


@pytest.mark.parametrize(
    ("name", "base", "cards"),
    [
        ("n1-standard-4", "n1-standard-4", ()),
        ("n1-standard-4+2xt4", "n1-standard-4", (("nvidia-tesla-t4", 2),)),
        ("n1-standard-4+t4", "n1-standard-4+t4", ()),
    ],
)
def test_the_gpus_of_an_offer(name: str, base: str, cards: tuple[tuple[str, int], ...]) -> None:
    """What has to be attached is in the name, and nowhere else."""
    assert attached_to(name) == (base, cards)


@pytest.mark.parametrize(
    ("accelerator", "name", "metric"),
    [
        ("nvidia-tesla-t4", "T4", "NVIDIA_T4_GPUS"),
        ("nvidia-tesla-v100", "V100", "NVIDIA_V100_GPUS"),
        ("nvidia-l4", "L4", "NVIDIA_L4_GPUS"),
        ("nvidia-tesla-a100", "A100", "NVIDIA_A100_GPUS"),
        ("nvidia-a100-80gb", "A100", "NVIDIA_A100_80GB_GPUS"),
    ],
)
def test_a_gpu_and_its_quota(accelerator: str, name: str, metric: str) -> None:
    """As users write it, and as Google counts it."""
    found = gpu(accelerator)
    assert found is not None
    assert found.compute_capability is not None
    assert (found.name, quota_metric(accelerator)) == (name, metric)
    assert all(gpu(attachable) for attachable in ATTACHABLE)


def test_spot_cpus_count_as_others_where_there_are_none() -> None:
    """Google counts them so; with a quota of their own they count under that."""
    limits = {"CPUS": 8.0, "N2_CPUS": 8.0, "PREEMPTIBLE_CPUS": 0.0}
    assert list(quotas_of("n2", 4, (), limits, spot=True)) == [("N2_CPUS", 4.0)]
    assert list(quotas_of("e2", 4, (), limits, spot=True)) == [("CPUS", 4.0)]
    assert list(quotas_of("n2", 4, (), {**limits, "PREEMPTIBLE_CPUS": 9.0}, spot=True)) == [("PREEMPTIBLE_CPUS", 4.0)]
    assert "n2" in FAMILIES


@pytest.mark.parametrize(
    ("entry", "said"),
    [
        ({"regions": ["us-central1-a"]}, "a zone, us-central1-a, is not"),
        ({"regions": ["here"]}, "is no name of a region"),
        ({"project": "My Project"}, "project"),
        ({"network": "Default"}, "network"),
        ({"subnetwork": "a/b"}, "subnetwork"),
        ({"image": "ubuntu"}, "image"),
        ({"vm_service_account": "me"}, "vm_service_account"),
        ({"labels": {"owner": "me"}}, "Choose another key"),
        ({"labels": {"Team": "web"}}, "keys begin with a-z"),
        ({"labels": {"team": "Web"}}, "keys begin with a-z"),
        ({"creds": {"type": "service_account"}}, "exactly one of"),
        ({"creds": {"type": "service_account", "data": "{}", "filename": "x"}}, "exactly one of"),
        ({"creds": {"type": "no-such-kind"}}, "creds"),
        ({"endpoint_url": "localhost"}, "endpoint_url"),
        ({"region": "us-central1"}, "region"),
    ],
)
def test_what_is_wrong_with_a_configuration_is_said(entry: dict[str, object], said: str) -> None:
    """Which key it is, and what it should be."""
    with pytest.raises(ValidationError, match=said):
        GcpConfig.model_validate({"type": "gcp", "project": "a-project-1", **entry})
