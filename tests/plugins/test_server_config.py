"""The frame of `server/config.yml`: what is read, and what a person is told about a mistake in it."""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dstack_core._models.server_config import BackendEntry, load_server_config
from dstack_core.errors import ConfigurationError


def test_projects_and_their_backends_are_read(tmp_path: Path) -> None:
    """Each entry knows its values and its place."""
    file = tmp_path / "config.yml"
    file.write_text(
        "projects:\n"
        "- name: main\n"
        "  backends:\n"
        "  - type: aws\n"
        "    regions:\n"
        "    - us-east-1\n"
        "    creds: {type: default}\n"
        "  - {type: gcp}\n"
        "- name: empty\n"
    )
    projects = load_server_config(file).projects
    aws, gcp = projects["main"]
    assert (aws.type, aws.values["regions"], gcp.type) == ("aws", ["us-east-1"], "gcp")
    assert aws.where(("regions", 0)) == f"{file}, line 6, projects[0].backends[0].regions[0]"
    assert aws.where(("nothing",)) == f"{file}, line 4, projects[0].backends[0].nothing"
    assert gcp.where() == f"{file}, line 8, projects[0].backends[1]"
    assert projects["empty"] == ()


@pytest.mark.parametrize("text", [None, "", "# nothing yet\n", "projects:\n", "projects: []\n"])
def test_no_file_and_an_empty_one_are_the_default_project(tmp_path: Path, text: str | None) -> None:
    """Nothing has to be set up."""
    file = tmp_path / "config.yml"
    if text is not None:
        file.write_text(text)
    assert dict(load_server_config(file).projects) == {"main": ()}


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("projects: [", "line 1, column 12: not valid YAML: while parsing a flow node"),
        ("projects:\n- name: a\n   backends: []\n", "line 3, column 12: not valid YAML"),
        ("projects:\n\t- name: a", "line 2, column 1: not valid YAML"),
        (
            "projects: !!python/object:os.system {}",
            "line 1, column 11: not valid YAML: could not determine a constructor",
        ),
        ("project:\n- name: a", "line 1, project: unknown key 'project'. Did you mean 'projects'? Allowed: projects"),
        ("just text", "line 1: must have the form 'key: value'"),
        ("projects: main", "line 1, projects: must be a list: start each entry with '- '"),
        ("projects:\n- main", r"line 2, projects[0]: must have the form 'key: value'"),
        ("projects:\n- backends: []", "line 2, projects[0].name: a project needs a name, for example 'name: main'"),
        ("projects:\n- name: a\n- name: a", "line 3, projects[1].name: there are two projects 'a'"),
        (
            "projects:\n- name: a\n  backend: []",
            "line 3, projects[0].backend: unknown key 'backend'. Did you mean 'backends'?",
        ),
        ("projects:\n- name: a\n  backends:\n    type: aws", "line 3, projects[0].backends: must be a list"),
        ("projects:\n- name: a\n  backends:\n  - aws", "line 4, projects[0].backends[0]: must have the form"),
        (
            "projects:\n- name: a\n  backends:\n  - region: x",
            "line 4, projects[0].backends[0].type: a backend needs a type",
        ),
        (
            "projects:\n- name: a\n  backends:\n  - type: aws\n  - type: aws",
            "line 5, projects[0].backends[1]: backend 'aws' is given twice",
        ),
        ("projects:\n- name: a\n  name: b", "line 3, projects[0].name: this key is given twice"),
        (
            "projects:\n- name: a\n  backends:\n  - {type: aws, 5: x}",
            "line 4, projects[0].backends[0].5: the key must be text",
        ),
        ("projects:\n- name: 5", "a project needs a name"),
        ("projects: &a [*a]", "line 1, projects[0]: must have the form"),
        ("projects: 2001-99-99", "line 1, projects: must be a list"),
    ],
)
def test_a_mistake_names_file_line_key_and_cure(tmp_path: Path, text: str, words: str) -> None:
    """One sentence that a person can act on."""
    file = tmp_path / "config.yml"
    file.write_text(text)
    with pytest.raises(ConfigurationError) as caught:
        load_server_config(file)
    assert str(caught.value).startswith(str(file))
    assert words in str(caught.value)


def test_a_file_that_cannot_be_read_is_named(tmp_path: Path) -> None:
    """A directory in its place, or bytes that are no text."""
    with pytest.raises(ConfigurationError, match="cannot be read"):
        load_server_config(tmp_path)
    file = tmp_path / "config.yml"
    file.write_bytes(b"\xff\xfe\xfd")
    with pytest.raises(ConfigurationError, match="cannot be read"):
        load_server_config(file)


@given(st.text() | st.from_regex(r"(projects|name|backends|type|[-:\[\]{}&*!# \n]){1,20}"))
def test_whatever_the_file_holds_the_answer_is_a_configuration_or_its_error(
    tmp_path_factory: pytest.TempPathFactory, text: str
) -> None:
    """Nothing that can be written into a file makes the loader fail in another way."""
    file = tmp_path_factory.mktemp("any") / "config.yml"
    file.write_text(text, encoding="utf-8", errors="surrogatepass", newline="")
    with suppress(ConfigurationError):
        load_server_config(file)


def test_an_entry_made_by_a_program_has_a_place_too() -> None:
    """Messages about it name the backend and the key."""
    assert BackendEntry("aws", {}).where(("creds", "type")) == "backend 'aws', creds.type"
