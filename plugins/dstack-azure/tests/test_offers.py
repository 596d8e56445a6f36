"""Offers: what they cost all in, how they are kept, and that nothing waits for what can be shown already."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
from dstack_azure import AzureConfig
from dstack_azure._account import Account
from dstack_azure._catalogue import OLDEST, SHELF_AGE, Catalogue, cache_folder
from dstack_azure._gpus import gpu_of
from dstack_azure._images import image_of
from pydantic import ValidationError

from dstack_core.plugin import BackendError, Gpu, MachineResources, Offer, Range, Requirements, UnknownOutcomeError
from dstack_core.testing import Fault
from tests.support.azure import Azure
from tests.support.azure._wares import CONFIDENTIAL, price_list

NOW = datetime(2026, 11, 2, 12, tzinfo=UTC)
REGIONS = ("eastus",)


class Clock:
    """A time that a test sets."""

    def __init__(self) -> None:
        self.now = NOW

    def __call__(self) -> datetime:
        return self.now


_MADE: list[Account] = []


@pytest.fixture(autouse=True)
def closed() -> Iterator[None]:
    """What a test made is closed after it."""
    yield
    while _MADE:
        _MADE.pop().close()


def config_of(azure: Azure) -> AzureConfig:
    """The configuration for this cloud."""
    return AzureConfig.model_validate({"type": "azure", **azure.config()})


def catalogue_of(azure: Azure, clock: Clock) -> Catalogue:
    """As another process would have it: nothing in memory."""
    config = config_of(azure)
    _MADE.append(Account(config))
    return Catalogue(_MADE[-1], config, cache_folder(), clock)


def test_importing_the_package_loads_no_sdk() -> None:
    """Nor does the declaration of the backend."""
    code = "import sys, dstack_azure; dstack_azure.dstack_register_backends(); print('\\n'.join(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True)
    assert not {"azure", "azure.core", "msal", "requests", "httpx"} & set(done.stdout.split())


def test_a_part_of_the_sdk_is_loaded_when_it_is_used() -> None:
    """The network's has thirty megabytes, and offers need none of it."""
    code = "import sys, dstack_azure._backend; print('\\n'.join(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True)
    assert not {"azure.mgmt.compute", "azure.mgmt.network", "azure.mgmt.resource"} & set(done.stdout.split())


def test_the_second_process_asks_nobody(azure: Azure) -> None:
    """What one process read is there for the next."""
    clock = Clock()
    first = catalogue_of(azure, clock).offers(Requirements(), REGIONS)
    calls = azure.calls()
    assert catalogue_of(azure, clock).offers(Requirements(), REGIONS) == first
    assert azure.calls() == calls


def test_what_is_old_is_shown_while_it_is_read_anew(azure: Azure) -> None:
    """A plan does not wait for a price list: even while Azure does not answer at all."""
    clock = Clock()
    catalogue = catalogue_of(azure, clock)
    first = catalogue.offers(Requirements(), REGIONS)
    clock.now += SHELF_AGE
    azure.fail(Fault.HANG, 1000)
    assert catalogue.offers(Requirements(), REGIONS) == first
    azure.heal()
    catalogue.wait()
    calls = azure.calls()
    assert catalogue.offers(Requirements(), REGIONS) == first
    assert azure.calls() == calls


def test_a_refresh_that_fails_changes_nothing(azure: Azure) -> None:
    """And is tried again by whoever asks next."""
    clock = Clock()
    catalogue = catalogue_of(azure, clock)
    first = catalogue.offers(Requirements(), REGIONS)
    clock.now += SHELF_AGE
    with_failure = azure.plane.calls()
    azure.fail(Fault.SERVER_ERROR, 1000)
    assert catalogue.offers(Requirements(), REGIONS) == first
    catalogue.wait()
    assert azure.calls() > with_failure
    azure.heal()
    assert catalogue.offers(Requirements(), REGIONS) == first
    catalogue.wait()


def test_what_is_far_too_old_is_not_shown(azure: Azure) -> None:
    """Prices of last month are no prices."""
    clock = Clock()
    catalogue = catalogue_of(azure, clock)
    catalogue.offers(Requirements(), REGIONS)
    clock.now += OLDEST + timedelta(seconds=1)
    azure.fail(Fault.SERVER_ERROR, 1000)
    with pytest.raises(UnknownOutcomeError):
        catalogue.offers(Requirements(), REGIONS)


@pytest.mark.parametrize("text", ["", "{", "[]", '{"format": 0}', json.dumps({"format": 1, "at": "x", "part": {}})])
def test_a_broken_file_is_none(azure: Azure, text: str) -> None:
    """Half a file, one of another version, or one that somebody edited: it is read anew."""
    clock = Clock()
    first = catalogue_of(azure, clock).offers(Requirements(), REGIONS)
    files = list(cache_folder().glob("*/*.json"))
    assert len(files) == 2
    for file in files:
        file.write_text(text)
    assert catalogue_of(azure, clock).offers(Requirements(), REGIONS) == first
    assert all(json.loads(file.read_text())["format"] == 1 for file in files)


