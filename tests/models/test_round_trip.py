"""What was set stays set: every model goes through JSON and comes back the same, and its JSON Schema accepts it."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache
from typing import Any

import jsonschema
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from pydantic import BaseModel, TypeAdapter

from dstack_core._models import configurations as configurations_module
from dstack_core._models import offers, runs, wire
from dstack_core._models import profiles as profiles_module
from dstack_core._models import repos as repos_module
from dstack_core._models import resources as resources_module
from dstack_core._models import services as services_module
from dstack_core._models._base import UserModel
from dstack_core._models.configurations import DevEnvironment, Service, Task
from dstack_core._models.profiles import Profile, ProfileRetryPolicy, RetryEvent, SpotPolicy
from dstack_core._models.requirements import effective_profile, requirements_of
from dstack_core._models.resources import CPU, GPU, Disk, Memory, Range, Resources
from dstack_core._models.runs import RunSpec

PATIENT = settings(deadline=None, max_examples=40, suppress_health_check=[HealthCheck.too_slow])

# ----------------------------------------------------------------------------------------------------- strategies --


def some(**fields: st.SearchStrategy[Any]) -> st.SearchStrategy[dict[str, Any]]:
    """Documents with any subset of these fields."""
    return st.fixed_dictionaries({}, optional=fields)


def ranges(ends: st.SearchStrategy[Any], low: st.SearchStrategy[Any]) -> st.SearchStrategy[Any]:
    """All ways to write a range. `low` gives values that are at most those of `ends`."""
    return st.one_of(
        ends,
        ends.map("{}..".format),
        ends.map("..{}".format),
        st.tuples(low, ends).map(lambda both: f"{both[0]}..{both[1]}"),
        st.fixed_dictionaries({"min": low}, optional={"max": ends}),
        ends.map(lambda end: Range(max=end)),
    )


TEXT = st.text("abcXYZ 019-_/.:=é\n\"'$", max_size=12)
WORD = st.text("abcdefgh", min_size=1, max_size=8)
PATH = WORD.map("/{}".format)
WORDS = st.lists(WORD, min_size=1, max_size=3)
COUNT = st.integers(0, 512) | st.integers(0, 512).map(str)
SIZE = st.builds("{}{}{}".format, st.integers(1, 900), st.sampled_from(["", " "]), st.sampled_from(["GB", "gb", "TB"]))
SMALL = st.builds("{}MB".format, st.integers(1, 900))
SIZES = ranges(SIZE, SMALL)
COUNTS = ranges(COUNT, st.just(0))
SECONDS = st.integers(1, 10**6)
DURATION = SECONDS | st.builds("{}{}".format, st.integers(1, 99), st.sampled_from(["", "s", "m", " h", "d", "w"]))
LIMIT = DURATION | st.sampled_from(["off", False, True, None])
PORT = st.integers(1, 65535)

cpus = st.one_of(
    st.none(),
    COUNTS,
    st.sampled_from(["arm", "x86", "arm:8", "X86:2..4"]),
    some(count=COUNTS, arch=st.sampled_from(["arm", "x86", None])),
)
gpu_fields = some(
    vendor=st.sampled_from(["nvidia", "amd", "TPU", "tt", None]),
    name=WORD | WORDS,
    count=COUNTS,
    memory=SIZES,
    total_memory=SIZES,
    compute_capability=st.sampled_from(["7.5", 7.5, 8, [7, 5], (9, 0), None]),
)
gpus = st.one_of(
    st.none(),
    COUNTS,
    st.sampled_from(["A100", "a100:2", "24GB..", "A100,H100:1..4", "nvidia:24GB..80GB:2", "tpu", "tt:n150"]),
    gpu_fields,
)
resources = some(
    cpu=cpus,
    memory=SIZES | st.none(),
    gpu=gpus,
    shm_size=SIZE | st.none(),
    disk=SIZES | st.none() | st.builds(lambda size: {"size": size}, SIZES),
)
retries = some(retry=st.booleans(), limit=DURATION, on_events=st.lists(st.sampled_from([e.value for e in RetryEvent])))
PROFILE: dict[str, st.SearchStrategy[Any]] = {
    "backends": WORDS,
    "regions": WORDS | st.none(),
    "availability_zones": WORDS,
    "instance_types": WORDS,
    "reservation": WORD,
    "spot_policy": st.sampled_from([*SpotPolicy, *(policy.value for policy in SpotPolicy), None]),
    "max_duration": LIMIT,
    "stop_duration": DURATION | st.none(),
    "max_price": st.floats(0.001, 1e6) | st.integers(1, 9),
    "creation_policy": st.sampled_from(["reuse", "reuse-or-create"]),
    "idle_duration": LIMIT | st.just(-1),
    "utilization_policy": st.just({"min_gpu_utilization": 5, "time_window": "10m"}),
    "startup_order": st.sampled_from(["any", "master-first"]),
    "stop_criteria": st.just("all-done"),
    "schedule": st.sampled_from([{"cron": "0 * * * *"}, {"cron": ["0 * * * *", "5 * * * *"]}]),
    "fleets": WORDS,
    "instances": WORDS,
    "tags": st.dictionaries(WORD, TEXT, max_size=2),
    "backend_options": st.dictionaries(WORD, st.dictionaries(WORD, st.integers() | TEXT, max_size=2), max_size=2),
}
ONE_RETRY = st.one_of(
    st.fixed_dictionaries({"retry": st.booleans() | some(duration=DURATION)}),
    st.fixed_dictionaries({"retry_policy": retries}),
    st.just({}),
)
profiles = st.builds(dict.__or__, some(name=WORD, resources=resources, default=st.booleans(), **PROFILE), ONE_RETRY)
ports = st.lists(
    st.one_of(PORT, PORT.map(str), PORT.map("*:{}".format), st.fixed_dictionaries({"container_port": PORT})),
    max_size=3,
    unique_by=lambda port: str(port if not isinstance(port, dict) else port["container_port"]).removeprefix("*:"),
)
surroundings = st.one_of(
    some(image=WORD, entrypoint=st.just("sh -c 'a b'")), some(python=st.sampled_from(["3.12", 3.12, 3.1, "3.1", None]))
)
ENV_ITEMS = st.builds("{}={}".format, WORD, TEXT) | WORD
VOLUMES = st.builds("{}:{}".format, WORD | PATH, PATH) | st.fixed_dictionaries({"name": WORDS, "path": PATH})
FILES = WORD | st.builds("{}:{}".format, WORD, PATH) | st.fixed_dictionaries({"local_path": WORD})
REPOS = [".", "./a:/b", "https://host/a/b", "git@host:a/b.git:/c", {"url": "https://x/y/z", "branch": "b"}]
COMMON: dict[str, st.SearchStrategy[Any]] = {
    **PROFILE,
    "name": st.none() | WORD.map("r-{}".format),
    "user": WORD,
    "privileged": st.booleans(),
    "working_dir": TEXT,
    "home_dir": TEXT,
    "registry_auth": st.fixed_dictionaries({"password": TEXT}, optional={"username": TEXT | st.none()}),
    "nvcc": st.booleans() | st.none(),
    "single_branch": st.booleans(),
    "env": st.one_of(
        st.dictionaries(WORD, TEXT | st.none() | st.integers(), max_size=3),
        st.lists(ENV_ITEMS, max_size=3, unique_by=lambda item: item.partition("=")[0]),
    ),
    "shell": st.sampled_from(["sh", "bash", "/bin/zsh", None]),
    "resources": resources,
    "priority": st.integers(0, 100),
    "volumes": st.lists(VOLUMES, max_size=2),
    "repos": st.lists(st.sampled_from(REPOS), max_size=1),
    "files": st.lists(FILES, max_size=2),
    "dstack": st.booleans(),
    "setup": st.lists(TEXT, max_size=2),
}
COMMANDS = st.fixed_dictionaries({"commands": st.lists(TEXT, min_size=1, max_size=3)})


def kind(needed: st.SearchStrategy[dict[str, Any]], **own: st.SearchStrategy[Any]) -> st.SearchStrategy[dict[str, Any]]:
    """Documents of one kind of configuration."""
    parts = st.tuples(some(**COMMON, **own), surroundings, ONE_RETRY, needed)
    return parts.map(lambda documents: {key: value for document in documents for key, value in document.items()})


tasks = kind(COMMANDS, ports=ports, nodes=st.integers(1, 9) | st.none(), type=st.just("task"))
MODELS = ["llama", {"name": "a", "format": "tgi"}, {"type": "chat", "name": "a", "format": "openai"}, None]
KEYS = [{"type": "ip_address"}, {"type": "header", "header": "a"}]
limits = some(prefix=PATH, key=st.sampled_from(KEYS), burst=st.integers(0, 9)).map(lambda limit: limit | {"rps": 1})
probes = some(url=PATH, interval=DURATION, method=st.just("post")).map(lambda probe: probe | {"type": "http"})
services = kind(
    st.builds(dict.__or__, COMMANDS, st.fixed_dictionaries({"port": PORT | PORT.map("80:{}".format)})),
    gateway=st.booleans() | WORD,
    strip_prefix=st.booleans(),
    model=st.sampled_from(MODELS),
    https=st.booleans() | st.just("auto") | st.none(),
    auth=st.booleans(),
    rate_limits=st.lists(limits, max_size=2),
    probes=st.lists(probes, max_size=2),
    scaling=st.just({"metric": "rps", "target": 1.5, "window": "1m"}),
    replicas=st.integers(0, 9) | st.integers(0, 9).map(str),
)
environments = kind(
    st.just({}),
    ide=st.sampled_from(["vscode", "zed", None]),
    init=st.lists(TEXT, max_size=2),
    inactivity_duration=LIMIT,
    ports=ports,
)

EVERY: list[tuple[type[UserModel], st.SearchStrategy[Any]]] = [
    (Resources, resources),
    (GPU, gpu_fields),
    (ProfileRetryPolicy, retries),
    (Profile, profiles),
    (Task, tasks),
    (Service, services),
    (DevEnvironment, environments),
]

# ----------------------------------------------------------------------------------------------------------- tests --


def what_is_set(value: object) -> object:
    """The fields that are set, all the way down."""
    if isinstance(value, BaseModel):
        return {name: what_is_set(getattr(value, name)) for name in sorted(value.model_fields_set)}
    if isinstance(value, list | tuple):
        return [what_is_set(item) for item in value]
    return value


def plain(value: Any) -> Any:
    """A document as YAML or JSON would hold it."""
    if isinstance(value, Range):
        return {"min": value.min, "max": value.max}
    if isinstance(value, Mapping):
        return {key: plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [plain(item) for item in value]
    return value.value if isinstance(value, SpotPolicy) else value


@cache
def validator_of(model: type[UserModel]) -> jsonschema.Draft202012Validator:
    """A validator of a model's JSON Schema."""
    schema = model.model_json_schema()
    jsonschema.Draft202012Validator.check_schema(schema)
    return jsonschema.Draft202012Validator(schema)


