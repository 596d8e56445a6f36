"""Programs written for the 0.13.0 API find its names, its arguments in its order, and its defaults."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import pytest

from dstack.api import Backend, BackendCollection, Client, RepoCollection, Run, RunCollection, RunStatus, SubmittedRun

SHARED = (
    *("backends=None", "resources=None", "spot_policy=None", "retry_policy=None", "max_duration=None"),
    *("max_price=None", "working_dir=None", "run_name=None"),
)

METHODS: list[tuple[Callable[..., Any], tuple[str, ...]]] = [
    (Client, ("api_client", "project_name", "ssh_identity_file=None")),
    (Client.from_config, ("project_name=None", "server_url=None", "user_token=None", "ssh_identity_file=None")),
    (RunCollection.submit, ("configuration", "configuration_path=None", "repo=None", *SHARED, "reserve_ports=True")),
    (RunCollection.get_plan, ("configuration", "repo", "configuration_path=None", *SHARED)),
    (RunCollection.exec_plan, ("run_plan", "repo", "reserve_ports=True")),
    (RunCollection.list, ("all=False",)),
    (RunCollection.get, ("run_name",)),
    (RepoCollection.init, ("repo", "git_identity_file=None", "oauth_token=None")),
    (RepoCollection.is_initialized, ("repo",)),
    (RepoCollection.load, ("repo_dir", "local=False", "init=False", "git_identity_file=None", "oauth_token=None")),
    (BackendCollection.list, ()),
    (Run.refresh, ()),
    (Run.stop, ("abort=False",)),
    (Run.attach, ("ssh_identity_file=None",)),
    (Run.detach, ()),
    (Run.logs, ("start_time=None", "diagnose=False")),
]


@pytest.mark.parametrize(("method", "arguments"), METHODS, ids=lambda value: getattr(value, "__qualname__", ""))
def test_arguments_keep_their_names_order_and_defaults(method: Callable[..., Any], arguments: tuple[str, ...]) -> None:
    """Arguments can be passed by position and by name as ever; what was optional still is, with the same default."""
    parameters = [p for p in inspect.signature(method).parameters.values() if p.name != "self"]
    positional = [p for p in parameters if p.kind is p.POSITIONAL_OR_KEYWORD]
    assert [p.name for p in positional][: len(arguments)] == [argument.partition("=")[0] for argument in arguments]
    assert all(p.default is not p.empty for p in parameters if p not in positional[: len(arguments)])
    for parameter, argument in zip(positional, arguments, strict=False):
        if default := argument.partition("=")[2]:
            assert str(parameter.default) == default


@pytest.mark.parametrize(
    ("owner", "names"),
    [
        (Client, ("repos", "backends", "runs", "client", "project")),
        (Run, ("name", "status", "ports", "backend", "hostname")),
        (Backend, ("name",)),
    ],
)
def test_properties_are_there(owner: type, names: tuple[str, ...]) -> None:
    """What was a property is one, and can only be read."""
    for name in names:
        found = inspect.getattr_static(owner, name)
        assert isinstance(found, property)
        assert found.fset is None


def test_a_submitted_run_is_a_run() -> None:
    """`submit` returns a `SubmittedRun`, which can do all that a `Run` can."""
    assert issubclass(SubmittedRun, Run)


def test_statuses_are_the_ten_of_old() -> None:
    """The statuses keep their number and their spelling."""
    names = "pending submitted provisioning pulling running terminating terminated aborted failed done"
    assert [status.value for status in RunStatus] == names.split()
