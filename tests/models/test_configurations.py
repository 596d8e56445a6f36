"""Tasks, services and dev environments: what they accept, and what they say to what they do not."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
from pydantic import ValidationError

from dstack_core._models._base import explain
from dstack_core._models.configurations import (
    DevEnvironment,
    FilePathMapping,
    InstanceMountPoint,
    PortMapping,
    RegistryAuth,
    RepoSpec,
    Service,
    Task,
    VolumeMountPoint,
    check_run_name,
    fill_env,
)
from dstack_core._models.resources import GPU, Memory, Range, Resources
from dstack_core._models.runs import RunSpec
from dstack_core._models.services import OpenAIChatModel, RateLimit, Scaling, TGIChatModel
from dstack_core.errors import ConfigurationError


def test_the_program_of_the_api_page() -> None:
    """The models of the API page's example are accepted word for word."""
    task = Task(
        image="ghcr.io/huggingface/text-generation-inference:latest",
        env={"MODEL_ID": "TheBloke/Llama-2-13B-chat-GPTQ"},
        commands=[
            "text-generation-launcher --trust-remote-code --quantize gptq",
        ],
        ports=["80"],
    )
    resources = Resources(gpu=GPU(memory="24GB"))
    assert task.ports == [PortMapping(local_port=80, container_port=80)]
    assert task.env == {"MODEL_ID": "TheBloke/Llama-2-13B-chat-GPTQ"}
    assert resources.gpu is not None
    assert resources.gpu.memory == Range(min=Memory("24GB"))


# ---------------------------------------------------------------------------------------------------------- ports --


@pytest.mark.parametrize(
    ("written", "local", "job"),
    [(8080, 8080, 8080), ("8080", 8080, 8080), ("80:8080", 80, 8080), ("*:80", None, 80), (65535, 65535, 65535)],
)
def test_a_port_and_where_it_appears(written: int | str, local: int | None, job: int) -> None:
    """One number is the same port on both sides, two are local and job, and a star picks a free local one."""
    assert Task(commands=["x"], ports=[written]).ports == [PortMapping(local_port=local, container_port=job)]
    assert PortMapping.parse(written) == PortMapping(local_port=local, container_port=job)


@pytest.mark.parametrize(
    "nonsense",
    [
        "0:80",
        ":80",
        "80:",
        "abc",
        "80:80:80",
        "",
        0,
        -1,
        65536,
        "65536",
        "80:65536",
        "99999999",
        True,
        8.5,
        None,
        ["80"],
    ],
)
def test_what_is_no_port_is_refused(nonsense: Any) -> None:
    """The message says which of the ports it is."""
    with pytest.raises(ConfigurationError, match=r"^Task: ports\[1\]"):
        Task(commands=["x"], ports=[22, nonsense])


def test_ports_between_10000_and_10999_are_ports() -> None:
    """The old API dropped them silently."""
    assert Task(commands=["x"], ports=[10500]).ports[0].container_port == 10500


def test_a_port_is_given_once() -> None:
    """The same port of the job, or the same local port, cannot be given twice; free ones can."""
    with pytest.raises(ConfigurationError, match="ports: port 80 is given twice"):
        Task(commands=["x"], ports=["8080:80", "9090:80"])
    with pytest.raises(ConfigurationError, match="ports: local port 8080 is given twice"):
        Task(commands=["x"], ports=["8080:80", "8080:81"])
    assert len(Task(commands=["x"], ports=["*:80", "*:81"]).ports) == 2


@pytest.mark.parametrize(("written", "local", "job"), [(8080, 80, 8080), ("8080", 80, 8080), ("8000:8080", 8000, 8080)])
def test_the_port_of_a_service(written: int | str, local: int, job: int) -> None:
    """A bare port appears on the usual port of the web."""
    assert Service(commands=["x"], port=written).port == PortMapping(local_port=local, container_port=job)


@pytest.mark.parametrize("nonsense", ["*:80", PortMapping(container_port=80), {"container_port": 80}])
def test_a_service_has_a_fixed_port(nonsense: Any) -> None:
    """A port that is picked at random would be found by nobody."""
    with pytest.raises(ConfigurationError, match="a service needs a fixed port"):
        Service(commands=["x"], port=nonsense)


# ---------------------------------------------------------------------------------------------------- environment --


