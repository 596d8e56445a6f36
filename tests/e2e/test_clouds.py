"""Several clouds at once: one that is slow, one that refuses, and a run that goes from one to the next."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack
from pathlib import Path
from typing import Any, Protocol

import pytest

from dstack.api import Client, Profile, Resources, Run, RunStatus, Task
from dstack_core._cli.scaffold import Package
from dstack_core._models.runs import JobPlan
from dstack_core.plugin import Offer
from dstack_core.testing import Failure, Fault, NimbusServer, wait_until
from tests.support.azure import Azure
from tests.support.ec2 import Ec2
from tests.support.gcp import Gcp
from tests.support.homes import ROOT, Home, ended
from tests.support.lambda_cloud import LambdaCloud


class FrontEnd(Protocol):
    """A cloud that can be configured and made to fail."""

    def config(self) -> dict[str, Any]:
        """See `Cloud`."""

    def fail(self, kind: Fault, times: int = 1) -> Failure:
        """See `Faulty`."""

    def catalogue(self) -> Sequence[Offer]:
        """See `Catalogued`."""


# Each cloud, by the name of its backend, and who ends its machines if every server is off. To add one, add a line.
CLOUDS: dict[str, tuple[Callable[[], AbstractContextManager[Any]], str]] = {
    "aws": (lambda: Ec2(("us-east-1",)), "agent"),
    "lambda": (LambdaCloud, "nobody"),
    "gcp": (Gcp, "agent"),
    "azure": (Azure, "nobody"),
}
NAMES = list(CLOUDS)
# The small cloud beside them, whose backend is what `dstack plugin new` writes, and whose servers really run.
SMALL = "stratus"
# What each of them has, the small one at the highest price.
GPU = Resources(gpu="20GB..:1")
MANY = 100_000
# Seconds that a plan waits here for the slowest of them.
PATIENCE = 2


@pytest.fixture
def clouds(home: Home, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[dict[str, FrontEnd | NimbusServer]]:
    """All of them, configured for the home's server."""
    site = tmp_path / "site"
    add_small(site)
    with ExitStack() as stack:
        started = {name: stack.enter_context(make()) for name, (make, _) in CLOUDS.items()}
        started[SMALL] = stack.enter_context(NimbusServer(agents=tmp_path / "servers"))
        backends = [{"type": name, **cloud.config()} for name, cloud in started.items()]
        folder = home.path / "server"
        folder.mkdir(parents=True, mode=0o700)
        (folder / "config.yml").write_text(json.dumps({"projects": [{"name": "main", "backends": backends}]}))
        home.env["PYTHONPATH"] = f"{ROOT}:{site}"
        for name, value in {"PYTHONPATH": home.env["PYTHONPATH"], "DSTACK_HOME": str(home.path)}.items():
            monkeypatch.setenv(name, value)
        monkeypatch.setenv("HOME", str(home.path.parent))
        yield started


@pytest.fixture
def client(clouds: dict[str, FrontEnd]) -> Client:
    """A client of the server that has all clouds."""
    assert clouds
    return Client.from_config()


def add_small(site: Path) -> None:
    """Installs the small cloud's backend into a folder."""
    Package.of(SMALL).write(site)
    meta = site / f"dstack_{SMALL}-1.0.dist-info"
    meta.mkdir()
    (meta / "METADATA").write_text(f"Metadata-Version: 2.1\nName: dstack-{SMALL}\nVersion: 1.0\n")
    (meta / "entry_points.txt").write_text(f"[dstack.backends]\n{SMALL} = dstack_{SMALL}\n")


def plan(client: Client) -> JobPlan:
    """Where a task could run, on all clouds."""
    task = Task(commands=["true"], resources=GPU)
    return client.runs.get_plan(task, backends=[*CLOUDS, SMALL], spot_policy="on-demand").job_plans[0]


def notes_of(found: JobPlan, name: str) -> list[str]:
    """What is said about a cloud."""
    return [note for note in found.notes if note.startswith(f"{name}:")]


def terms_of(cloud: FrontEnd) -> set[tuple[str, float, str]]:
    """What a cloud sells on demand: type, USD per hour, and how."""
    return {(one.instance_type, round(one.price, 3), "on demand") for one in cloud.catalogue() if not one.spot}


