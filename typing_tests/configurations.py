"""Tasks, services and dev environments: what may be given, and what is read back."""

from typing import Literal, assert_type

from dstack.api import DevEnvironment, RegistryAuth, Resources, RetryPolicy, Service, SpotPolicy, Task, VirtualRepo


def tasks() -> None:
    """Every way to write the fields of a task."""
    task = Task(
        name="train",
        image="ghcr.io/team/train:1",
        user="1000:1000",
        privileged=False,
        entrypoint="/bin/sh -c",
        working_dir="src",
        home_dir="/root",
        registry_auth=RegistryAuth(username="robot", password="..."),
        nvcc=True,
        single_branch=True,
        env={"LEVEL": "info", "COUNT": 3, "FROM_HERE": None},
        shell="bash",
        resources=Resources(cpu=4),
        priority=50,
        volumes=["data:/data", "/mnt:/mnt"],
        docker=None,
        repos=["."],
        files=["a.txt", "b.txt:/tmp/b.txt"],
        setup=["apt-get update"],
        commands=["python train.py"],
        ports=[8080, "80:8081", "*:8082"],
        nodes=1,
    )
    assert_type(task.type, Literal["task"])
    assert_type(task.name, str | None)
    assert_type(task.commands, list[str])
    assert_type(task.env, dict[str, str | None])
    assert_type(task.registry_auth, RegistryAuth | None)
    assert_type(task.ports[0].container_port, int)
    assert_type(task.ports[0].local_port, int | None)
    assert_type(task.volumes[0].path, str)
    assert_type(task.files[0].local_path, str)
    assert_type(task.repos[0].url, str | None)
    assert_type(task.get_repo(), VirtualRepo)


def profile_fields() -> None:
    """The fields that a configuration shares with a profile."""
    task = Task(
        commands=["true"],
        backends=["local"],
        regions=["eu-west-1"],
        availability_zones=["eu-west-1a"],
        instance_types=["g5.xlarge"],
        reservation="r-1",
        spot_policy="auto",
        retry_policy=RetryPolicy(retry=True, limit="1d"),
        max_duration="1h",
        stop_duration=30,
        max_price=2,
        creation_policy="reuse",
        idle_duration="5m",
        startup_order="any",
        stop_criteria="all-done",
        fleets=["one"],
        instances=["two"],
        tags={"team": "research"},
        backend_options={"aws": {"capacity": "block"}},
    )
    assert_type(task.backends, tuple[str, ...] | None)
    assert_type(task.spot_policy, SpotPolicy | None)
    assert_type(task.max_duration, int | Literal["off"] | None)
    assert_type(task.stop_duration, int | None)
    assert_type(task.max_price, float | None)


def short_forms() -> None:
    """Fields that take several forms, each by itself."""
    Task(commands=["true"], env=["LEVEL=info", "FROM_HERE"])
    Task(commands=["true"], python="3.12")
    Task(commands=["true"], python=3.12)
    Task(commands=["true"], ports=[8080, 8081])
    Task(commands=["true"], ports=["8080:80"])
    Task(commands=["true"], max_duration="off")
    Task(commands=["true"], max_duration=3600)
    Task(commands=["true"], spot_policy=SpotPolicy.SPOT)
    Task(commands=["true"], retry=True)
    Task(image="hello-world")


def services() -> None:
    """A service, and what is read back of it."""
    service = Service(
        name="llama",
        port=8000,
        commands=["python serve.py"],
        gateway=None,
        strip_prefix=True,
        model="meta-llama/Llama-3.1-8B-Instruct",
        https="auto",
        auth=False,
        replicas=2,
    )
    assert_type(service.type, Literal["service"])
    assert_type(service.port.local_port, int | None)
    assert_type(service.auth, bool)
    assert_type(service.replicas.min, int | None)
    if service.model is not None:
        assert_type(service.model.name, str)
    Service(port="80:8000", commands=["true"], replicas="2..2")


def dev_environments() -> None:
    """A dev environment, and what is read back of it."""
    environment = DevEnvironment(
        name="workshop",
        ide="vscode",
        version=None,
        init=["pip install -r requirements.txt"],
        inactivity_duration="2h",
        ports=["*:8888"],
    )
    assert_type(environment.type, Literal["dev-environment"])
    assert_type(environment.ide, Literal["vscode", "cursor", "windsurf", "zed"] | None)
    assert_type(environment.inactivity_duration, int | Literal["off"] | None)
    DevEnvironment(inactivity_duration="off")


def documents() -> None:
    """A configuration is read from a dictionary and from JSON, and can be changed."""
    task = Task.model_validate({"commands": ["true"]})
    assert_type(task, Task)
    assert_type(Service.model_validate_json('{"port": 1, "commands": ["true"]}'), Service)
    task.name = "other"
    task.env = {"LEVEL": "debug"}
    task.resources = Resources(memory="1GB")