def test_a_folder_that_cannot_be_written_is_no_obstacle(azure: Azure, kept: Path) -> None:
    """There is a file where the folder should be."""
    (kept / "dstack").write_text("")
    assert catalogue_of(azure, Clock()).offers(Requirements(), REGIONS)


def test_files_hold_no_secret_and_are_for_one_person(azure: Azure) -> None:
    """Neither in their names nor inside."""
    catalogue_of(azure, Clock()).offers(Requirements(), REGIONS)
    creds = azure.config()["creds"]
    (folder,) = cache_folder().iterdir()
    assert folder.stat().st_mode & 0o777 == 0o700
    for file in folder.iterdir():
        text = str(file) + file.read_text()
        assert creds["client_secret"] not in text
        assert creds["client_id"] not in text


def one(offers: list[Offer], size: str, *, spot: bool = False) -> Offer:
    """The offer of a size in the first place that has it."""
    return next(offer for offer in offers if (offer.instance_type, offer.spot) == (size, spot))


def test_a_larger_disk_costs_more(azure: Azure) -> None:
    """A disk is made as large as asked for, and paid for by its class."""
    catalogue = catalogue_of(azure, Clock())
    usual = one(catalogue.offers(Requirements(), REGIONS), "Standard_D2s_v5")
    wanted = Requirements(disk_mib=Range(min=500 * 1024 + 1))
    larger = one(catalogue.offers(wanted, REGIONS), "Standard_D2s_v5")
    assert larger.resources.disk_mib == 501 * 1024
    assert larger.price - usual.price == pytest.approx((76.8 - 9.6) / 730, abs=1e-5)
    capped = catalogue.offers(Requirements(disk_mib=Range(max=50 * 1024)), REGIONS)
    # The image with the driver of the GPUs is larger than that.
    assert {offer.resources.disk_mib // 1024 for offer in capped} == {50, 128}
    small = catalogue.offers(Requirements(disk_mib=Range(min=1024)), REGIONS)
    assert {offer.resources.disk_mib // 1024 for offer in small} == {30, 64}


def test_each_price_is_that_of_azures_list(azure: Azure) -> None:
    """Size for size: Linux, by use, on demand and as spot, with the disk and the address; without confidential ones."""
    entries = [entry for entry in price_list() if entry["armRegionName"] == "eastus" and entry["type"] == "Consumption"]
    listed = {
        (entry["armSkuName"], entry["skuName"].endswith(" Spot")): entry["retailPrice"]
        for entry in entries
        if entry["serviceName"] == "Virtual Machines"
        and entry["armSkuName"] != CONFIDENTIAL
        and not any(word in entry["productName"] + entry["skuName"] for word in ("Windows", "Cloud", "Low Priority"))
    }
    (disk,) = [entry["retailPrice"] for entry in entries if entry["meterName"] == "E10 LRS Disk"]
    offers = catalogue_of(azure, Clock()).offers(Requirements(), REGIONS)
    assert {(offer.instance_type, offer.spot) for offer in offers} == listed.keys()
    for offer in offers:
        price = listed[offer.instance_type, offer.spot] + disk / 730 + 0.005
        assert offer.price == pytest.approx(price, abs=1e-6)


def test_a_quota_is_compared_with_what_is_needed(azure: Azure) -> None:
    """One that is too small for the largest is large enough for others; spot has one of its own."""
    azure.plane.quota("eastus cores", 6)
    azure.plane.quota("eastus lowPriorityCores", 4)
    offers = catalogue_of(azure, Clock()).offers(Requirements(), REGIONS)
    short = {(offer.instance_type, offer.spot): offer.reason for offer in offers if not offer.availability.worth_trying}
    assert short["Standard_E8s_v5", False] == ("needs 8 vCPUs, and the subscription may have 6 (quota cores in eastus)")
    assert short["Standard_E8s_v5", True] == (
        "needs 8 vCPUs, and the subscription may have 4 (quota lowprioritycores in eastus)"
    )
    assert "standardndsh100v5family" in str(short["Standard_ND96isr_H100_v5", False])
    assert ("Standard_F4s_v2", False) not in short


def test_what_the_subscription_may_not_have_is_shown(azure: Azure) -> None:
    """With Azure's reason, where it may not have it, and only there."""
    wanted = Requirements(instance_types=("Standard_NC24ads_A100_v4",))
    offers = catalogue_of(azure, Clock()).offers(wanted, ("eastus", "westeurope"))
    reasons = {offer.region: offer.reason for offer in offers}
    assert reasons == {
        "eastus": None,
        "westeurope": "NotAvailableForSubscription: this subscription may not have it in westeurope",
    }


def test_a_region_without_zones(azure: Azure) -> None:
    """There is one offer for the region."""
    offers = catalogue_of(azure, Clock()).offers(Requirements(instance_types=("Standard_D2s_v5",)), ("westus",))
    assert [(offer.zone, offer.spot) for offer in offers] == [(None, False), (None, True)]


def test_an_error_is_the_error_of_all_who_wait(azure: Azure) -> None:
    """And not of those who ask later."""
    catalogue = catalogue_of(azure, Clock())
    azure.fail(Fault.SERVER_ERROR, 1000)
    with pytest.raises(BackendError):
        catalogue.offers(Requirements(), REGIONS)
    azure.heal()
    assert catalogue.offers(Requirements(), REGIONS)


@pytest.mark.parametrize(
    ("size", "name", "gib"),
    [
        ("Standard_NC4as_T4_v3", "T4", 16),
        ("Standard_NC64as_T4_v3", "T4", 16),
        ("Standard_NC24ads_A100_v4", "A100", 80),
        ("Standard_ND96asr_v4", "A100", 40),
        ("Standard_ND96amsr_A100_v4", "A100", 80),
        ("Standard_NC40ads_H100_v5", "H100", 94),
        ("Standard_NC80adis_H100_v5", "H100", 94),
        ("Standard_NCC40ads_H100_v5", "H100", 94),
        ("Standard_ND96isr_H100_v5", "H100", 80),
        ("Standard_ND96isr_H200_v5", "H200", 141),
        ("Standard_ND96isr_MI300X_v5", "MI300X", 192),
        ("Standard_NC6s_v3", "V100", 16),
        ("Standard_NC24rs_v3", "V100", 16),
        ("Standard_ND40rs_v2", "V100", 32),
        ("Standard_NV12s_v3", "M60", 8),
        ("Standard_NV6ads_A10_v5", "A10", 4),
        ("Standard_NV36ads_A10_v5", "A10", 24),
        ("Standard_NV36adms_A10_v5", "A10", 24),
        ("Standard_D2s_v5", None, 0),
        ("Standard_NC999_Z9000_v9", None, 0),
    ],
)
def test_the_gpu_of_a_size(size: str, name: str | None, gib: int) -> None:
    """By Azure's names; of an unknown one nothing is made up."""
    gpu = gpu_of(size)
    assert (gpu and gpu.name, gpu.memory_mib // 1024 if gpu else 0) == (name, gib)


@pytest.mark.parametrize(
    ("vendor", "arch", "sku"),
    [("nvidia", "x86", "2204"), ("nvidia", "arm", "2404-arm64"), ("amd", "x86", "2204-rocm")],
)
def test_the_image_for_gpus(azure: Azure, vendor: str, arch: str, sku: str) -> None:
    """It has the driver of their maker."""
    machine = MachineResources(2, 2048, gpus=(Gpu("X1", 1024, vendor),), arch=arch)
    assert image_of(config_of(azure), machine)["sku"] == sku


@pytest.mark.parametrize(
    ("image", "reference"),
    [
        ("a:b:c:1.0", {"publisher": "a", "offer": "b", "sku": "c", "version": "1.0"}),
        ("/subscriptions/x/images/y", {"id": "/subscriptions/x/images/y"}),
        ("/CommunityGalleries/x", {"communityGalleryImageId": "/CommunityGalleries/x"}),
        ("/SharedGalleries/x", {"sharedGalleryImageId": "/SharedGalleries/x"}),
    ],
)
def test_a_configured_image(azure: Azure, image: str, reference: dict[str, str]) -> None:
    """In each way in which Azure names one."""
    config = AzureConfig.model_validate({"type": "azure", **azure.config(), "image": image})
    assert image_of(config, MachineResources(2, 2048)) == reference


@pytest.mark.parametrize(
    ("entry", "said"),
    [
        ({"subscription_id": "mine"}, "subscription_id"),
        ({"regions": []}, "regions"),
        ({"regions": ["East US"]}, "is no name of a region"),
        ({"regions": ["eastus-1"]}, "is no name of a region"),
        ({"vnet": "net"}, "vnet"),
        ({"vnet": "group/net"}, "set `regions` to that one"),
        ({"subnet": "inner"}, "set `vnet`"),
        ({"image": "ubuntu"}, "is no image"),
        ({"resource_group": "ends with a dot."}, "resource_group"),
        ({"tags": {"Owner": "me"}}, "Choose another key"),
        ({"tags": {"a/b": "y"}}, "a character that Azure does not take"),
        ({"tags": {"k": "y" * 300}}, "too long"),
        ({"creds": {"type": "client", "tenant_id": "x", "client_id": "y", "client_secret": "z"}}, "tenant_id"),
        ({"creds": {"type": "no-such-kind"}}, "creds"),
        ({"base_url": "http://plain"}, "base_url"),
        ({"polling_interval": 0}, "polling_interval"),
        ({"location": "eastus"}, "location"),
    ],
)
def test_what_is_wrong_with_a_configuration_is_said(azure: Azure, entry: dict[str, Any], said: str) -> None:
    """With the field, or with the cure."""
    with pytest.raises(ValidationError) as caught:
        AzureConfig.model_validate({"type": "azure", **azure.config(), **entry})
    assert said in str(caught.value)
