"""Opening a database: what a person can get wrong, what may be broken, and how fast it is."""

from __future__ import annotations

import asyncio
import os
import pwd
import sqlite3
import subprocess
import sys
import traceback
from pathlib import Path

import pytest

from dstack_core._store import StoreDamaged, StoreUnavailable
from dstack_core._store.store import Store
from dstack_core.errors import ConfigurationError


def close(store: Store) -> None:
    """Closes from outside of any event loop."""
    asyncio.run(store.close())


def test_opening_is_quick_and_without_alembic(tmp_path: Path) -> None:
    """A blank and a current SQLite database take less than 60 ms of work, and nothing heavy is imported for it."""
    code = """
import sys, time
from dstack_core._store.store import Store
from pathlib import Path
import asyncio
times = []
for number in range(10):
    for again in range(2):
        started = time.process_time()
        store = Store.open(None, Path(sys.argv[1], f"{number}.db"))
        times.append(time.process_time() - started)
        asyncio.run(store.close())
heavy = {"alembic", "psycopg", "pydantic", "fastapi", "pluggy", "httpx"} & sys.modules.keys()
print(min(times[::2]) < 0.06, min(times[1::2]) < 0.06, sorted(heavy))
"""
    done = subprocess.run([sys.executable, "-c", code, str(tmp_path)], capture_output=True, text=True, check=True)
    assert done.stdout == "True True []\n"


def test_reading_logs_needs_no_sqlalchemy() -> None:
    """The log store is light: it imports neither SQLAlchemy nor anything of the database."""
    code = "import sys, dstack_core._store.logs; print('sqlalchemy' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "False\n"


SECRETS = {
    "nonsense hunter2": "cannot be read",
    "postgresql+psycopg://user:hunter2@host:port/db": "cannot be read",
    "postgresql+psycopg://user:hun@ter:2@host:hunter2/db": "cannot be read",
    "mysql://user:hunter2@host/db": "of the kind 'mysql' is not supported",
    "postgresql+asyncpg://user:hunter2@host/db": "of the kind 'postgresql\\+asyncpg' is not supported",
    "sqlite+aiosqlite:////tmp/hunter2.db": "of the kind 'sqlite\\+aiosqlite' is not supported",
    "sqlite://": "A SQLite database is a file",
    "sqlite:///:memory:": "A SQLite database is a file",
    "sqlite:////tmp/x.db?mode=hunter2": "A SQLite database is a file",
}


@pytest.mark.parametrize("url", SECRETS)
def test_a_wrong_url_is_explained_without_its_password(url: str) -> None:
    """What is wrong and how it is written right is said; the password is in no message and no traceback."""
    with pytest.raises(ConfigurationError, match=SECRETS[url]) as caught:
        Store.open(url)
    assert "hunter2" not in "".join(traceback.format_exception(caught.value))


@pytest.mark.postgres
@pytest.mark.parametrize(
    "query", ["host={directory}&password=hunter2", "host={directory}&sslpassword=hunter2", "host=/nowhere"]
)
def test_a_database_that_does_not_answer(postgres_url: str, tmp_path: Path, query: str) -> None:
    """The error names the database, the server's own words and the cure, never a password."""
    url = "postgresql+psycopg://dstack:hunter2@/missing?" + query.format(directory=postgres_url.partition("host=")[2])
    with pytest.raises(StoreUnavailable, match=r"PostgreSQL database 'missing' at /.*DSTACK_DATABASE_URL") as caught:
        Store.open(url)
    assert "hunter2" not in "".join(traceback.format_exception(caught.value))


