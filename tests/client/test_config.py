"""`Client.from_config()` in its forms that start no server, and `config.yml`."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from dstack.api import Client, ConfigurationError
from dstack.api.server import APIClient

Write = Callable[[str], Path]

TWO = """\
projects:
- name: main
  url: http://127.0.0.1:3000
  token: 0123
- name: other
  url: https://dstack.example.com/
  token: abc
  default: true
"""


@pytest.fixture
def write(own_home: Path) -> Write:
    """Writes `config.yml`, and gives its path."""

    def written(text: str) -> Path:
        own_home.mkdir(exist_ok=True)
        path = own_home / "config.yml"
        path.write_text(text)
        return path

    return written


def test_url_and_token_need_no_file(own_home: Path) -> None:
    """With both, nothing is read, written or started."""
    client = Client.from_config("p", "http://127.0.0.1:1", "t")
    assert (client.project, repr(client)) == ("p", "<Client of project 'p', <APIClient: server http://127.0.0.1:1>>")
    assert isinstance(client.client, APIClient)
    assert not own_home.exists()


def test_url_and_token_need_a_project() -> None:
    """The one thing that the server cannot guess."""
    with pytest.raises(ConfigurationError, match="The project name is not specified"):
        Client.from_config(server_url="http://127.0.0.1:1", user_token="t")


@pytest.mark.parametrize(("given", "missing"), [("server_url", "user_token"), ("user_token", "server_url")])
def test_half_an_address_is_refused(given: str, missing: str) -> None:
    """Only one of url and token: says which one is missing."""
    with pytest.raises(ConfigurationError, match=f"{given} was given without {missing}"):
        Client.from_config("main", **{given: "http://127.0.0.1:1"})


@pytest.mark.parametrize("url", ["127.0.0.1:3000", "ftp://x", "http://", "http:///path", "http://x:99999"])
def test_an_address_that_is_none(url: str) -> None:
    """Said at once, with an example."""
    with pytest.raises(ConfigurationError, match=r"not the URL of a server\. Example: http://127"):
        Client.from_config("main", url, "t")


def test_the_default_project(write: Write) -> None:
    """Without a name, the project that says `default: true`."""
    write(TWO)
    client = Client.from_config()
    assert (client.project, repr(client.client)) == ("other", "<APIClient: server https://dstack.example.com>")


def test_a_project_by_name(write: Write) -> None:
    """By name; a token that looks like a number stays as it is written."""
    write(TWO)
    assert Client.from_config("main").project == "main"
    from dstack_core._client.config import config_path, load_projects

    assert load_projects(config_path())[0].token == "0123"


def test_a_project_that_is_not_there(write: Write) -> None:
    """Says which ones are."""
    path = write(TWO)
    with pytest.raises(ConfigurationError, match="Project nope is not configured") as refusal:
        Client.from_config("nope")
    assert f"{path} has: main, other" in str(refusal.value)


def test_no_default_project(write: Write) -> None:
    """Says how to choose one."""
    write(TWO.replace("default: true", "default: false"))
    with pytest.raises(ConfigurationError, match="No default project, specify project name"):
        Client.from_config()


@pytest.mark.parametrize(
    ("text", "line", "problem"),
    [
        ("projects: [", 1, "expected the node content"),
        ("projects:\n- name: a\n  url: http://x\n token: t\n", 4, "expected"),
        ("projects:\n- name: a\n\turl: http://x\n", 3, "cannot start any token"),
        ("- a\n", 1, "the file is made of `key: value` lines"),
        ("projects: main\n", 1, "'projects' is a list"),
        ("project: []\n", 1, "unknown key 'project'; allowed: projects"),
        ("projects:\n- name: a\n  url: http://x\n", 2, "this project lacks 'token'"),
        ("projects:\n- name: a\n  url: http://x\n  tokn: t\n", 4, "unknown key 'tokn'"),
        ("projects:\n- name: a\n  url: http://x\n  token:\n", 4, "'token' has no value"),
        ("projects:\n- name: a\n  url: [x]\n  token: t\n", 3, "'url' has no value"),
        ("projects:\n- name: a\n  url: http://x\n  token: t\n  default: maybe\n", 5, "'default' is true or false"),
        (TWO + "- {name: main, url: 'http://y', token: t}\n", 2, "`name: main` is there twice"),
        (TWO + "- {name: third, url: 'http://y', token: t, default: yes}\n", 2, "`default: true` is there twice"),
    ],
)
def test_a_malformed_file(write: Write, text: str, line: int, problem: str) -> None:
    """Names file, line and cure."""
    path = write(text)
    with pytest.raises(ConfigurationError) as refusal:
        Client.from_config()
    message = str(refusal.value)
    assert message.startswith(f"{path}, line {line}: ")
    assert problem in message
    assert "Example:\n  projects:" in message


def test_a_file_that_is_no_text(write: Write) -> None:
    """Names the file."""
    path = write("")
    path.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ConfigurationError, match="cannot be read"):
        Client.from_config()


def test_files_of_older_clients_are_read(write: Write) -> None:
    """Their `repos` section is passed over."""
    write(TWO + "repos:\n- {path: /x, repo_id: y, repo_type: local}\n")
    assert Client.from_config().project == "other"


def test_an_unknown_project_of_the_local_server(own_home: Path) -> None:
    """Without a file there is one project, and no server is started to find out."""
    with pytest.raises(ConfigurationError, match="Project nope is not configured"):
        Client.from_config("nope")
    assert not own_home.exists()