def test_environment_as_dictionary_or_list() -> None:
    """Both forms give the same, numbers become text, and a value may hold an equals sign or nothing."""
    as_list = Task(commands=["x"], env=["A=1", "B=x=y", "C="]).env
    assert as_list == Task(commands=["x"], env={"A": 1, "B": "x=y", "C": ""}).env == {"A": "1", "B": "x=y", "C": ""}


def test_a_name_alone_is_taken_from_the_environment_of_whoever_submits() -> None:
    """The values are filled in at submit, in a copy."""
    task = Task(commands=["x"], env=["HF_TOKEN", "A=1"])
    filled = fill_env(task, {"HF_TOKEN": "s3cret", "OTHER": "x"})
    assert filled.env == {"HF_TOKEN": "s3cret", "A": "1"}
    assert task.env == {"HF_TOKEN": None, "A": "1"}
    assert fill_env(filled, {}) is filled


def test_a_name_alone_that_is_set_nowhere_is_an_error() -> None:
    """All missing names are listed, with the cure."""
    with pytest.raises(ConfigurationError, match=r"^Task: env: not set in your environment: A, B\. Set it \(export A="):
        fill_env(Task(commands=["x"], env=["A", "B", "C=1"]), {"C": "2"})


def test_a_duplicate_name_is_refused() -> None:
    """Two values for one name is a mistake."""
    with pytest.raises(ConfigurationError, match=r"^Task: env: 'A' is given twice"):
        Task(commands=["x"], env=["A=1", "B=2", "A=3"])


@pytest.mark.parametrize(
    "nonsense",
    [
        "TOKEN=hunter2",
        {"TOKEN": ["hunter2"]},
        {"TOKEN": {"a": "hunter2"}},
        {"TOKEN": True, "OTHER": "hunter2"},
        ["hunter2 hunter2"],
        ["=hunter2"],
        [["hunter2"]],
        {"TOKEN": "hunter2\0"},
        ["TOKEN=hunter2\0"],
        [{"TOKEN": "hunter2"}],
    ],
)
def test_a_wrong_environment_is_refused_without_its_values(nonsense: Any) -> None:
    """The message says what is wrong and repeats no value, which may be a secret."""
    with pytest.raises(ConfigurationError, match=r"^Task: env: ") as refusal:
        Task(commands=["x"], env=nonsense)
    assert "hunter2" not in str(refusal.value)


def test_secrets_are_shown_nowhere() -> None:
    """Neither `repr` nor a refusal shows the values of variables or a registry's credentials."""
    task = Task(image="x", env={"TOKEN": "hunter2"}, registry_auth=RegistryAuth(username="joe", password="hunter3"))
    for text in (repr(task), str(task), repr(task.registry_auth)):
        assert "hunter" not in text
        assert "joe" not in text
    for wrong in ({"passwrd": "hunter3"}, {"username": ["hunter3"], "password": 5}, "joe:hunter3", ["hunter3"]):
        with pytest.raises(ConfigurationError, match=r"^Task: registry_auth") as refusal:
            Task.model_validate({"image": "x", "registry_auth": wrong})
        assert "hunter" not in str(refusal.value)


def test_a_misplaced_secret_is_not_repeated() -> None:
    """What stands where nothing, or something else, should stand is not shown either."""
    with pytest.raises(ConfigurationError) as refusal:
        Task.model_validate(
            {"commands": "x hunter2", "enviro": {"T": "hunter2"}, "password": "hunter2", "setup": [{"T": "hunter2"}]}
        )
    assert "hunter2" not in str(refusal.value)
    assert refusal.value.__cause__ is None


# ------------------------------------------------------------------------------------------------ what is executed --


@pytest.mark.parametrize("kind", [Task, Service])
def test_something_has_to_run(kind: Any) -> None:
    """Commands or an image: without both there is nothing to run."""
    port = {"port": 80} if kind is Service else {}
    nothings: list[dict[str, Any]] = [{}, {"commands": []}, {"image": None}]
    for nothing in nothings:
        with pytest.raises(ConfigurationError, match="there is nothing to run: set 'commands', 'image' or both"):
            kind(**nothing, **port)
    assert kind(commands=[], image="nginx", **port).commands == []
    assert kind(commands=["x"], **port).image is None


def test_one_command_is_still_a_list() -> None:
    """Text in place of the list is answered with the cure."""
    with pytest.raises(ConfigurationError, match=r"^Task: commands: .* put the text in brackets, \['\.\.\.'\]$"):
        Task.model_validate({"commands": "python train.py"})


