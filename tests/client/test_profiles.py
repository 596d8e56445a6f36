"""Profiles: which file they come from, which one is taken, and whose word holds for a run."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from dstack.api import Client, ConfigurationError, Profile, Resources, RetryPolicy, SpotPolicy, Task
from dstack.api.utils import load_profile
from dstack_core._models.requirements import effective_profile
from dstack_core._models.runs import RunPlan, RunSpec
from tests.client.scripted import TOKEN, ScriptedServer, json_of, run_model

Write = Callable[[str], Path]

TWO = """\
profiles:
- name: cheap
  spot_policy: spot
  max_price: 1.5
  max_duration: 2h
  backends: [aws, gcp]
  resources:
    gpu: 24GB..
    memory: 32GB
  retry: true
- name: careful
  spot_policy: on-demand
  max_duration: off
  default: true
"""


@pytest.fixture
def project(tmp_path: Path, own_home: Path) -> Path:
    """A folder to run from, with an empty home."""
    own_home.mkdir()
    folder = tmp_path / "project"
    folder.mkdir()
    return folder


def write(folder: Path, text: str, name: str = "profiles.yml") -> Path:
    """Writes a file of profiles."""
    folder.mkdir(exist_ok=True)
    (folder / name).write_text(text)
    return folder / name


def test_a_profile_by_name(project: Path) -> None:
    """With all that it says, in the forms that a file has."""
    write(project / ".dstack", TWO)
    profile = load_profile(project, "cheap")
    assert (profile.name, profile.spot_policy, profile.max_price, profile.max_duration) == (
        "cheap",
        SpotPolicy.SPOT,
        1.5,
        7200,
    )
    assert (profile.backends, profile.retry, profile.default) == (("aws", "gcp"), True, False)
    assert profile.resources == Resources(gpu="24GB..", memory="32GB")
    assert load_profile(str(project), "careful").max_duration == "off"


@pytest.mark.parametrize("name", ["profiles.yml", "profiles.yaml"])
@pytest.mark.parametrize("place", ["project", "home"])
def test_the_default_profile(project: Path, own_home: Path, name: str, place: str) -> None:
    """Without a name, the one that says so, from the project's file or from that of the home folder."""
    write(project / ".dstack" if place == "project" else own_home, TWO, name)
    assert load_profile(project).name == "careful"


@pytest.mark.parametrize("text", [None, "", "profiles:\n", "profiles: []\n", "profiles:\n- name: a\n"])
def test_without_a_default_profile(project: Path, text: str | None) -> None:
    """An empty one: nothing has to be set up."""
    if text is not None:
        write(project / ".dstack", text)
    assert load_profile(project) == Profile(name="default")


def test_the_projects_file_goes_first(project: Path, own_home: Path) -> None:
    """A name, or a default, is looked for in the project's own file, then in that of the home folder."""
    write(project / ".dstack", "profiles:\n- name: a\n  max_price: 1\n")
    write(own_home, "profiles:\n- name: a\n  max_price: 2\n- name: b\n  default: true\n")
    assert load_profile(project, "a").max_price == 1
    assert load_profile(project, "b").default
    assert load_profile(project).name == "b"


