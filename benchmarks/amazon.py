"""All that Amazon sells, as dstack-aws keeps it: real instance types, prices made up, in a cache that is warm."""

from __future__ import annotations

import gzip
import json
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from importlib.resources import files
from typing import Any

from dstack_aws import AwsConfig
from dstack_aws._account import Account
from dstack_aws._catalogue import Catalogue, _Dated
from dstack_aws._market import Machine, Mood, Shelf, _gpus

from benchmarks.ours import Home, new_home

REGIONS = (
    *("us-east-1", "us-east-2", "us-west-1", "us-west-2", "eu-west-1", "eu-west-2", "eu-west-3", "eu-central-1"),
    *("eu-north-1", "ap-south-1", "ap-northeast-1", "ap-northeast-2", "ap-southeast-1", "ca-central-1"),
)
_CREDS = {"type": "access_key", "access_key": "AKIABENCH", "secret_key": "of-nobody"}


@contextmanager
def amazon() -> Iterator[tuple[Home, int]]:
    """A home whose server has Amazon as a backend, and how many offers there are."""
    with new_home() as home:
        backend = {"type": "aws", "regions": list(REGIONS), "creds": _CREDS}
        config = {"projects": [{"name": "main", "backends": [backend]}]}
        (home.path / "dstack" / "server" / "config.yml").write_text(json.dumps(config))
        yield home, fill(home, AwsConfig.model_validate(backend))


def fill(home: Home, config: AwsConfig) -> int:
    """Writes the cache as if all regions had just been read; says how many offers that makes."""
    catalogue = Catalogue(Account(config), config, home.path / "dstack" / "cache" / "aws")
    machines, now, count = dict(_machines()), datetime.now(UTC), 0
    for region in REGIONS:
        zones = tuple(f"{region}{letter}" for letter in "abc")
        prices = {name: 0.04 * machine.cpus + len(machine.gpus) for name, machine in machines.items()}
        spot = {f"{name}/{zone}": price / 3 for name, price in prices.items() for zone in zones}
        shelf = Shelf(machines, dict.fromkeys(machines, zones), prices, 0.08)
        catalogue._to_file(catalogue._shelf, region, _Dated(now, shelf))  # noqa: SLF001  # as it writes it itself
        catalogue._to_file(catalogue._mood, region, _Dated(now, Mood(spot)))  # noqa: SLF001  # likewise
        count += len(zones) * sum(1 + machine.spot for machine in machines.values())
    return count


def _machines() -> Iterator[tuple[str, Machine]]:
    """As Amazon describes them; the emulator of the tests comes with these descriptions."""
    document = (files("moto.ec2") / "resources" / "instance_types.json.gz").read_bytes()
    types: dict[str, dict[str, Any]] = json.loads(gzip.decompress(document))
    for name, entry in types.items():
        if "on-demand" in entry["SupportedUsageClasses"] and not entry.get("BareMetal", False):
            arm = "arm64" in entry["ProcessorInfo"]["SupportedArchitectures"]
            yield (
                name,
                Machine(
                    cpus=entry["VCpuInfo"]["DefaultVCpus"],
                    memory_mib=entry["MemoryInfo"]["SizeInMiB"],
                    arch="arm" if arm else "x86",
                    spot="spot" in entry["SupportedUsageClasses"],
                    gpus=tuple(_gpus(entry)),
                ),
            )