@pytest.mark.parametrize(
    ("written", "version"),
    [("3.12", "3.12"), (3.12, "3.12"), (3.1, "3.10"), ("3.10", "3.10"), ("3.8", "3.8"), (3.9, "3.9")],
)
def test_python_versions(written: Any, version: str) -> None:
    """A version may be written as a number, and 3.1 is what is left of an unquoted 3.10."""
    assert Task(commands=["x"], python=written).python == version


@pytest.mark.parametrize("nonsense", ["3.7", 3, "3.15", "latest", "3.12.1", True, ["3.12"]])
def test_other_python_versions_are_refused(nonsense: Any) -> None:
    """The message lists those that exist."""
    with pytest.raises(
        ConfigurationError, match=r"^Task: python: .* is not a supported Python version: 3\.8, .*3\.14$"
    ):
        Task(commands=["x"], python=nonsense)


def test_image_and_python_exclude_each_other() -> None:
    """An image brings its own Python."""
    for kind in (Task, DevEnvironment):
        with pytest.raises(ConfigurationError, match="set 'image' or 'python', not both"):
            kind(image="nginx", python="3.12")
    with pytest.raises(ConfigurationError, match="'docker' brings its own image"):
        Task(commands=["x"], docker=True, image="nginx")


def test_an_entrypoint_is_a_command_line() -> None:
    """A quote that is left open is found before anything is submitted."""
    assert Task(image="x", entrypoint="/bin/sh -c 'a b'").entrypoint == "/bin/sh -c 'a b'"
    with pytest.raises(ConfigurationError, match=r"^Task: entrypoint: .*No closing quotation"):
        Task(image="x", entrypoint="/bin/sh -c 'a")


@pytest.mark.parametrize("shell", ["sh", "bash", "/bin/zsh", None])
def test_shells(shell: str | None) -> None:
    """Two by name, any by its path."""
    assert Task(commands=["x"], shell=shell).shell == shell


@pytest.mark.parametrize("shell", ["zsh", "bin/zsh", "", 3])
def test_other_shells_are_refused(shell: Any) -> None:
    """Neither a name nor an absolute path."""
    with pytest.raises(ConfigurationError, match=r"^Task: shell: .* write 'sh', 'bash' or an absolute path"):
        Task(commands=["x"], shell=shell)


def test_run_names() -> None:
    """Small letters, digits and dashes; the message says so."""
    assert Task(commands=["x"], name="my-run-1").name == check_run_name("my-run-1") == "my-run-1"
    for nonsense in ("My-run", "1run", "a", "a" * 42, "my_run", "run\n", "", 3):
        with pytest.raises(ConfigurationError, match="cannot name a run: use 2 to 41 small letters"):
            check_run_name(nonsense)
        with pytest.raises(ConfigurationError, match=r"^Task: name: "):
            Task.model_validate({"commands": ["x"], "name": nonsense})


# ------------------------------------------------------------------------------------------------- files, volumes --


def test_volumes() -> None:
    """A name is a volume, an absolute path is a folder of the machine."""
    volumes = ["data:/data", "/mnt/a:/b", {"name": ["a", "b"], "path": "/c"}]
    task = Task.model_validate({"commands": ["x"], "volumes": volumes})
    assert task.volumes == [
        VolumeMountPoint(name="data", path="/data"),
        InstanceMountPoint(instance_path="/mnt/a", path="/b"),
        VolumeMountPoint(name=["a", "b"], path="/c"),
    ]


@pytest.mark.parametrize(
    "nonsense", ["data", ":/data", "data:", "data:relative", 3, {"name": "a"}, {"instance_path": "a"}]
)
def test_what_is_no_volume_is_refused(nonsense: Any) -> None:
    """The message says which of the volumes it is, and nothing of unions."""
    with pytest.raises(ConfigurationError, match=r"^Task: volumes\[0\]") as refusal:
        Task(commands=["x"], volumes=[nonsense])
    assert "VolumeMountPoint: " not in str(refusal.value)


def test_files() -> None:
    """One path is the same on both sides, two are local and in the job."""
    assert Task(commands=["x"], files=["a.txt", "b:/c"]).files == [
        FilePathMapping(local_path="a.txt"),
        FilePathMapping(local_path="b", path="/c"),
    ]
    for nonsense in ("", "a:", 3):
        with pytest.raises(ConfigurationError, match=r"^Task: files\[0\]"):
            Task.model_validate({"commands": ["x"], "files": [nonsense]})