@pytest.mark.parametrize(("model", "documents"), EVERY, ids=[model.__name__ for model, _ in EVERY])
def test_what_was_set_stays_set(model: type[UserModel], documents: st.SearchStrategy[Any]) -> None:
    """Through JSON, with and without `exclude_unset`, a model equals itself and knows what was set on it."""

    @PATIENT
    @given(documents)
    def check(document: Any) -> None:
        made = model(**document)
        for exclude_unset in (False, True):
            again = model.model_validate_json(made.model_dump_json(exclude_unset=exclude_unset))
            assert again == made
            assert what_is_set(again) == what_is_set(made)
            assert again.model_dump(mode="json") == made.model_dump(mode="json")

    check()


@pytest.mark.parametrize(("model", "documents"), EVERY, ids=[model.__name__ for model, _ in EVERY])
def test_the_schema_accepts_what_the_model_accepts(model: type[UserModel], documents: st.SearchStrategy[Any]) -> None:
    """Every document that a model accepts, short forms included, and every document it writes, fits its JSON Schema."""
    validator = validator_of(model)

    @PATIENT
    @given(documents)
    def check(document: Any) -> None:
        validator.validate(plain(document))
        validator.validate(model(**document).model_dump(mode="json"))

    check()


@pytest.mark.parametrize(
    ("model", "document"),
    [
        (Resources, {"memory": 24}),
        (Resources, {"gpus": 1}),
        (Resources, {"disk": "100"}),
        (GPU, {"memory": {"mim": "24GB"}}),
        (Profile, {"max_duration": "1h30m"}),
        (Profile, {"backends": []}),
        (Profile, {"spot_policy": "cheap"}),
        (Task, {"comands": []}),
        (Task, {"ports": ["abc"]}),
        (Task, {"ports": [0]}),
        (Task, {"name": "Not A Name"}),
        (Service, {"commands": ["x"]}),
        (DevEnvironment, {"ide": "vim"}),
    ],
)
def test_the_schema_refuses_what_editors_should_underline(model: type[UserModel], document: Any) -> None:
    """Common mistakes are already found by the JSON Schema."""
    assert list(validator_of(model).iter_errors(document))


