"""Offers: what they cost all in, how they are kept, and that nothing waits for what can be shown already."""

from __future__ import annotations

import json
import subprocess
import sys
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from dstack_aws import AwsConfig
from dstack_aws._account import Account
from dstack_aws._catalogue import OLDEST, SHELF_AGE, Catalogue, cache_folder
from dstack_aws._gpus import gpu, known
from dstack_aws._market import read_mood
from dstack_aws._quotas import quota_of
from pydantic import ValidationError

from dstack_core.plugin import BackendError, Range, Requirements, UnknownOutcomeError
from dstack_core.testing import Fault
from tests.support.ec2 import Ec2

NOW = datetime(2026, 11, 2, 12, tzinfo=UTC)
REGIONS = ("us-east-1",)


class Clock:
    """A time that a test sets."""

    def __init__(self) -> None:
        self.now = NOW

    def __call__(self) -> datetime:
        return self.now


def catalogue_of(ec2: Ec2, clock: Clock) -> Catalogue:
    """As another process would have it: nothing in memory."""
    config = AwsConfig.model_validate({"type": "aws", **ec2.config()})
    return Catalogue(Account(config), config, cache_folder(), clock)


def test_importing_the_package_loads_no_sdk() -> None:
    """Nor does the declaration of the backend."""
    code = "import sys, dstack_aws; dstack_aws.dstack_register_backends(); print('\\n'.join(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True)
    assert not {"boto3", "botocore", "urllib3"} & set(done.stdout.split())


def test_the_second_process_asks_nobody(ec2: Ec2) -> None:
    """What one process read is there for the next."""
    clock = Clock()
    first = catalogue_of(ec2, clock).offers(Requirements(), REGIONS)
    calls = ec2.calls()
    assert catalogue_of(ec2, clock).offers(Requirements(), REGIONS) == first
    assert ec2.calls() == calls


def test_what_is_old_is_shown_while_it_is_read_anew(ec2: Ec2) -> None:
    """A plan does not wait for a price list: even while Amazon does not answer at all."""
    clock = Clock()
    catalogue = catalogue_of(ec2, clock)
    first = catalogue.offers(Requirements(), REGIONS)
    clock.now += SHELF_AGE
    ec2.fail(Fault.HANG, 1000)
    assert catalogue.offers(Requirements(), REGIONS) == first
    ec2.heal()
    catalogue.wait()
    calls = ec2.calls()
    assert catalogue.offers(Requirements(), REGIONS) == first
    assert ec2.calls() == calls


def test_quotas_that_cannot_be_read_now_are_not_taken_for_none(ec2: Ec2) -> None:
    """Else one error of Amazon's would hide every limit until the next refresh."""
    account = Account(AwsConfig.model_validate({"type": "aws", **ec2.config()}))
    before = ec2.calls()
    assert read_mood(account, REGIONS[0], NOW).quotas
    ec2.fail(Fault.SERVER_ERROR, 1000, skip=ec2.calls() - before - 1)
    with pytest.raises(BackendError):
        read_mood(account, REGIONS[0], NOW)


def test_a_refresh_that_fails_changes_nothing(ec2: Ec2) -> None:
    """And is tried again by whoever asks next."""
    clock = Clock()
    catalogue = catalogue_of(ec2, clock)
    first = catalogue.offers(Requirements(), REGIONS)
    clock.now += SHELF_AGE
    with_failure = ec2.plane.calls()
    ec2.fail(Fault.SERVER_ERROR, 1000)
    assert catalogue.offers(Requirements(), REGIONS) == first
    catalogue.wait()
    assert ec2.calls() > with_failure
    ec2.heal()
    assert catalogue.offers(Requirements(), REGIONS) == first
    catalogue.wait()


def test_what_is_far_too_old_is_not_shown(ec2: Ec2) -> None:
    """Prices of last month are no prices."""
    clock = Clock()
    catalogue = catalogue_of(ec2, clock)
    catalogue.offers(Requirements(), REGIONS)
    clock.now += OLDEST + timedelta(seconds=1)
    ec2.fail(Fault.SERVER_ERROR, 1000)
    with pytest.raises(UnknownOutcomeError):
        catalogue.offers(Requirements(), REGIONS)


@pytest.mark.parametrize("text", ["", "{", "[]", '{"format": 0}', json.dumps({"format": 1, "at": "x", "part": {}})])
def test_a_broken_file_is_none(ec2: Ec2, text: str) -> None:
    """Half a file, one of another version, or one that somebody edited: it is read anew."""
    clock = Clock()
    first = catalogue_of(ec2, clock).offers(Requirements(), REGIONS)
    files = list(cache_folder().glob("*/*.json"))
    assert len(files) == 2
    for file in files:
        file.write_text(text)
    assert catalogue_of(ec2, clock).offers(Requirements(), REGIONS) == first
    assert all(json.loads(file.read_text())["format"] == 1 for file in files)


def test_a_folder_that_cannot_be_written_is_no_obstacle(ec2: Ec2, kept: Path) -> None:
    """There is a file where the folder should be."""
    (kept / "dstack").write_text("")
    assert catalogue_of(ec2, Clock()).offers(Requirements(), REGIONS)


