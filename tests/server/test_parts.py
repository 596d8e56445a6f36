"""The small parts of the server, one by one."""

from __future__ import annotations

import contextlib
import logging
import os
import stat
from collections.abc import Iterator
from pathlib import Path

import pytest
from pydantic import BaseModel, ValidationError
from sqlalchemy.exc import StatementError

from dstack_core._server import app
from dstack_core._server.auth import NotAllowedError, Token, stored_token
from dstack_core._server.logfile import OLD_FILES, SIZE, log_to
from dstack_core._server.refusals import describe
from dstack_core._server.sockets import AlreadyRunningError, Lock, UnixListener, answers, is_loopback, listen_tcp
from dstack_core.errors import ConfigurationError


@pytest.mark.parametrize(
    "header",
    [None, b"", b"Bearer", b"Bearer ", b"Basic a-good-long-token-0123", b"a-good-long-token-0123", b"Bearer \xff\xfe"],
)
def test_not_allowed(header: bytes | None) -> None:
    """Whatever is not the token is refused, however it is formed."""
    with pytest.raises(NotAllowedError, match="token"):
        Token.of("a-good-long-token-0123").check(header)


@pytest.mark.parametrize("scheme", [b"Bearer", b"bearer", b"BEARER"])
def test_scheme_in_any_case(scheme: bytes) -> None:
    """The name of the scheme is case-insensitive, as HTTP has it."""
    Token.of("a-good-long-token-0123").check(scheme + b" a-good-long-token-0123")


def test_token_is_not_in_its_object(tmp_path: Path) -> None:
    """Neither the object nor the file knows more than a hash."""
    token, text = stored_token(tmp_path / "token")
    assert text
    assert text not in repr(vars(token))
    assert text not in (tmp_path / "token").read_text()
    again, shown = stored_token(tmp_path / "token")
    assert shown is None
    again.check(f"Bearer {text}".encode())


SECRET = "hunter2"


class _Job(BaseModel):
    env: dict[str, int]


def test_describe_hides_values() -> None:
    """What goes to the log has types and places of errors, never the values that caused them."""
    text = ""
    try:
        try:
            _Job.model_validate({"env": {"TOKEN": SECRET}})
        except ValidationError as exc:
            raise StatementError("cannot insert", "INSERT ...", {"env": SECRET}, ValueError("too long")) from exc
    except StatementError as exc:
        text = describe(exc)
    assert SECRET not in text
    assert "env.TOKEN: int_parsing" in text
    assert "StatementError: too long" in text
    assert "test_parts.py" in text


@pytest.fixture
def root_logger() -> Iterator[logging.Logger]:
    """The root logger, put back afterwards."""
    root = logging.getLogger()
    handlers, level = root.handlers[:], root.level
    yield root
    for handler in [handler for handler in root.handlers if handler not in handlers]:
        root.removeHandler(handler)
        with contextlib.suppress(OSError):
            handler.close()
    root.setLevel(level)
    logging.captureWarnings(capture=False)


def test_log_stays_small_and_private(tmp_path: Path, root_logger: logging.Logger) -> None:
    """The log is cut into a few files of limited size, none of them for other eyes."""
    path = tmp_path / "server.log"
    path.touch(mode=0o644)
    log_to(path)
    line = "x" * 65536
    for _ in range((OLD_FILES + 2) * SIZE // len(line)):
        root_logger.info(line)
    files = sorted(tmp_path.iterdir())
    assert len(files) == OLD_FILES + 1
    for file in files:
        assert file.stat().st_size <= SIZE
        assert stat.S_IMODE(file.stat().st_mode) == 0o600


def test_log_on_a_full_disk(tmp_path: Path, root_logger: logging.Logger, capsys: pytest.CaptureFixture[str]) -> None:
    """A log that cannot be written disturbs nobody."""
    log_to(Path("/dev/full"))
    root_logger.info("lost")
    assert capsys.readouterr().err == ""


def test_lock_excludes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Who holds the lock is named to the next one; a lock file that was replaced is no longer ours."""
    monkeypatch.setattr("dstack_core._server.sockets.HANDOVER", 0.05)
    path = tmp_path / "server.lock"
    lock = Lock(path, tmp_path / "server.sock")
    with pytest.raises(AlreadyRunningError, match=f"pid {os.getpid()}"):
        Lock(path, tmp_path / "server.sock")
    assert lock.is_ours()
    path.unlink()
    path.touch()
    assert not lock.is_ours()
    lock.release()


def test_listener_replaces_what_is_left_over(tmp_path: Path) -> None:
    """A socket without a server is replaced, in one step, and only one's own is removed."""
    path = tmp_path / "server.sock"
    first = UnixListener(path)
    second = UnixListener(path)
    first.remove()
    assert answers(path)
    second.remove()
    assert not path.exists()
    assert not answers(path)


def test_listen_where_one_cannot() -> None:
    """An address that is not of this computer is refused with the cure."""
    with pytest.raises(ConfigurationError, match="--host"):
        listen_tcp("192.0.2.1", 0)


@pytest.mark.parametrize(("host", "expected"), [("127.0.0.1", True), ("localhost", True), ("0.0.0.0", False)])
def test_loopback(host: str, expected: bool) -> None:
    """Only an address of the loopback network is private to this computer."""
    with listen_tcp(host, 0) as listener:
        assert is_loopback(listener) is expected


@pytest.mark.parametrize(("local", "given", "seconds"), [(True, "", 600), (False, "", 3600), (False, "900", 900)])
def test_how_long_machines_wait_for_a_server(
    monkeypatch: pytest.MonkeyPatch, local: bool, given: str, seconds: float
) -> None:
    """Ten minutes for the server of one user, an hour for that of a team, or as a person says."""
    monkeypatch.setenv("DSTACK_ORPHAN_GRACE_SECONDS", given)
    assert app._orphan_grace(local) == seconds


@pytest.mark.parametrize("given", ["soon", "-1", "299", "inf", "nan"])
def test_a_grace_that_would_end_machines_for_a_hiccup_is_refused(monkeypatch: pytest.MonkeyPatch, given: str) -> None:
    """With what to write instead."""
    monkeypatch.setenv("DSTACK_ORPHAN_GRACE_SECONDS", given)
    with pytest.raises(ConfigurationError, match="300 or more"):
        app._orphan_grace(True)


@pytest.mark.parametrize(("given", "seconds"), [("", 10), ("0.5", 0.5), ("50", 50)])
def test_how_long_a_plan_waits(monkeypatch: pytest.MonkeyPatch, given: str, seconds: float) -> None:
    """Ten seconds for the slowest cloud, or as a person says."""
    monkeypatch.setenv("DSTACK_PLAN_TIMEOUT_SECONDS", given)
    assert app._plan_timeout() == seconds


@pytest.mark.parametrize("given", ["soon", "0", "-1", "51", "inf", "nan"])
def test_a_plan_that_waits_longer_than_its_client_is_refused(monkeypatch: pytest.MonkeyPatch, given: str) -> None:
    """With the variable, what it is, what it may be, and what to write instead."""
    monkeypatch.setenv("DSTACK_PLAN_TIMEOUT_SECONDS", given)
    with pytest.raises(ConfigurationError, match=f"SECONDS={given} .* at most 50.*Example: .*SECONDS=10$"):
        app._plan_timeout()