@PATIENT
@given(
    st.one_of(
        tasks,
        services.map(lambda d: d | {"type": "service"}),
        environments.map(lambda d: d | {"type": "dev-environment"}),
    ),
    profiles,
)
def test_a_run_spec_keeps_what_was_set(configuration: dict[str, Any], profile: dict[str, Any]) -> None:
    """Client, server and database exchange run specs as JSON; what a run asks for stays the same."""
    kinds = {"service": Service, "dev-environment": DevEnvironment}
    made = kinds.get(configuration.get("type", "task"), Task)(**configuration)
    spec = RunSpec(configuration=made, profile=Profile(**profile))
    wanted = requirements_of(spec.configuration, spec.profile)
    for exclude_unset in (False, True):
        again = RunSpec.model_validate_json(spec.model_dump_json(exclude_unset=exclude_unset))
        assert type(again.configuration) is type(made)
        assert again == spec
        assert what_is_set(again.configuration) == what_is_set(made)
        assert requirements_of(again.configuration, again.profile) == wanted
        effective = effective_profile(again.configuration, again.profile)
        assert effective == effective_profile(made, spec.profile)
        assert what_is_set(effective) == what_is_set(effective_profile(made, spec.profile))
    assert type(wanted).model_validate_json(wanted.model_dump_json()) == wanted


