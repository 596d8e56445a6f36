"""The conformance suite itself: what it quotes, whom it lets set cases aside, and what it does in a live account."""

from __future__ import annotations

import inspect
import os
import re
import signal
import subprocess
import sys
import textwrap
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from uuid import uuid4

import pytest

from docs._site import cases as table_of_cases
from dstack_core import _hookspecs, errors
from dstack_core._engine.naming import idempotency_token, instance_name, request_uuid
from dstack_core._models import instances, offers
from dstack_core.plugin import MachineResources, Offer
from dstack_core.testing import BackendSuite, NimbusServer, _loading, _suite, wait_until
from dstack_core.testing._suite import _requests
from dstack_core.testing._suite._contract import CONTRACT

ROOT = Path(__file__).parents[2]


def documented(where: str) -> str:
    """The docstring of a hook or class; that of the specification itself for its conventions."""
    if where == "Conventions":
        return inspect.getdoc(_hookspecs) or ""
    modules: tuple[ModuleType, ...] = (_hookspecs, instances, offers, errors)
    found = next(getattr(module, where) for module in modules if hasattr(module, where))
    return inspect.getdoc(found) or ""


def test_every_hook_of_the_specification_is_known() -> None:
    """A hook that is added to the specification, or an argument, is no spelling mistake of an author."""
    hooks = {name: getattr(_hookspecs, name) for name in _hookspecs.__all__ if name.startswith("dstack_")}
    del hooks["dstack_register_backends"]
    arguments = {name: tuple(inspect.signature(hook).parameters) for name, hook in hooks.items()}
    assert arguments == _loading.ARGUMENTS


@pytest.mark.parametrize("key", CONTRACT)
def test_what_is_quoted_stands_in_the_contract(key: str) -> None:
    """A case that fails quotes the contract word for word, from where it says."""
    where, sentence = CONTRACT[key]
    assert sentence in " ".join(documented(where).split())


def cases() -> dict[str, object]:
    """The cases of the suite, by name."""
    return {name: case for name, case in inspect.getmembers(BackendSuite) if name.startswith("test_")}


def test_each_case_says_what_it_asks() -> None:
    """In one sentence, which is a question."""
    assert [name for name, case in cases().items() if not (inspect.getdoc(case) or "").endswith("?")] == []


def test_the_page_lists_each_case() -> None:
    """The documentation has a table of every group, made of the docstrings."""
    page = (ROOT / "docs/guides/conformance.md").read_text()
    groups = re.findall(r"```cases\n(\w+)\n```", page)
    listed = [name for group in groups for name, _ in table_of_cases.cases(getattr(_suite, group))]
    assert sorted(listed) == sorted(cases())
    html = table_of_cases.table("CreateCases", "", "cases", {}, None)
    assert "<code>test_another_body_is_refused</code> &times; 3</td><td>Is the same intent with other tags" in html


def test_every_sentence_is_used() -> None:
    """A sentence that no case asks for is left out of the list."""
    sources = "".join(path.read_text() for path in (ROOT / "dstack_core/testing/_suite").glob("*.py"))
    used = set(re.findall(r'"([a-z-]+)"', sources.partition("CONTRACT: dict")[0] + sources))
    assert sorted(CONTRACT.keys() - used) == []


def test_requests_are_named_as_the_engine_names_them() -> None:
    """The suite asks for instances by the names, tokens and ids that the engine would send."""
    owner, intent = uuid4(), _requests.new_intent()
    offer = Offer("nimbus", "small", "west", MachineResources(1, 1024), 0.1)
    request = _requests.render(owner, intent, offer, ())
    assert intent.version == 7
    assert request.name == instance_name(owner, intent)
    assert request.token == idempotency_token(owner, intent)
    assert request.request_id == request_uuid(owner, intent)


def test_waiting_loads_nothing_else() -> None:
    """Who imports `wait_until` gets neither pytest nor Hypothesis, nor anything of the server."""
    code = "import sys; from dstack_core.testing import wait_until; print('\\n'.join(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True)
    loaded = set(done.stdout.split())
    assert not {"pytest", "hypothesis", "pydantic", "httpx", "dstack_core._engine", "http.server"} & loaded


def test_an_unknown_name_is_an_attribute_error() -> None:
    """As of any module."""
    import dstack_core.testing

    with pytest.raises(AttributeError, match="no attribute 'NoSuchThing'"):
        _ = dstack_core.testing.NoSuchThing
    assert "BackendSuite" in dir(dstack_core.testing)


# -- setting cases aside ----------------------------------------------------------------------------------------------