def test_files_hold_no_secret_and_are_for_one_person(ec2: Ec2) -> None:
    """Neither in their names nor inside."""
    catalogue_of(ec2, Clock()).offers(Requirements(), REGIONS)
    creds = ec2.config()["creds"]
    (folder,) = cache_folder().iterdir()
    assert folder.stat().st_mode & 0o777 == 0o700
    for file in folder.iterdir():
        text = str(file) + file.read_text()
        assert creds["secret_key"] not in text
        assert creds["access_key"] not in text


def test_a_larger_disk_costs_more(ec2: Ec2) -> None:
    """A disk is made as large as asked for, and paid for."""
    catalogue = catalogue_of(ec2, Clock())
    (usual,) = {one for one in catalogue.offers(Requirements(instance_types=("m5.large",)), REGIONS) if _is_one(one)}
    wanted = Requirements(instance_types=("m5.large",), disk_mib=Range(min=500 * 1024 + 1))
    (larger,) = {one for one in catalogue.offers(wanted, REGIONS) if _is_one(one)}
    assert larger.resources.disk_mib == 501 * 1024
    assert larger.price - usual.price == pytest.approx(401 * 0.08 / 730, abs=1e-5)
    capped = catalogue.offers(Requirements(disk_mib=Range(max=50 * 1024)), REGIONS)
    assert {one.resources.disk_mib for one in capped} == {50 * 1024}


def _is_one(offer: object) -> bool:
    return (getattr(offer, "zone", None), getattr(offer, "spot", None)) == ("us-east-1a", False)


def test_a_quota_is_compared_with_what_is_needed(ec2: Ec2) -> None:
    """One that is too small for the largest is large enough for others."""
    ec2.plane.quota("us-east-1 L-1216C47A", 4)
    offers = catalogue_of(ec2, Clock()).offers(Requirements(), REGIONS)
    short = {one.instance_type: one.reason for one in offers if not one.spot and not one.availability.worth_trying}
    assert short == {
        "r5.2xlarge": "needs 8 vCPUs, and the account may have 4 (quota L-1216C47A in us-east-1)",
        "p4d.24xlarge": "needs 96 vCPUs, and the account may have 0 (quota L-417A185B in us-east-1)",
    }


def test_an_error_is_the_error_of_all_who_wait(ec2: Ec2) -> None:
    """And not of those who ask later."""
    catalogue = catalogue_of(ec2, Clock())
    ec2.fail(Fault.SERVER_ERROR, 1000)
    with pytest.raises(BackendError):
        catalogue.offers(Requirements(), REGIONS)
    ec2.heal()
    assert catalogue.offers(Requirements(), REGIONS)


def test_every_gpu_of_amazon_is_known() -> None:
    """Each NVIDIA GPU of every instance type that moto knows has a compute capability, and a name that users write."""
    from moto.ec2.models.instance_types import INSTANCE_TYPES

    found = {
        (one["Name"], one["MemoryInfo"]["SizeInMiB"])
        for entry in INSTANCE_TYPES.values()
        for one in entry.get("GpuInfo", {}).get("Gpus", ())
        if one["Manufacturer"] == "NVIDIA"
    }
    assert len(found) > 10
    assert [name for name, _ in sorted(found) if not known(name)] == []
    assert gpu("RTX PRO Server 6000", 98304, "NVIDIA").name == "RTXPRO6000"


@pytest.mark.parametrize(
    ("name", "demand", "spot"),
    [
        ("m5.large", "L-1216C47A", "L-34B43A08"),
        ("g5.xlarge", "L-DB2E81BA", "L-3819A6DF"),
        ("p4d.24xlarge", "L-417A185B", "L-7212CCBC"),
        ("p5.48xlarge", "L-417A185B", "L-C4BD4855"),
        ("inf2.xlarge", "L-1945791B", "L-B5D1601B"),
        ("trn1.2xlarge", "L-2C3B7624", "L-6B0D517C"),
        ("x2idn.16xlarge", "L-7295265B", "L-E3A00192"),
        ("u-6tb1.56xlarge", "L-43DA4232", None),
    ],
)
def test_the_quota_of_a_type(name: str, demand: str, spot: str | None) -> None:
    """Families have quotas of their own."""
    assert (quota_of(name, spot=False), quota_of(name, spot=True)) == (demand, spot)


@pytest.mark.parametrize(
    ("entry", "said"),
    [
        ({"regions": ["us-east-1a"]}, "a zone, us-east-1a, is not"),
        ({"regions": ["here"]}, "is no name of a region"),
        ({"vpc": "default"}, "vpc"),
        ({"vpc": "vpc-0abc"}, "set `regions` to that one"),
        ({"ami": "ubuntu"}, "is no id of an image"),
        ({"ami": {"us-east-1": "x"}}, "is no id of an image"),
        ({"tags": {"Owner": "me"}}, "Choose another key"),
        ({"tags": {"aws:x": "y"}}, "Choose another key"),
        ({"tags": {"k" * 200: "y"}}, "too long"),
        ({"creds": {"type": "role", "role_arn": "dstack"}}, "role_arn"),
        ({"creds": {"type": "access_key", "access_key": "AKIA"}}, "secret_key"),
        ({"creds": {"type": "no-such-kind"}}, "creds"),
        ({"endpoint_url": "localhost"}, "endpoint_url"),
        ({"region": "us-east-1"}, "region"),
    ],
)
def test_what_is_wrong_with_a_configuration_is_said(entry: dict[str, object], said: str) -> None:
    """Which key it is, and what it should be."""
    with pytest.raises(ValidationError, match=said):
        AwsConfig.model_validate({"type": "aws", **entry})