MODULES = (resources_module, profiles_module, configurations_module, services_module, repos_module, offers, runs, wire)
ALL_MODELS = sorted(
    {
        model
        for module in MODULES
        for model in vars(module).values()
        if isinstance(model, type) and issubclass(model, BaseModel) and model is not BaseModel
    },
    key=lambda model: model.__name__,
)


@pytest.mark.parametrize("model", ALL_MODELS, ids=lambda model: str(model.__name__))
@pytest.mark.parametrize("mode", ["validation", "serialization"])
def test_every_model_has_a_json_schema(model: type[BaseModel], mode: Any) -> None:
    """The schema of each model, as it is read and as it is written, is valid and names the model's fields."""
    schema = model.model_json_schema(mode=mode)
    jsonschema.Draft202012Validator.check_schema(schema)
    whole = schema.get("$defs", {}).get(model.__name__, schema)
    assert set(whole.get("properties", {})) == set(model.model_fields)


@pytest.mark.parametrize("value", [Range(2, 8), Range(min=Memory("24GB")), Range(max=Memory("1536MB"))])
def test_ranges_alone_go_through_json(value: Range[Any]) -> None:
    """A range is text in JSON, whatever its ends are."""
    item = Memory if isinstance(value.min or value.max, Memory) else int
    adapter: TypeAdapter[Any] = TypeAdapter(Range[item])  # type: ignore[valid-type]  # chosen above
    assert adapter.validate_json(adapter.dump_json(value)) == value


def test_python_dumps_hold_everything() -> None:
    """`model_dump()` without a mode gives all fields as objects, for programs that look at them."""
    assert set(Resources().model_dump()) == {"cpu", "memory", "gpu", "shm_size", "disk"}
    assert Resources().model_dump(mode="json") == {}


def test_short_forms_have_a_reader() -> None:
    """`parse` reads a short form on its own."""
    assert GPU.parse("A100:2") == GPU(name="A100", count=2)
    assert CPU.parse("arm:8") == CPU(arch="arm", count=8)
    assert Resources(disk=Disk(size="1TB")) == Resources(disk="1TB")