def replacement() -> Callable[[object], None]:
    """What an author would put in the place of a case: a new one each time, since pytest's marks stay on a function."""

    def another(self: object) -> None:
        """Is it something else?"""

    return another


def test_a_case_is_set_aside_only_with_a_reason() -> None:
    """Without words, nobody can tell an exception from a bug."""
    with pytest.raises(TypeError, match="without a reason"):
        type("TestMine", (BackendSuite,), {"aside": {"test_get_agrees_with_create": " "}})


def test_a_case_that_does_not_exist_cannot_be_set_aside() -> None:
    """A misspelt name would hide that the case runs, or that it went away."""
    with pytest.raises(TypeError, match="Did you mean 'test_get_agrees_with_create'"):
        type("TestMine", (BackendSuite,), {"aside": {"test_get_agrees_with_creat": "too strict for us"}})


def test_a_case_cannot_be_replaced_silently() -> None:
    """Overriding it would set it aside without a word."""
    with pytest.raises(TypeError, match="set it aside and say why"):
        type("TestMine", (BackendSuite,), {"test_get_agrees_with_create": replacement()})


def test_a_case_may_be_replaced_by_one_that_says_why() -> None:
    """The ordinary way of pytest."""
    replaced = pytest.mark.xfail(reason="our cloud forgets")(replacement())
    type("TestMine", (BackendSuite,), {"test_get_agrees_with_create": replaced})


HEAD = """
import os
from importlib.metadata import EntryPoint
import pytest
from dstack_core.testing import Account, BackendSuite, NimbusServer

class Suite(BackendSuite):
    backend = "nimbus"

    @classmethod
    def entry_point(cls):
        return EntryPoint("nimbus", "tests.mutants.plugins:" + cls.entry, "dstack.backends")

    @pytest.fixture
    def cloud(self):
        with NimbusServer() as server:
            yield server
"""


def command(folder: Path, source: str, *options: str) -> list[str]:
    """A pytest of its own over a file with this text."""
    file = folder / "test_mine.py"
    file.write_text(HEAD + textwrap.dedent(source))
    return [
        sys.executable,
        "-m",
        "pytest",
        "-q",
        "-rA",
        "-p",
        "no:randomly",
        "--rootdir",
        str(folder),
        str(file),
        *options,
    ]