def terms_in(line: str) -> tuple[str, float, str]:
    """What a line of the history names: `... (aws/us-east-1/us-east-1a, g6.xlarge, $0.8048/h, on demand): ...`."""
    found = re.search(r"\(\S+, (\S+), \$(\S+)/h, (spot|on demand)\)", line)
    assert found is not None, line
    return found[1], round(float(found[2]), 3), found[3]


def account(run: Run) -> list[str]:
    """What the server did, line by line."""
    return b"".join(run.logs(diagnose=True)).decode().splitlines()


def test_the_offers_of_all_clouds_are_side_by_side(client: Client, clouds: dict[str, FrontEnd]) -> None:
    """The cheapest first, whichever cloud it is of, each at the price of its cloud, and with who ends it in the end."""
    offers = plan(client).offers
    assert {offer.backend for offer in offers} == {*CLOUDS, SMALL}
    prices = [offer.price for offer in offers if offer.availability in ("available", "unknown")]
    assert prices == sorted(prices)
    for name, cloud in clouds.items():
        sold = {(one.instance_type, one.region, one.zone, one.spot): one.price for one in cloud.catalogue()}
        for offer in (one for one in offers if one.backend == name):
            kind = (offer.instance.name, offer.region, offer.zone, offer.instance.resources.spot)
            assert offer.price == pytest.approx(sold[kind], rel=0.001), kind
            assert offer.terminates_itself == CLOUDS.get(name, (None, "agent"))[1]


@pytest.mark.parametrize("slow", NAMES)
def test_a_cloud_that_does_not_answer_is_named(
    clouds: dict[str, FrontEnd], slow: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It answers nobody before the test is over, and the plan is there all the same, after as long as a plan waits."""
    monkeypatch.setenv("DSTACK_PLAN_TIMEOUT_SECONDS", str(PATIENCE))
    clouds[slow].fail(Fault.HANG, MANY)
    client = Client.from_config()

    def said_beside_all_others() -> list[str]:
        # The first plan may find one of them still loading its SDK.
        found = plan(client)
        whole = {offer.backend for offer in found.offers} == {*CLOUDS, SMALL} - {slow}
        return notes_of(found, slow) if whole else []

    (note,) = wait_until(said_beside_all_others, timeout=60, what="a plan with all clouds but one")
    assert f"did not answer within {PATIENCE} s" in note


@pytest.mark.parametrize("expired", NAMES)
def test_a_cloud_that_lets_nobody_in_hides_no_other(client: Client, clouds: dict[str, FrontEnd], expired: str) -> None:
    """What is wrong with its credentials is said, and the other clouds are in the plan."""
    words = clouds[expired].fail(Fault.UNAUTHORIZED, MANY).words
    found = plan(client)
    assert {offer.backend for offer in found.offers} == {*CLOUDS, SMALL} - {expired}
    (note,) = notes_of(found, expired)
    assert words in note


def test_a_run_goes_from_one_cloud_to_the_next(client: Client, clouds: dict[str, FrontEnd]) -> None:
    """Each cloud that is cheaper refuses for want of capacity; the last one has it; the run says what it was to buy."""
    said = {name: clouds[name].fail(Fault.NO_CAPACITY, MANY).words for name in CLOUDS}
    profile = Profile(name="one", backends=[*CLOUDS, SMALL], spot_policy="on-demand")
    run = client.runs.submit(Task(commands=["echo here"], resources=GPU), profile=profile)
    assert b"".join(run.logs()) == b"here\n", account(run)
    assert ended(run).status is RunStatus.DONE
    assert run.backend == SMALL
    history = account(run)
    for name, words in said.items():
        refused = [line for line in history if f"({name}/" in line and "intent -> failed" in line]
        assert refused, (name, history)
        assert all(words in line and terms_in(line) in terms_of(clouds[name]) for line in refused), (name, refused)
    (runs,) = [line for line in history if f"({SMALL}/" in line and "starting -> running" in line]
    assert terms_in(runs) in terms_of(clouds[SMALL])