def test_a_project_that_is_the_users_own_folder(project: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """There, both files are one and the same."""
    monkeypatch.setenv("DSTACK_HOME", str(project / ".dstack"))
    file = write(project / ".dstack", TWO)
    with pytest.raises(ConfigurationError) as refusal:
        load_profile(project, "nope")
    assert str(refusal.value).count(str(file)) == 1


def test_a_name_that_nobody_has(project: Path, own_home: Path) -> None:
    """Says which ones there are, in which file."""
    own = write(project / ".dstack", TWO)
    general = write(own_home, "profiles: [{name: other}]\n")
    with pytest.raises(ConfigurationError) as refusal:
        load_profile(project, "chaep")
    assert str(refusal.value) == (f"There is no profile 'chaep'. {own} has: cheap, careful. {general} has: other.")


def test_a_name_and_no_file(project: Path, own_home: Path) -> None:
    """Says where to write one, and shows how."""
    with pytest.raises(ConfigurationError, match="There is no profile 'cheap'") as refusal:
        load_profile(project, "cheap")
    assert f"neither {project}/.dstack/profiles.yml nor {own_home}/profiles.yml" in str(refusal.value)
    assert "- name: cheap\n" in str(refusal.value)


def test_both_endings(project: Path) -> None:
    """Nobody knows which one holds."""
    write(project / ".dstack", TWO, "profiles.yaml")
    file = write(project / ".dstack", TWO)
    with pytest.raises(ConfigurationError) as refusal:
        load_profile(project)
    assert str(refusal.value) == f"There are both {file} and profiles.yaml: keep one of them."


@pytest.mark.parametrize(
    ("text", "line", "problem"),
    [
        ("profiles: [", 1, "not valid YAML"),
        ("- a\n", 1, "must have the form 'key: value'"),
        ("profile: []\n", 1, "profile: unknown key 'profile'. Did you mean 'profiles'? Allowed: profiles"),
        ("profiles: a\n", 1, "profiles: must be a list: start each entry with '- '"),
        ("profiles:\n- a\n", 2, "profiles[0]: must have the form 'key: value'"),
        ("profiles:\n- spot_policy: spot\n", 2, "profiles[0].name: a profile needs a name, for example 'name: cheap'"),
        ("profiles:\n- name: 5\n", 2, "profiles[0].name: a profile needs a name"),
        ("profiles:\n- name: a\n- name: a\n", 3, "profiles[1].name: there are two profiles 'a'; rename one"),
        (
            "profiles:\n- {name: a, default: true}\n- {name: b, default: true}\n",
            3,
            "profiles[1].default: two profiles say 'default: true'; keep one",
        ),
        ("profiles:\n- name: a\n  name: b\n", 3, "profiles[0].name: this key is given twice; keep one"),
        (
            "profiles:\n- name: a\n  spot-policy: spot\n",
            3,
            "profiles[0].spot-policy: unknown key 'spot-policy' (did you mean 'spot_policy'?); allowed: availability",
        ),
        (
            "profiles:\n- name: a\n  spot_policy: sopt\n",
            3,
            "profiles[0].spot_policy: input should be 'spot', 'on-demand' or 'auto', not 'sopt'",
        ),
        (
            "profiles:\n- name: a\n- name: b\n  resources:\n    gpu:\n      memroy: 24GB\n",
            6,
            "profiles[1].resources.gpu.memroy: unknown key 'memroy' (did you mean 'memory'?)",
        ),
        (
            "profiles:\n- name: a\n  retry:\n    on_event: [error]\n",
            4,
            "profiles[0].retry.on_event: unknown key 'on_event' (did you mean 'on_events'?); allowed: duration, on_ev",
        ),
        ("profiles:\n- name: a\n  default: maybe\n", 3, "profiles[0].default: input should be a valid boolean"),
        ("profiles:\n- name: a\n  commands: [x]\n", 3, "profiles[0].commands: unknown key 'commands'"),
    ],
)
def test_a_mistake_names_file_line_key_and_cure(project: Path, text: str, line: int, problem: str) -> None:
    """Whatever profile is asked for: one line for one mistake."""
    file = write(project / ".dstack", text)
    with pytest.raises(ConfigurationError) as refusal:
        load_profile(project)
    message = str(refusal.value)
    assert message.startswith(f"{file}, line {line}")
    assert problem in message
    assert "\n" not in message


def test_a_file_that_cannot_be_read(project: Path) -> None:
    """Names the file: bytes that are no text, or a folder in its place."""
    file = write(project / ".dstack", "")
    file.write_bytes(b"\xff\xfe\xfd")
    with pytest.raises(ConfigurationError, match=r"profiles\.yml cannot be read"):
        load_profile(project)
    file.unlink()
    file.mkdir()
    with pytest.raises(ConfigurationError, match=r"profiles\.yml cannot be read"):
        load_profile(project)


# ---------------------------------------------------------------------------------------------- whose word holds --


@pytest.fixture
def sent(server: ScriptedServer) -> Callable[..., RunSpec]:
    """What is sent to the server for a task with these fields and these arguments, by `submit` and by `get_plan`."""

    def spec(task: dict[str, Any], **arguments: Any) -> RunSpec:
        configuration = Task(commands=["true"], **task)
        plan = RunPlan(project_name="main", user="me", run_spec=run_model().run_spec, job_plans=())
        server.on("get_plan", lambda _: json_of(plan)).on("submit", lambda _: json_of(run_model()))
        with Client.from_config("main", server.url, TOKEN) as client:
            client.runs.get_plan(configuration, **arguments)
            client.runs.submit(configuration, **arguments)
        (asked,), (submitted,) = server.asked("get_plan"), server.asked("submit")
        assert asked["run_spec"] == submitted["run_spec"]
        return RunSpec.model_validate(submitted["run_spec"])

    return spec


def test_the_profile_is_part_of_the_run(sent: Callable[..., RunSpec]) -> None:
    """All that it says reaches the server, its name included."""
    profile = Profile(name="cheap", spot_policy="spot", max_price=2, regions=["eu"], tags={"a": "b"})
    assert sent({}, profile=profile).profile == profile


def test_arguments_win_over_the_profile_and_the_profile_over_the_configuration(sent: Callable[..., RunSpec]) -> None:
    """Field by field; what nobody says keeps its default."""
    spec = sent(
        {"max_price": 1, "spot_policy": "auto", "max_duration": "1h", "regions": ["us"]},
        profile=Profile(name="p", max_price=2, spot_policy="spot"),
        max_price=3,
    )
    holds = effective_profile(spec.configuration, spec.profile)
    assert (holds.max_price, holds.spot_policy, holds.max_duration, holds.regions) == (
        3,
        SpotPolicy.SPOT,
        3600,
        ("us",),
    )


def test_each_resource_is_taken_from_the_first_that_sets_it(sent: Callable[..., RunSpec]) -> None:
    """Argument, profile, configuration."""
    spec = sent(
        {"resources": Resources(cpu=1, memory="1GB", disk="1GB")},
        profile=Profile(resources=Resources(cpu=2, memory="2GB")),
        resources=Resources(cpu=3),
    )
    holds = effective_profile(spec.configuration, spec.profile).resources
    assert holds == Resources(cpu=3, memory="2GB", disk="1GB")


def test_a_retry_policy_takes_the_place_of_the_newer_spelling(sent: Callable[..., RunSpec]) -> None:
    """An argument replaces what the profile says of retries, in whichever spelling."""
    spec = sent({"retry": True}, profile=Profile(retry=True), retry_policy=RetryPolicy(limit="1h"))
    holds = effective_profile(spec.configuration, spec.profile)
    assert holds.retry_policy == RetryPolicy(retry=True, limit=3600)


def test_without_a_profile(sent: Callable[..., RunSpec]) -> None:
    """As ever: what was passed, under the name that says where it came from."""
    assert sent({}, max_price=3).profile == Profile(name="(python)", max_price=3)


def test_something_else_as_a_profile(sent: Callable[..., RunSpec]) -> None:
    """Its name alone is not the profile."""
    with pytest.raises(ConfigurationError, match=r"profile is a str; pass a Profile, or load_profile"):
        sent({}, profile="cheap")