def environment(**more: str) -> dict[str, str]:
    """With the reference backend on the path, and without what says that this pytest is one of several."""
    ours = {key: value for key, value in os.environ.items() if not key.startswith("PYTEST_")}
    return {**ours, "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "tests/support/nimbus")]), **more}


def run(folder: Path, source: str, *options: str, **more: str) -> str:
    """What it prints."""
    done = subprocess.run(
        command(folder, source, *options),
        cwd=folder,
        env=environment(**more),
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )
    return done.stdout + done.stderr


def test_what_is_set_aside_has_to_fail(tmp_path: Path) -> None:
    """A case that is set aside counts as expected while it fails, and fails when it passes."""
    source = """
    class TestFlawed(Suite):
        entry = "ForgetsRetryAfter"
        aside = {"test_the_error_of_create[throttle]": "Nimbus' header is not read yet"}

    class TestSound(Suite):
        entry = "Reference"
        aside = {"test_the_error_of_create": "we thought that it would fail"}
    """
    said = run(tmp_path, source, "-k", "test_the_error_of_create and throttle")
    assert "XFAIL test_mine.py::TestFlawed::test_the_error_of_create[throttle] - Nimbus' header is not read yet" in said
    assert "[XPASS(strict)] we thought that it would fail" in said
    assert "1 failed, 1 xfailed" in re.sub(r", \d+ deselected", "", said)


def test_what_is_missing_in_a_test_file_is_said(tmp_path: Path) -> None:
    """The name of the backend, its package, or the cloud."""
    source = """
    class TestNameless(BackendSuite):
        cloud = Suite.cloud

    class TestAbsent(BackendSuite):
        backend = "no-such-backend"
        cloud = Suite.cloud

    class TestCloudless(BackendSuite):
        backend = "nimbus"
    """
    said = run(tmp_path, source, "-k", "test_get_agrees_with_create")
    assert 'TestNameless does not say which backend it tests: write `backend = "yourname"`' in said
    assert "No installed package has an entry point for the backend 'no-such-backend'" in said
    assert "TestCloudless has no fixture `cloud`: write one that yields the cloud under test" in said


# -- live accounts ----------------------------------------------------------------------------------------------------

LIVE = """
class TestLive(Suite):
    entry = "Reference"

    def live(self):
        return {"url": os.environ["NIMBUS_URL"], "token": os.environ["NIMBUS_TOKEN"]}
"""


@pytest.fixture
def account() -> Iterator[NimbusServer]:
    """A cloud of which the suite knows nothing but the address."""
    with NimbusServer() as server:
        yield server


def live(account: NimbusServer, **more: str) -> dict[str, str]:
    """Environment variables for it."""
    return {"DSTACK_LIVE": "1", "NIMBUS_URL": account.url, "NIMBUS_TOKEN": account.token, **more}


def billed(account: NimbusServer) -> list[str]:
    """What costs money there."""
    truth = account.truth()
    return [*(one.id for one in truth.servers if one.billed), *truth.leftovers]


def test_a_live_account_is_used_and_left_clean(tmp_path: Path, account: NimbusServer) -> None:
    """Instances are made in it, faults are left out with a reason, and nothing is left."""
    chosen = "test_create or test_error or test_terminate"
    said = run(tmp_path, LIVE, "-k", chosen, **live(account, DSTACK_LIVE_CAP="5"))
    assert "the cloud under test cannot be made to fail (Faulty)" in said
    assert " failed" not in said
    assert " error" not in said
    assert len(account.truth().servers) >= 10
    assert billed(account) == []


def test_a_live_account_needs_a_cap_and_a_configuration(tmp_path: Path, account: NimbusServer) -> None:
    """Without either, nothing is made, and the message says what is missing."""
    said = run(tmp_path, LIVE, "-k", "test_get_agrees_with_create", **live(account))
    assert "say how many USD this run may cost: DSTACK_LIVE_CAP=2.50" in said
    unable = LIVE.replace("def live", "def other")
    said = run(tmp_path, unable, "-k", "test_get_agrees_with_create", **live(account, DSTACK_LIVE_CAP="1"))
    assert "has no method `live` that returns the configuration of a live account" in said
    assert account.truth().servers == []


def test_the_cap_is_not_passed(tmp_path: Path, account: NimbusServer) -> None:
    """Each instance counts for ten minutes of its price; what would go over the cap is skipped, and says so."""
    # $0.038 an hour: ten minutes are $0.0063, so three instances fit.
    chosen = "test_many_instances or test_two_intents or test_get_agrees_with_create or test_list_agrees_with_get"
    said = run(tmp_path, LIVE, "-k", chosen, **live(account, DSTACK_LIVE_CAP="0.02"))
    assert re.search(r"SKIPPED.*the spend cap DSTACK_LIVE_CAP of \$0.02 would be passed: .* needs up to \$1.2667", said)
    assert re.search(r"SKIPPED.*the spend cap DSTACK_LIVE_CAP of \$0.02 would be passed: .* needs up to \$0.0063", said)
    assert len(account.truth().servers) == 3
    assert billed(account) == []


def test_an_account_that_costs_money_is_not_used_by_accident(tmp_path: Path, account: NimbusServer) -> None:
    """A configured account without DSTACK_LIVE=1 is refused before anything is made."""
    source = """
    class TestAccount(Suite):
        entry = "Reference"

        @pytest.fixture
        def cloud(self):
            return Account({"url": os.environ["NIMBUS_URL"], "token": os.environ["NIMBUS_TOKEN"]})
    """
    said = run(tmp_path, source, "-k", "test_get_agrees_with_create", **live(account, DSTACK_LIVE="0"))
    assert "The cheapest offer of this account costs $0.038 an hour." in said
    assert account.truth().servers == []


@pytest.mark.parametrize("how", [signal.SIGINT, signal.SIGKILL])
def test_what_an_interrupted_run_made_is_ended(tmp_path: Path, account: NimbusServer, how: signal.Signals) -> None:
    """After Ctrl+C at once; after a kill, by the next run, which has the owner's name from the cache."""
    account.boot(3600)
    arguments = command(tmp_path, LIVE, "-k", "test_terminate_ends_the_instance")
    more = live(account, DSTACK_LIVE_CAP="5")
    with subprocess.Popen(arguments, cwd=tmp_path, env=environment(**more), stdout=subprocess.PIPE) as waiting:
        wait_until(lambda: billed(account), what="the case to have made an instance that does not boot")
        waiting.send_signal(how)
        waiting.communicate(timeout=120)
    if how is signal.SIGKILL:
        assert billed(account) != []
        account.boot(0)
        assert "1 passed" in run(tmp_path, LIVE, "-k", "test_get_of_the_unknown_is_none and plausible", **more)
    assert billed(account) == []
