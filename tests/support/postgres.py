"""A real PostgreSQL for tests, and fixtures that run one test on both databases.

The server comes from the system's package (Debian: `postgresql`). Each test process that needs one starts its own, in
under two seconds, on a unix socket in a directory of its own: no port, no sync, no password. It goes away with the test
process, even if that is killed. Without the package (or psycopg) the tests are skipped with the reason; with
`DSTACK_REQUIRE_POSTGRES=1` they fail instead.

Fixtures, which `tests/conftest.py` offers to all rooms:

- `store`: an open `Store` on an empty database with the real tables, closed after the test. The test runs twice, on
  SQLite and on PostgreSQL (`-m "not postgres"` leaves the second out).
- `store_url`: the same as a URL for `Store.open`, for tests that open it themselves, or several times, or elsewhere.
- `blank_store_url`: a URL of a database that has no tables yet.
- `postgres_server`, `postgres_url`: PostgreSQL alone: the server, and a blank database on it.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import os
import pwd
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

import pytest

from dstack_core.testing import wait_until

if TYPE_CHECKING:
    from dstack_core._store.store import Store

__all__ = ["PostgresServer", "blank_store_url", "postgres_server", "postgres_url", "store", "store_url"]

# Waits for the end of its input, which is the end of the test process however it ends, and clears up.
SUPERVISE = """
"$@" </dev/null & server=$!
read -r _
kill -QUIT $server 2>/dev/null; wait $server
rm -rf "$DIRECTORY"
"""

OPTIONS = {
    "listen_addresses": "",
    "fsync": "off",
    "synchronous_commit": "off",
    "full_page_writes": "off",
    "autovacuum": "off",
    "max_connections": "200",
    "shared_buffers": "32MB",
    "deadlock_timeout": "100ms",
}


class PostgresServer:
    """A running server. `create()` makes a database, which is a copy of a template in a few milliseconds."""

    def __init__(self, binaries: Path) -> None:
        self._user = _server_user()
        self.directory = Path(tempfile.mkdtemp(prefix="dstack-pg-"))
        self._names = itertools.count(1)
        self._template: str | None = None
        try:
            if self._user:
                shutil.chown(self.directory, self._user)
            self._initialize(binaries / "initdb")
            self._supervisor = self._start(binaries / "postgres")
        except BaseException:
            shutil.rmtree(self.directory, ignore_errors=True)
            raise
        try:
            wait_until(self._answers, timeout=60, what="PostgreSQL to answer")
        except BaseException:
            self.stop()
            raise

    def _initialize(self, initdb: Path) -> None:
        options = ["-U", "dstack", "-A", "trust", "-E", "UTF8", "--locale=C", "-N"]
        command = [str(initdb), "-D", str(self.directory / "data"), *options]
        done = subprocess.run(command, capture_output=True, text=True, check=False, **self._as_user())
        if done.returncode:
            raise RuntimeError(f"initdb failed:\n{done.stdout}\n{done.stderr}")

    def _start(self, postgres: Path) -> subprocess.Popen[bytes]:
        settings = [f"-c{name}={value}" for name, value in OPTIONS.items()]
        places = [str(postgres), "-D", str(self.directory / "data"), "-k", str(self.directory)]
        with (self.directory / "log").open("wb") as log:
            return subprocess.Popen(
                ["/bin/sh", "-c", SUPERVISE, "sh", *places, *settings],
                stdin=subprocess.PIPE,
                stdout=log,
                stderr=subprocess.STDOUT,
                env={**os.environ, "DIRECTORY": str(self.directory), "LC_ALL": "C"},
                start_new_session=True,
                **self._as_user(),
            )

    def _as_user(self) -> dict[str, Any]:
        """PostgreSQL refuses to be run by root."""
        return {"user": self._user, "group": self._user, "extra_groups": [], "cwd": "/"} if self._user else {"cwd": "/"}

    def _answers(self) -> bool:
        import psycopg

        if self._supervisor.poll() is not None:
            raise RuntimeError(f"PostgreSQL did not start:\n{(self.directory / 'log').read_text()}")
        try:
            self.execute("SELECT 1")
        except psycopg.OperationalError:
            return False
        return True

    def execute(self, statement: str, *parameters: object, database: str = "postgres") -> list[tuple[Any, ...]]:
        """Runs one statement as the database's owner, on a connection of its own."""
        import psycopg

        with psycopg.connect(
            host=str(self.directory), user="dstack", dbname=database, autocommit=True, connect_timeout=10
        ) as connection:
            cursor = connection.execute(statement.encode(), parameters or None)
            return cursor.fetchall() if cursor.description else []

    def create(self, template: str = "template0") -> str:
        """Makes a database, and returns its name."""
        name = f"test_{next(self._names)}"
        self.execute(f"CREATE DATABASE {name} TEMPLATE {template}")
        return name

    def create_with_tables(self) -> str:
        """Makes a database with the real tables."""
        from dstack_core._store.store import Store

        if self._template is None:
            name = self.create()
            asyncio.run(Store.open(self.url(name)).close())
            self._template = name
        return self.create(self._template)

    def drop(self, name: str) -> None:
        """Removes a database, whoever is still connected."""
        self.execute(f"DROP DATABASE IF EXISTS {name} WITH (FORCE)")

    def url(self, name: str) -> str:
        """Returns the URL of a database for `Store.open`."""
        return f"postgresql+psycopg://dstack:not-a-secret@/{name}?host={self.directory}"

    def terminate_connections(self, database: str) -> int:
        """Cuts every connection to a database, as an administrator or a failing server does."""
        query = "SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE datname = %s AND pid <> pg_backend_pid()"
        return len(self.execute(query, database))

    def stop(self) -> None:
        """Stops the server and removes its directory."""
        self._supervisor.communicate(timeout=60)


