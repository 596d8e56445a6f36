"""What a machine that boots is told of a job: what it needs, and nothing else."""

from __future__ import annotations

import json
import random
from pathlib import Path
from uuid import UUID

import pytest

from dstack_core._engine.intents import IntentFor, render_intent
from dstack_core._engine.keyring import Keyring
from dstack_core._engine.seams import Seams, SystemIds
from dstack_core._engine.specs import job_specs
from dstack_core._models.configurations import Task
from dstack_core._models.instances import InstanceRequest
from dstack_core._models.profiles import Profile
from dstack_core._models.runs import RunSpec
from dstack_core._transport.cloud_init import first_host_key
from dstack_core._transport.keys import key_pair
from dstack_core.errors import ConfigurationError
from dstack_core.plugin import Gpu, MachineResources, Offer
from tests.support.bench import ManualClock

SERVER, USER = key_pair(bytes([1]) * 32), key_pair(bytes([2]) * 32)
OFFER = Offer(
    backend="clouds",
    instance_type="gpu",
    region="r",
    resources=MachineResources(cpus=4.0, memory_mib=16384, disk_mib=102400, gpus=(Gpu("T4", 16384),)),
    price=1.0,
)


def request(ssh_key_pub: str | None = None, max_duration: int | None = None, **task: object) -> InstanceRequest:
    """What a cloud is asked for to run this."""
    rng = random.Random(1)
    seams = Seams(clock=ManualClock(), rng=rng, ids=SystemIds(rng))
    configuration = Task(commands=["true"], **task)  # type: ignore[arg-type]  # fields by name
    profile = Profile(max_duration=max_duration)
    (spec,) = job_specs(RunSpec(configuration=configuration, profile=profile, ssh_key_pub=ssh_key_pub), "run")
    whom = IntentFor.of(UUID(int=1), UUID(int=2), "run", "main", spec)
    keyring = Keyring(seams, lambda: SERVER)
    return render_intent(seams, UUID(int=3), whom, OFFER, Path("/agent.pyz"), 600, keyring).request


def files(asked: InstanceRequest) -> str:
    """All that is written on the machine's disk."""
    config = json.loads(asked.user_data.partition("\n")[2])
    return "".join(file["content"] for file in config["write_files"])


def test_nothing_of_the_job_is_in_it() -> None:
    """Neither its commands, nor its environment, nor the name of its image or its registry's password."""
    auth = {"username": "me", "password": "registry-password"}
    asked = request(env={"WORD": "secret-word"}, image="private/image:7", registry_auth=auth)
    for secret in ("secret-word", "registry-password", "private/image", "WORD"):
        assert secret not in asked.model_dump_json()


def test_what_the_job_needs_is_asked_for() -> None:
    """A container engine for an image, a look at the GPUs for a job that uses them, a time limit if it has one."""
    plain = files(request())
    assert "docker" not in plain
    assert "nvidia-smi" not in plain
    assert "nvidia-smi" in files(request(resources={"gpu": "T4"}))
    image = files(request(image="i", resources={"gpu": "T4"}, max_duration=3600))
    assert "docker info" in image
    assert "nvidia-ctk" in image
    asked = request(max_duration=3600)
    assert asked.expires_at is not None
    assert f"-ge {int(asked.expires_at.timestamp())} ]" in files(asked)


def test_who_is_let_in() -> None:
    """The server, and the user who brought a key; each machine has a host key of its own."""
    assert request().ssh_public_keys == (SERVER.public,)
    asked = request(ssh_key_pub=f"{USER.public} me@here\n")
    assert asked.ssh_public_keys == (SERVER.public, f"{USER.public} me@here")
    assert USER.public in asked.user_data
    assert first_host_key(asked.user_data) not in (SERVER.public, USER.public)
    assert SERVER.private.splitlines()[3] not in asked.user_data


@pytest.mark.parametrize("text", ["", "nonsense", f"{USER.public}\n{SERVER.public}", f'command="x" {USER.public}'])
def test_what_is_no_public_key_is_refused(text: str) -> None:
    """When the run is submitted, with an example of one."""
    with pytest.raises(ConfigurationError, match="ssh_key_pub is no public key"):
        request(ssh_key_pub=text)
