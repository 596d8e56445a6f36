"""The conformance suite has teeth: each mutant is caught, by the case that it names, with words for its author."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from tests.mutants._run import run

ROOT = Path(__file__).parents[2]


def mutants(monkeypatch: pytest.MonkeyPatch) -> dict[str, str]:
    """The case that each one names."""
    monkeypatch.syspath_prepend(ROOT / "tests/support/nimbus")
    from tests.mutants.backends import MUTANTS

    return {mutant.name: mutant.caught_by for mutant in MUTANTS}


@pytest.mark.timeout(900)
def test_each_mutant_is_caught_by_its_case(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In a real run of pytest; and backends without a fault pass all of these cases."""
    named = mutants(monkeypatch)
    assert len(named) >= 30
    found = run(tmp_path, [f"{name}::{case}" for name, case in named.items()])
    messages: dict[str, str] = {}
    for result in found:
        messages.setdefault(result.mutant, result.message)
    assert {name for name in named if not messages.get(name)} == set()
    assert {name: text for name, text in messages.items() if not is_for_an_author(text)} == {}
    sound = run(tmp_path, [f"{sound_for(case)}::{case}" for case in sorted(set(named.values()))])
    assert [result for result in sound if result.message] == []
    assert {result.case for result in sound} == set(named.values())


def sound_for(case: str) -> str:
    """The backend without a fault that such a case can be tried on."""
    return "Connects" if "connecting" in case else "Reference"


def is_for_an_author(message: str) -> bool:
    """Names the hook, says what was expected and what came, quotes the contract, and says what to do."""
    # An error of a hook comes first where a case expected an answer; the note after it is what counts.
    parts = ("expected: ", "got: ", 'contract: "', "to do: ")
    return bool(re.search(r"dstack_[a-z_]+", message)) and all(part in message for part in parts)


def test_the_table_names_each_mutant(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """`python -m tests.mutants NAME` prints the case and the message, and ends with how many were caught."""
    mutants(monkeypatch)
    from tests.mutants.__main__ import main

    assert main(["LeavesTheDisk", "MemoryInGib"]) == 0
    printed = capsys.readouterr().out
    assert re.search(r"LeavesTheDisk +test_terminate_takes_everything_along\n +dstack_terminate_instance: ", printed)
    assert printed.endswith("2 of 2 mutants were caught\n")