def test_a_missing_driver_says_what_to_install() -> None:
    """Without psycopg the error has the pip line."""
    code = (
        "import sys; sys.modules['psycopg'] = None\n"
        "from dstack_core._store.store import Store\n"
        "try: Store.open('postgresql://user:hunter2@host/db')\n"
        "except Exception as error: print(type(error).__name__, error)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.startswith("ConfigurationError")
    assert "pip install 'dstack-core[postgres]'" in done.stdout
    assert "hunter2" not in done.stdout + done.stderr


def test_short_forms_of_the_url_mean_psycopg(tmp_path: Path) -> None:
    """`postgres://` and `postgresql://` are what many hosts hand out, and are taken."""
    for scheme in ("postgres", "postgresql", "postgresql+psycopg"):
        with pytest.raises(StoreUnavailable, match="PostgreSQL database 'db'"):
            Store.open(f"{scheme}://user@/db?host={tmp_path}")


@pytest.mark.parametrize(
    "content", [b"This is a diary, not a database.\n" * 200, b"SQLite format 3\0" + b"\xff" * 9000]
)
def test_a_file_that_is_no_database_is_named(tmp_path: Path, content: bytes) -> None:
    """Another file in the database's place is said, named and left as it is."""
    path = tmp_path / "server.db"
    path.write_bytes(content)
    with pytest.raises(StoreDamaged, match=rf"{path} is damaged, or no database at all \(.*\)\. Restore a copy"):
        Store.open(None, path)
    assert path.read_bytes() == content


def test_a_file_broken_later_is_named(tmp_path: Path) -> None:
    """Pages overwritten behind the store's back end in an error that names the file."""
    path = tmp_path / "server.db"
    close(Store.open(None, path))
    with path.open("r+b") as file:
        file.seek(4096)
        file.write(b"\xff" * (path.stat().st_size - 4096))
    with pytest.raises(StoreDamaged, match=f"{path} is damaged"):
        use(path)


def use(path: Path) -> None:
    """Opens, reads and writes."""
    from dstack_core._store.tables import MetaRow

    store = Store.open(None, path)
    try:
        asyncio.run(store.transact(lambda session: session.add(MetaRow(key="a", value="b"))))
    finally:
        close(store)


def test_an_empty_file_is_a_blank_database(tmp_path: Path) -> None:
    """A process killed before it wrote anything leaves an empty file: that is a fresh start."""
    (tmp_path / "server.db").touch()
    use(tmp_path / "server.db")


def test_another_programs_database_is_left_alone(blank_store_url: str) -> None:
    """Tables of the same names that are not ours are an error, and nothing is changed."""
    theirs = "CREATE TABLE runs (theirs INTEGER)"
    if blank_store_url.startswith("sqlite"):
        with sqlite3.connect(blank_store_url.removeprefix("sqlite:///")) as connection:
            connection.execute(theirs)
        connection.close()
    else:
        import psycopg

        name, _, host = blank_store_url.rpartition("/@")[2].rpartition("@/")[2].partition("?host=")
        with psycopg.connect(host=host, user="dstack", dbname=name) as other:
            other.execute(theirs.encode())
    for _ in range(2):
        with pytest.raises(ConfigurationError, match=r"already exists.*give dstack a database of its own"):
            Store.open(blank_store_url)


def test_a_place_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    """A directory in the file's place, or a file in the directory's: named, with the cure."""
    with pytest.raises(ConfigurationError, match=rf"{tmp_path} for writing: Is a directory.*DSTACK_HOME"):
        Store.open(None, tmp_path)
    (tmp_path / "file").touch()
    with pytest.raises(ConfigurationError, match=r"for writing: .*DSTACK_HOME"):
        Store.open(None, tmp_path / "file" / "server.db")


READ_ONLY = """
import os, sys
from pathlib import Path
from dstack_core._store.store import Store
if len(sys.argv) > 2:
    os.setgroups([]); os.setgid(int(sys.argv[2])); os.setuid(int(sys.argv[2]))
try: Store.open(None, Path(sys.argv[1]))
except Exception as error: print(type(error).__name__, error)
"""


def test_a_file_that_may_not_be_written_is_named(tmp_path: Path) -> None:
    """Without the permission to write, the error says so at once."""
    path = tmp_path / "server.db"
    close(Store.open(None, path))
    for directory in (tmp_path, *tmp_path.parents[: len(tmp_path.parts) - 3]):
        directory.chmod(0o755)
    path.chmod(0o444)
    other = [str(pwd.getpwnam("nobody").pw_uid)] if os.geteuid() == 0 else []
    done = subprocess.run(
        [sys.executable, "-c", READ_ONLY, str(path), *other], capture_output=True, text=True, check=True
    )
    assert done.stdout.startswith(f"ConfigurationError Cannot open the database {path} for writing: Permission denied")


def test_neither_url_nor_path_is_a_mistake() -> None:
    """A store needs a place."""
    with pytest.raises(ValueError, match="needs a url or a path"):
        Store.open()


def test_waiting_for_a_database_being_made(tmp_path: Path) -> None:
    """Opening waits while another process holds the lock, and then finds or makes the tables."""
    path = tmp_path / "server.db"
    code = (
        "import sqlite3, sys; c = sqlite3.connect(sys.argv[1], isolation_level=None); c.execute('BEGIN EXCLUSIVE');"
        "print('locked', flush=True); sys.stdin.readline()"
    )
    with subprocess.Popen(
        [sys.executable, "-c", code, str(path)], text=True, stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as holder:
        assert holder.stdout is not None
        assert holder.stdout.readline() == "locked\n"
        opening = "import sys; from dstack_core._store.store import Store; Store.open(sys.argv[1])"
        opener = subprocess.Popen([sys.executable, "-c", opening, f"sqlite:///{path}"])
        with pytest.raises(subprocess.TimeoutExpired):
            opener.wait(1)
        holder.communicate("go on\n", 60)
    assert opener.wait(60) == 0
    use(path)
