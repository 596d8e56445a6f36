"""The client: submitting, following, stopping, planning, finding. Needs a server to run."""

import sys
import warnings
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import assert_type
from uuid import UUID

from dstack.api import (
    GPU,
    Backend,
    BackendCollection,
    Client,
    LogsDroppedWarning,
    RepoCollection,
    Resources,
    RetryPolicy,
    Run,
    RunCollection,
    RunStatus,
    SpotPolicy,
    SubmittedRun,
    Task,
    VirtualRepo,
)


def clients(client: Client) -> None:
    """A client, its parts, and its ways to be made."""
    assert_type(Client.from_config(), Client)
    assert_type(client.runs, RunCollection)
    assert_type(client.repos, RepoCollection)
    assert_type(client.backends, BackendCollection)
    assert_type(client.project, str)
    Client.from_config("main", "http://127.0.0.1:3000", "token", ssh_identity_file=Path("~/.ssh/id_ed25519"))
    other = Client(client.client, "other", ssh_identity_file="~/.ssh/id_ed25519")
    with other as same:
        assert_type(same, Client)
    other.close()


def the_page(client: Client) -> None:
    """The program of the API page."""
    task = Task(
        image="ghcr.io/huggingface/text-generation-inference:latest",
        env={"MODEL_ID": "TheBloke/Llama-2-13B-chat-GPTQ"},
        commands=["text-generation-launcher --trust-remote-code --quantize gptq"],
        ports=["80"],
    )
    run = client.runs.submit(
        run_name="my-awesome-run",
        configuration=task,
        resources=Resources(gpu=GPU(memory="24GB")),
    )
    assert_type(run, SubmittedRun)
    assert_type(run.attach(), bool)
    run.check_attached()
    try:
        for log in run.logs():
            assert_type(log, bytes)
            sys.stdout.buffer.write(log)
            sys.stdout.buffer.flush()
    except KeyboardInterrupt:
        run.stop(abort=True)
    finally:
        run.detach()


def every_argument(client: Client) -> None:
    """Each argument of `submit`, `get_plan` and `exec_plan`."""
    task = Task(commands=["true"])
    client.runs.submit(
        task,
        configuration_path="train.dstack.yml",
        repo=VirtualRepo("none"),
        backends=["local", "aws"],
        resources=Resources(cpu=2),
        spot_policy=SpotPolicy.AUTO,
        retry_policy=RetryPolicy(retry=True),
        max_duration="1h",
        max_price=1.5,
        working_dir="src",
        run_name="train",
        reserve_ports=False,
    )
    plan = client.runs.get_plan(
        task,
        VirtualRepo("none"),
        configuration_path=None,
        backends=("local",),
        resources=None,
        spot_policy="on-demand",
        retry_policy=None,
        max_duration=60,
        max_price=None,
        working_dir=None,
        run_name=None,
    )
    assert_type(plan.project_name, str)
    for job in plan.job_plans:
        assert_type(job.total_offers, int)
        for offer in job.offers:
            assert_type(offer.price, float)
            assert_type(offer.instance.resources.memory_mib, int)
    assert_type(client.runs.exec_plan(plan, VirtualRepo("none"), reserve_ports=True), SubmittedRun)


def found(client: Client) -> None:
    """Runs that are found again, and all that is known of one."""
    assert_type(client.runs.list(all=True), list[Run])
    run = client.runs.get("train")
    assert_type(run, Run | None)
    if run is None:
        return
    assert_type(run.id, UUID)
    assert_type(run.name, str)
    assert_type(run.status, RunStatus)
    assert_type(run.status.is_finished, bool)
    assert_type(run.backend, str | None)
    assert_type(run.hostname, str | None)
    assert_type(run.ports, dict[int, int] | None)
    assert_type(run.exit_code, int | None)
    assert_type(run.message, str | None)
    assert_type(run.submitted_at, datetime)
    assert_type(run.finished_at, datetime | None)
    assert_type(run.cost, float)
    run.refresh()
    with run as same:
        assert_type(same, Run)
        same.attach(ssh_identity_file="~/.ssh/id_ed25519")


def output(run: Run) -> None:
    """Output, from some time on, and the account of the server."""
    warnings.simplefilter("error", LogsDroppedWarning)
    assert_type(run.logs(start_time=datetime.now(UTC) - timedelta(minutes=5)), Iterator[bytes])
    assert_type(b"".join(run.logs(diagnose=True)), bytes)


def backends(client: Client) -> None:
    """Which backends there are."""
    assert_type(client.backends.list(), list[Backend])
    for backend in client.backends.installed(check=True):
        assert_type(backend.name, str)
        assert_type(backend.title, str)
        assert_type(backend.state, str)
        assert_type(backend.reason, str | None)
        assert_type(backend.problems, tuple[str, ...])