def _server_user() -> str | None:
    if os.geteuid() != 0:
        return None
    for name in ("postgres", "nobody"):
        with contextlib.suppress(KeyError):
            return pwd.getpwnam(name).pw_name
    raise RuntimeError("PostgreSQL cannot be run by root, and there is no user 'postgres' or 'nobody'")


def _binaries() -> Path | None:
    """Finds the newest server that the system has."""
    packaged = Path("/usr/lib/postgresql").glob("*/bin/initdb")
    found = sorted(packaged, key=lambda path: [int(part) for part in path.parts[4].split(".")])
    if found:
        return found[-1].parent
    path = shutil.which("initdb")
    return Path(path).resolve().parent if path else None


def _missing() -> str | None:
    """Says what is missing for a server, if anything is."""
    if _binaries() is None:
        return "PostgreSQL is not installed: apt-get install postgresql"
    try:
        import psycopg as _  # noqa: F401  # asked for its presence only
    except ImportError as error:
        return f"psycopg is not installed ({error}): pip install 'dstack-core[postgres]'"
    return None


def _give_up(reason: str) -> NoReturn:
    if os.environ.get("DSTACK_REQUIRE_POSTGRES", "") not in {"", "0"}:
        pytest.fail(f"{reason} (DSTACK_REQUIRE_POSTGRES is set, so this is no reason to skip)", pytrace=False)
    pytest.skip(reason)


@pytest.fixture(scope="session")
def postgres_server() -> Iterator[PostgresServer]:
    """A PostgreSQL server for this test process."""
    if reason := _missing():
        _give_up(reason)
    binaries = _binaries()
    assert binaries is not None
    server = PostgresServer(binaries)
    yield server
    server.stop()
    assert not server.directory.exists(), "PostgreSQL left its directory behind"


@pytest.fixture
def postgres_url(postgres_server: PostgresServer) -> Iterator[str]:
    """The URL of a blank PostgreSQL database."""
    name = postgres_server.create()
    yield postgres_server.url(name)
    postgres_server.drop(name)


BOTH = ["sqlite", pytest.param("postgresql", marks=pytest.mark.postgres)]


@pytest.fixture(params=BOTH)
def blank_store_url(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """The URL of a database without tables, once on SQLite (no file yet) and once on PostgreSQL."""
    if request.param == "sqlite":
        return f"sqlite:///{tmp_path / 'blank.db'}"
    url: str = request.getfixturevalue("postgres_url")
    return url


@pytest.fixture(params=BOTH)
def store_url(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[str]:
    """The URL of an empty database that has the real tables, once on SQLite and once on PostgreSQL."""
    if request.param == "sqlite":
        yield f"sqlite:///{tmp_path / 'server.db'}"
        return
    server: PostgresServer = request.getfixturevalue("postgres_server")
    name = server.create_with_tables()
    yield server.url(name)
    server.drop(name)


@pytest.fixture
def store(store_url: str) -> Iterator[Store]:
    """An open store on an empty database with the real tables, once on SQLite and once on PostgreSQL."""
    from dstack_core._store.store import Store

    opened = Store.open(store_url)
    yield opened
    # A test that failed may have left transactions behind that nobody will ever end.
    asyncio.run(asyncio.wait_for(opened.close(), 60))
