"""`load_configuration`: which file is read, what it says, and what a person is told about a mistake in it."""

from __future__ import annotations

import os
from contextlib import suppress
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dstack.api import ConfigurationError, DevEnvironment, Service, Task
from dstack.api.utils import load_configuration

TASK = "type: task\ncommands: [train]\n"

FILES = {
    "task": (
        (
            "type: task\nname: train\npython: 3.10\nenv:\n  A: 1\nports: ['8080', 8022:22]\n"
            "commands:\n- |\n  first\n  second\n- third\nresources: {gpu: 'A100:2', memory: 32GB..}\n"
        ),
        Task(
            name="train",
            python="3.10",
            env={"A": "1"},
            ports=["8080", "8022:22"],
            commands=["first\nsecond\n", "third"],
            resources={"gpu": "A100:2", "memory": "32GB.."},  # type: ignore[arg-type]  # a mapping, as in a file
        ),
    ),
    "service": (
        "type: service\nport: 8000\nimage: vllm\nmodel: llama\nreplicas: 2\nmax_duration: off\n",
        Service(port=8000, image="vllm", model="llama", replicas=2, max_duration="off"),
    ),
    "dev-environment": (
        "type: dev-environment\nide: vscode\ninit: [pip install -e .]\ninactivity_duration: 2h\n",
        DevEnvironment(ide="vscode", init=["pip install -e ."], inactivity_duration="2h"),
    ),
}


@pytest.mark.parametrize("kind", FILES)
def test_each_kind_of_run(tmp_path: Path, kind: str) -> None:
    """A file says what the constructor does."""
    text, wanted = FILES[kind]
    (tmp_path / ".dstack.yml").write_text(text)
    path, configuration = load_configuration(tmp_path)
    assert (path, configuration, type(configuration)) == (".dstack.yml", wanted, type(wanted))


def test_the_default_file_has_either_ending(tmp_path: Path) -> None:
    """One of them; both are refused."""
    (tmp_path / ".dstack.yaml").write_text(TASK)
    assert load_configuration(str(tmp_path))[0] == ".dstack.yaml"
    (tmp_path / ".dstack.yml").write_text(TASK)
    with pytest.raises(ConfigurationError, match=r"both .*\.dstack\.yml and \.dstack\.yaml: keep one"):
        load_configuration(tmp_path)


def test_a_working_directory(tmp_path: Path) -> None:
    """The default file is looked for there; its path starts from the project."""
    (tmp_path / "a" / "b").mkdir(parents=True)
    (tmp_path / "a" / "b" / ".dstack.yml").write_text(TASK)
    for work_dir in ("a/b", Path("a") / "b", str(tmp_path / "a" / "b"), "a/../a/b"):
        assert load_configuration(tmp_path, work_dir)[0] == "a/b/.dstack.yml"


def test_a_working_directory_outside(tmp_path: Path) -> None:
    """Refused, as for `submit`."""
    for work_dir in ("..", "a/../..", "/"):
        with pytest.raises(ConfigurationError, match="Working directory is outside of"):
            load_configuration(tmp_path / "project", work_dir)


