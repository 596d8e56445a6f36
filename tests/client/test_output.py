"""`run.logs()` against a server whose answers break off, skip, or say nothing."""

from __future__ import annotations

import warnings
from datetime import UTC, datetime, timedelta, timezone

import pytest

from dstack.api import LogsDroppedWarning, NotFoundError, Run
from dstack.api.server import APIClient
from tests.client.scripted import ScriptedServer, log_end, log_piece, refusal, run_model


@pytest.fixture
def run(api: APIClient) -> Run:
    """A run on the scripted server."""
    return Run(api, run_model())


def test_pieces_are_put_together(server: ScriptedServer, run: Run) -> None:
    """Each answer is asked for from where the last one ended, until the end is said."""
    server.on("logs", lambda _: log_piece(0, b"ab\xff", b"\n"), lambda _: log_piece(4, b"c"), lambda _: log_end(5))
    assert b"".join(run.logs()) == b"ab\xff\nc"
    assert [asked.get("offset", "0") for asked in server.asked("logs")] == ["0", "4", "5"]


def test_a_broken_connection_loses_and_doubles_nothing(server: ScriptedServer, run: Run) -> None:
    """What arrived counts; the rest is asked for again."""
    server.on("logs", lambda _: log_piece(0, b"abc", breaks=True), lambda _: log_piece(3, b"def"), lambda _: log_end(6))
    assert b"".join(run.logs()) == b"abcdef"


def test_a_gap_is_a_warning_and_the_rest_follows(server: ScriptedServer, run: Run) -> None:
    """Bytes that could not be kept: says how many and where, and goes on after them."""
    server.on("logs", lambda _: log_piece(0, b"abc"), lambda _: log_piece(10, b"xyz"), lambda _: log_end(13))
    with pytest.warns(LogsDroppedWarning, match="7 bytes of the output, from byte 3 on"):
        assert b"".join(run.logs()) == b"abcxyz"


def test_a_gap_at_the_end_is_a_warning_too(server: ScriptedServer, run: Run) -> None:
    """The last bytes could not be kept: the end lies behind what arrived."""
    server.on("logs", lambda _: log_piece(0, b"abc"), lambda _: log_end(10))
    with pytest.warns(LogsDroppedWarning, match="7 bytes of the output, from byte 3 on"):
        assert b"".join(run.logs()) == b"abc"


def test_start_time_is_sent_once_and_leaves_no_gap(server: ScriptedServer, run: Run) -> None:
    """The server says where that time is; from there on offsets count."""
    server.on("logs", lambda _: log_piece(100, b"abc"), lambda _: log_piece(103, b"d"), lambda _: log_end(104))
    when = datetime(2026, 1, 1, 12, tzinfo=timezone(timedelta(hours=2)))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert b"".join(run.logs(start_time=when)) == b"abcd"
    first, *rest = server.asked("logs")
    assert first == {"start_time": "2026-01-01T10:00:00Z"}
    assert [asked["offset"] for asked in rest] == ["103", "104"]
    assert all("start_time" not in asked for asked in rest)


def test_a_time_without_a_zone_is_local(server: ScriptedServer, run: Run) -> None:
    """As on the clock on the wall."""
    server.on("logs", lambda _: log_end(0))
    when = datetime(2026, 7, 1, 12)  # noqa: DTZ001  # a time without a zone is what this is about
    assert list(run.logs(start_time=when)) == []
    assert datetime.fromisoformat(server.asked("logs")[0]["start_time"]) == when.astimezone(UTC)


def test_diagnose_asks_for_the_account(server: ScriptedServer, run: Run) -> None:
    """The other stream of a run, in the same way."""
    server.on("logs", lambda _: log_piece(0, b"submitted\n"), lambda _: log_end(10))
    assert b"".join(run.logs(diagnose=True)) == b"submitted\n"
    assert all(asked["diagnose"].lower() == "true" for asked in server.asked("logs"))


def test_empty_answers_are_no_end(server: ScriptedServer, run: Run) -> None:
    """A server that has nothing to say for now is asked again."""
    empty = [lambda _: log_piece(0)] * 3
    server.on("logs", *empty, lambda _: log_piece(0, b"abc"), lambda _: log_end(3))
    assert b"".join(run.logs()) == b"abc"


def test_a_reader_that_stops_early_leaves_the_client_usable(server: ScriptedServer, run: Run) -> None:
    """The first line is often enough; the connection is given up, and the next reader starts afresh."""
    server.on(
        "logs", lambda _: log_piece(0, *[b"x" * 65536] * 500), lambda _: log_piece(0, b"abc"), lambda _: log_end(3)
    )
    logs = run.logs()
    assert next(iter(logs)).startswith(b"x")
    del logs
    assert b"".join(run.logs()) == b"abc"


def test_a_run_that_is_gone(server: ScriptedServer, run: Run) -> None:
    """Deleted meanwhile: said, in the server's words."""
    server.on("logs", lambda _: log_piece(0, b"abc"), lambda _: refusal(404, "not_found", "There is no such run."))
    logs = iter(run.logs())
    assert next(logs) == b"abc"
    with pytest.raises(NotFoundError, match="There is no such run"):
        next(logs)