@pytest.mark.parametrize(
    ("written", "full"),
    [
        (".", {"local_path": ".", "path": "."}),
        ("./src:/code", {"local_path": "./src", "path": "/code"}),
        ("https://github.com/a/b", {"url": "https://github.com/a/b", "path": "."}),
        ("https://host:8443/a/b:/code", {"url": "https://host:8443/a/b", "path": "/code"}),
        ("git@github.com:a/b.git", {"url": "git@github.com:a/b.git", "path": "."}),
        ("git@github.com:a/b.git:/code", {"url": "git@github.com:a/b.git", "path": "/code"}),
    ],
)
def test_repositories_of_a_configuration(written: str, full: dict[str, str]) -> None:
    """A path or an address, and where it goes."""
    assert Task(commands=["x"], repos=[written]).repos == [RepoSpec(**full)]


def test_what_is_no_repository_is_refused() -> None:
    """At most one, with exactly one source."""
    for nonsense in ([""], ["a", "b"], [{"path": "."}], [{"local_path": ".", "url": "https://x/y/z"}], [3]):
        with pytest.raises(ConfigurationError, match=r"^Task: repos"):
            Task.model_validate({"commands": ["x"], "repos": nonsense})


# -------------------------------------------------------------------------------------------------------- services --


def test_replicas_are_exact_unless_a_range() -> None:
    """A number of replicas is that number; a range needs to know when there are how many."""
    assert Service(commands=["x"], port=80).replicas == Range(1, 1)
    assert Service(commands=["x"], port=80, replicas=2).replicas == Range(2, 2)
    scaling = Scaling(metric="rps", target=10)
    assert Service(commands=["x"], port=80, replicas="..4", scaling=scaling).replicas == Range(0, 4)
    for replicas in ("1..4", "0..", -1, "many", None):
        with pytest.raises(ConfigurationError, match=r"^Service: (replicas: |replicas='.*' needs 'scaling')"):
            Service.model_validate({"commands": ["x"], "port": 80, "replicas": replicas})


def test_models_of_a_service() -> None:
    """A name is a model in OpenAI's protocol."""
    plain = Service(commands=["x"], port=80, model="llama")
    assert plain.model == OpenAIChatModel(name="llama", format="openai")
    detailed = Service.model_validate({"commands": ["x"], "port": 80, "model": {"name": "llama", "format": "tgi"}})
    assert detailed.model == TGIChatModel(name="llama", format="tgi")
    with pytest.raises(ConfigurationError, match=r"^Service: model: .*'openai', 'tgi'"):
        Service.model_validate({"commands": ["x"], "port": 80, "model": {"name": "llama", "format": "x"}})


def test_parts_of_a_service() -> None:
    """Limits, probes and scaling have their defaults, and wrong ones are found by their path."""
    service = Service.model_validate(
        {
            "port": 80,
            "commands": ["x"],
            "rate_limits": [{"rps": 5}, {"prefix": "/a", "rps": 1, "key": {"type": "header", "header": "X-User"}}],
            "probes": [{"type": "http", "url": "/health", "interval": "30s"}],
            "https": "auto",
            "gateway": "eu",
        }
    )
    assert service.rate_limits[0] == RateLimit(rps=5)
    assert service.probes is not None
    assert service.probes[0].interval == 30
    with pytest.raises(ConfigurationError, match=r"^Service: rate_limits\[0\]\.rps: this field is required$"):
        Service.model_validate({"commands": ["x"], "port": 80, "rate_limits": [{}]})
    with pytest.raises(ConfigurationError, match=r"^Service: https: .*boolean.*, or .*'auto'.*$"):
        Service.model_validate({"commands": ["x"], "port": 80, "https": "maybe"})


def test_dev_environments() -> None:
    """An IDE is one of four, or none."""
    assert DevEnvironment(ide="vscode", init=["pip install -e ."], inactivity_duration="2h").inactivity_duration == 7200
    assert DevEnvironment().ide is None
    with pytest.raises(ConfigurationError, match=r"^DevEnvironment: ide: .*'vscode'.*not 'vim'"):
        DevEnvironment.model_validate({"ide": "vim"})


# ------------------------------------------------------------------------------------------------- as Python objects --


def test_a_misspelt_field_is_answered_with_the_right_one() -> None:
    """The message names it, what was probably meant, and all that is allowed."""
    with pytest.raises(
        ConfigurationError,
        match=r"^Task: unknown field 'comands' \(did you mean 'commands'\?\); allowed: .*commands.*ports",
    ):
        Task.model_validate({"comands": ["x"]})
    with pytest.raises(
        ConfigurationError, match=r"^Task: resources\.gpu: unknown field 'memry' \(did you mean 'memory'"
    ):
        Task.model_validate({"commands": ["x"], "resources": {"gpu": {"memry": "24GB"}}})