def test_a_file_by_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Below the project, absolute, or elsewhere: the path that comes back leads there from the project."""
    (tmp_path / "project").mkdir()
    (tmp_path / "train.dstack.yml").write_text(TASK)
    (tmp_path / "project" / "run.yml").write_text(TASK)
    project = tmp_path / "project"
    assert load_configuration(project, "nowhere", "run.yml")[0] == "run.yml"
    assert load_configuration(project, configuration_file=project / "run.yml")[0] == "run.yml"
    assert load_configuration(project, configuration_file="../train.dstack.yml")[0] == "../train.dstack.yml"
    monkeypatch.chdir(project)
    assert load_configuration(".", configuration_file="run.yml")[0] == "run.yml"


def test_no_file(tmp_path: Path) -> None:
    """Names what was looked for, and where."""
    with pytest.raises(ConfigurationError) as refusal:
        load_configuration(tmp_path)
    assert str(refusal.value) == f"There is no .dstack.yml in {tmp_path}. Write one, or say which file to read."
    with pytest.raises(ConfigurationError, match=r"Configuration file .*/x\.yml does not exist\. Check its path"):
        load_configuration(tmp_path, configuration_file="x.yml")
    (tmp_path / "folder.yml").mkdir()
    with pytest.raises(ConfigurationError, match=r"folder\.yml cannot be read"):
        load_configuration(tmp_path, configuration_file="folder.yml")


KINDS = "write one of: type: task, type: service, type: dev-environment"


@pytest.mark.parametrize(
    ("text", "line", "problem"),
    [
        ("commands: [x]\n", 1, f"type: it is not said what this is; {KINDS}"),
        ("# nothing\n", None, f"type: it is not said what this is; {KINDS}"),
        ("name: a\ntype: tsk\n", 2, f"type: 'tsk' cannot be run. Did you mean 'task'? Instead, {KINDS}"),
        ("type: [task]\n", 1, f"type: ['task'] cannot be run. Did you mean 'task'? Instead, {KINDS}"),
        ("- task\n", 1, "must have the form 'key: value'"),
        ("type: task\ncommands: [x\n", 3, "not valid YAML"),
        ("type: task\ncommands:\n- x: y\n", 3, "commands[0]: input should be a valid string"),
        (TASK + "command: [x]\n", 3, "command: unknown key 'command' (did you mean 'commands'?); allowed: avail"),
        (TASK + "port: 80\n", 3, "port: unknown key 'port' (did you mean 'ports'?)"),
        (TASK + "5: x\n", 3, "5: the key must be text: put it in quotes, as '5'"),
        (TASK + "name: a\nname: b\n", 4, "name: this key is given twice; keep one"),
        (TASK + "resources:\n  cpus: 4\n", 4, "resources.cpus: unknown key 'cpus' (did you mean 'cpu'?)"),
        (TASK + "resources:\n  memory: 24\n", 4, "resources.memory: 24 is ambiguous: write '24GB' or '24MB'"),
        (
            TASK + "resources:\n  gpu:\n    name: A100\n    memroy: 80GB\n",
            6,
            "resources.gpu.memroy: unknown key 'memroy' (did you mean 'memory'?); allowed: compute_capability, count,",
        ),
        (
            TASK + "resources:\n  gpu: {name: A100, name: H100}\n",
            4,
            "resources.gpu.name: this key is given twice; keep one",
        ),
        (TASK + "ports:\n- 8080\n- eighty\n", 5, "ports[1]: 'eighty' is not a port: write 8080, '80:8080'"),
        (TASK + "retry:\n  on_event: [error]\n", 4, "retry.on_event: unknown key 'on_event' (did you mean 'on_events'"),
        (TASK + "env:\n  A: yes\n", 3, "env: the value of 'A' is not text: put it in quotes"),
        (TASK + "regions: eu\n", 3, "regions: 'eu' is not a list: write ['eu']"),
        (TASK + "max_duration: 1h30m\n", 3, "max_duration: '1h30m' is not a duration"),
        (
            TASK + "registry_auth:\n  usrname: a\n  password: b\n",
            4,
            "registry_auth.usrname: unknown key 'usrname' (did",
        ),
        (TASK + "image: x\npython: '3.12'\n", 1, "'image' brings its own Python: set 'image' or 'python', not both"),
        (
            TASK + "volumes:\n- {name: a, path: /x, optinal: true}\n",
            4,
            "volumes[0].optinal: unknown key 'optinal' (did you mean 'optional'?); allowed: instance_path, name, opt",
        ),
        ("type: service\ncommands: [x]\n", 1, "port: this field is required"),
        (
            "type: service\ncommands: [x]\nport: {local_prt: 1, container_port: 2}\n",
            3,
            "port.local_prt: unknown key 'local_prt' (did you mean 'local_port'?); allowed: container_port, local_port",
        ),
        (
            "type: service\ncommands: [x]\nport: 80\nmodel:\n  name: a\n  format: openai\n  prefx: /v1\n",
            7,
            "model.prefx: unknown key 'prefx' (did you mean 'prefix'?); allowed: format, name, prefix, type",
        ),
        (
            (
                "type: service\ncommands: [x]\nport: 80\nprobes:\n- type: http\n- type: http\n  headers:\n  - nam: a\n"
                "    name: b\n    value: c\n"
            ),
            8,
            "probes[1].headers[0].nam: unknown key 'nam' (did you mean 'name'?); allowed: name, value",
        ),
        ("type: dev-environment\nide: vim\n", 2, "ide: input should be 'vscode', 'cursor', 'windsurf' or 'zed'"),
        ("type: dev-environment\ninit: pip\n", 2, "init: this is a list of commands: put the text in brackets"),
    ],
)
def test_a_mistake_names_file_line_key_and_cure(tmp_path: Path, text: str, line: int | None, problem: str) -> None:
    """At every level: one line for one mistake, and the nearest key that there is."""
    file = tmp_path / ".dstack.yml"
    file.write_text(text)
    with pytest.raises(ConfigurationError) as refusal:
        load_configuration(tmp_path)
    message = str(refusal.value)
    assert message.startswith(f"{file}, line {line}" if line else f"{file}, ")
    assert problem in message
    assert "\n" not in message


def test_several_mistakes_in_the_order_of_their_lines(tmp_path: Path) -> None:
    """All at once, so that they are corrected at once."""
    file = tmp_path / ".dstack.yml"
    file.write_text("type: task\nspot_policy: sopt\ncommands: [x]\nresources:\n  cpus: 4\nmax_price: -1\n")
    with pytest.raises(ConfigurationError) as refusal:
        load_configuration(tmp_path)
    begin = [text.partition(": ")[0] for text in str(refusal.value).splitlines()]
    assert begin == [
        f"{file}, line 2, spot_policy",
        f"{file}, line 5, resources.cpus",
        f"{file}, line 6, max_price",
    ]


def test_secrets_are_not_repeated(tmp_path: Path) -> None:
    """A message about them says where they stand, and not what they are."""
    secret = "hush-hush"
    (tmp_path / ".dstack.yml").write_text(
        f"{TASK}env: [A={secret}, A={secret}]\nregistry_auth: {{password: [{secret}], usr: {secret}}}\n"
    )
    with pytest.raises(ConfigurationError) as refusal:
        load_configuration(tmp_path)
    assert secret not in str(refusal.value)
    assert len(str(refusal.value).splitlines()) == 3


def test_what_looks_like_a_number_or_a_date(tmp_path: Path) -> None:
    """Is what was written: no octal numbers, no times in base 60, no dates; a variable keeps its digits."""
    (tmp_path / ".dstack.yml").write_text(
        f"{TASK}env: {{V: 3.10, PIN: 0123, BIG: 1_000, DAY: 2024-01-01, HASH: 12e4567, AT: 22:22, N: -5, E: ''}}\n"
        "ports: [8022:22]\nregions: [0x10]\n"
    )
    task = load_configuration(tmp_path)[1]
    assert task.env == {
        "V": "3.10",
        "PIN": "0123",
        "BIG": "1_000",
        "DAY": "2024-01-01",
        "HASH": "12e4567",
        "AT": "22:22",
        "N": "-5",
        "E": "",
    }
    assert isinstance(task, Task)
    assert (task.ports[0].local_port, task.ports[0].container_port) == (8022, 22)
    assert task.regions == ("0x10",)


def test_parts_that_are_written_once(tmp_path: Path) -> None:
    """Anchors, aliases and merge keys of YAML can be used."""
    (tmp_path / ".dstack.yml").write_text(
        "type: task\ncommands: &c [a]\nsetup: *c\nenv: &e {A: b}\nresources:\n  <<: {memory: 4GB}\n  cpu: 2\n"
    )
    task = load_configuration(tmp_path)[1]
    assert (task.setup, task.resources.model_fields_set) == (["a"], {"memory", "cpu"})


KEYS = r"(type|task|service|commands|resources|gpu|env|port|<<|&a|\*a|[-:\[\]{}!# '\n0-9]){1,25}"


@given(st.text() | st.from_regex(KEYS) | st.from_regex(KEYS).map(lambda text: f"type: task\n{text}"))
def test_whatever_the_file_holds_the_answer_is_a_configuration_or_its_error(
    tmp_path_factory: pytest.TempPathFactory, text: str
) -> None:
    """Nothing that can be written into a file makes the loader fail in another way."""
    file = tmp_path_factory.mktemp("any") / ".dstack.yml"
    file.write_text(text, encoding="utf-8", errors="surrogatepass", newline="")
    with suppress(ConfigurationError):
        load_configuration(file.parent)


def test_the_door_is_public() -> None:
    """Both functions say where they are to be imported from."""
    from dstack.api import utils

    assert utils.__all__ == ["load_configuration", "load_profile"]
    assert {getattr(utils, name).__module__ for name in utils.__all__} == {"dstack.api.utils"}
    assert os.fspath(Path(str(utils.__file__))).endswith("dstack/api/utils.py")