def test_what_arrives_from_elsewhere_is_explained_alike() -> None:
    """A document of another kind that holds a configuration is explained with the same words and paths."""
    document = {
        "configuration": {
            "type": "task",
            "comands": [],
            "ports": ["x"],
            "tags": {"a": 1},
            "resources": {"gpu": {"nam": 1}},
        },
        "profile": {"max_price": 0},
    }
    with pytest.raises(ValidationError) as refusal:
        RunSpec.model_validate(document)
    lines = explain(refusal.value, RunSpec, "Run").splitlines()
    assert sorted(line[:60] for line in lines) == [
        "Run: configuration.ports[0]: 'x' is not a port: write 8080, ",
        "Run: configuration.resources.gpu: unknown field 'nam' (did y",
        "Run: configuration.tags.a: input should be a valid string, n",
        "Run: configuration: unknown field 'comands' (did you mean 'c",
        "Run: profile.max_price: input should be greater than 0, not ",
    ]
    for wrong, message in (({}, "'type' is required"), ({"type": "tusk"}, "'type' should be one of 'task', 'service'")):
        with pytest.raises(ValidationError) as refusal:
            RunSpec.model_validate({"configuration": wrong, "profile": {}})
        assert explain(refusal.value, RunSpec).startswith(f"RunSpec: configuration: {message}")


def test_a_broken_document_is_not_repeated() -> None:
    """Neither JSON that cannot be read nor something that is no document is shown: it may hold a secret."""
    for text in ('{"env": {"TOKEN": "hunter2"', '"hunter2"', "hunter2"):
        with pytest.raises(ConfigurationError, match=r"^Task: ") as refusal:
            Task.model_validate_json(text)
        assert "hunter2" not in str(refusal.value)
    with pytest.raises(ConfigurationError, match=r"^Task: input should be a valid dictionary or instance of Task$"):
        Task.model_validate("hunter2")


def test_refusals_are_value_errors() -> None:
    """Whoever caught pydantic's error, a `ValueError`, still catches ours, without pydantic's chain."""
    with pytest.raises(ValueError, match=r"^Task: ") as refusal:
        Task.model_validate({"commands": 3})
    assert refusal.value.__suppress_context__
    with pytest.raises(ConfigurationError, match=r"^Task: "):
        Task.model_validate_json("{]")


def test_a_configuration_can_be_changed_within_its_rules() -> None:
    """Changes are checked as the constructor checks; a refused one leaves everything as it was."""
    task = Task(commands=["x"])
    task.ports = ["80:8080"]
    task.image = "nginx"
    assert task.ports == [PortMapping(local_port=80, container_port=8080)]
    before = task.model_copy(deep=True)
    for name, value in (("python", "3.12"), ("ports", ["x"]), ("imge", "nginx"), ("commands", "x")):
        with pytest.raises(ConfigurationError, match=r"^Task: "):
            setattr(task, name, value)
    assert task == before
    assert task.model_fields_set == before.model_fields_set


@pytest.mark.parametrize("exclude_unset", [True, False])
def test_a_list_that_is_filled_in_place_is_kept(exclude_unset: bool) -> None:
    """What is appended to a field that was never set is not lost on the way to the server."""
    task = Task(image="x")
    task.commands.append("echo hello")
    task.env["A"] = "1"
    again = Task.model_validate_json(task.model_dump_json(exclude_unset=exclude_unset))
    assert (again.commands, again.env) == (["echo hello"], {"A": "1"})
    assert Task(image="x").commands == []


def test_configurations_copy_and_pickle() -> None:
    """Copies are equal and independent."""
    task = Task(commands=["x"], env={"A": "1"}, resources=Resources(gpu="A100:2", memory="8GB"), ports=["*:80"])
    for other in (copy.deepcopy(task), pickle.loads(pickle.dumps(task))):  # noqa: S301  # our own bytes
        assert other == task
        assert other.model_fields_set == task.model_fields_set
        other.commands.append("y")
        assert task.commands == ["x"]


def test_the_default_repository_is_an_empty_one() -> None:
    """As at 0.13.0, a run without a repository has one by the name of none."""
    assert Task(commands=["x"]).get_repo().repo_id == "none"
