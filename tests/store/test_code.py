"""The store of code: what it takes, what it refuses by name, and the archives that it makes."""

from __future__ import annotations

import hashlib
import io
import json
import os
import resource
import subprocess
import sys
import tarfile
from collections.abc import AsyncIterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from dstack_core._models.code import CHUNK, MOST_ENTRIES, CodeFile, CodeLink, CodeManifest
from dstack_core._store.code import PIECE, UNUSED, UPLOAD_GRACE, CodeIncomplete, CodeRefused, CodeStore

pytestmark = pytest.mark.anyio


@pytest.fixture
async def code(tmp_path: Path) -> AsyncIterator[CodeStore]:
    """An empty store."""
    store = CodeStore(tmp_path / "code")
    yield store
    await store.aclose()


def sha256(data: bytes) -> str:
    """As chunks are named."""
    return hashlib.sha256(data).hexdigest()


def pieces(content: bytes) -> list[bytes]:
    """The chunks of a file."""
    return [content[start : start + CHUNK] for start in range(0, len(content), CHUNK)]


def file(path: str, content: bytes = b"", executable: bool = False) -> CodeFile:
    """An entry of a manifest."""
    chunks = tuple(map(sha256, pieces(content)))
    return CodeFile(path=path, size=len(content), executable=executable, chunks=chunks)


async def put(code: CodeStore, manifest: CodeManifest, *contents: bytes) -> str:
    """Stores a manifest with its chunks."""
    for content in contents:
        await code.put_chunks([(sha256(piece), piece) for piece in pieces(content)])
    body = manifest.model_dump_json().encode()
    await code.put_manifest(sha256(body), body)
    return sha256(body)


async def put_json(code: CodeStore, document: dict[str, Any]) -> None:
    """Stores what somebody wrote who does not use our client."""
    body = json.dumps(document).encode()
    await code.put_manifest(sha256(body), body)


async def archive(code: CodeStore, name: str, offset: int = 0) -> bytes:
    """The archive of a manifest."""
    got = [piece async for piece in code.archive(name, offset)]
    assert all(len(piece) <= PIECE for piece in got)
    return b"".join(got)


async def test_chunks_are_there_once(code: CodeStore, tmp_path: Path) -> None:
    """A chunk that was stored is not missing any more; again is fine."""
    assert await code.missing([sha256(b"a"), sha256(b"b"), sha256(b"a")]) == [sha256(b"a"), sha256(b"b")]
    await code.put_chunk(sha256(b"a"), b"a")
    await code.put_chunk(sha256(b"a"), b"a")
    assert await code.missing([sha256(b"a"), sha256(b"b")]) == [sha256(b"b")]
    assert list((tmp_path / "code" / "tmp").iterdir()) == []


@pytest.mark.parametrize(
    ("name", "data", "says"),
    [
        (sha256(b"a"), b"b", "other contents than its name says"),
        (sha256(b""), b"", "has 0 bytes"),
        ("0" * 64, b"x" * (CHUNK + 1), "it may have 1 to"),
        ("../../etc/passwd", b"x", r"'\.\./\.\./etc/passwd' is not a SHA-256"),
        (sha256(b"a").upper(), b"a", "is not a SHA-256"),
    ],
)
async def test_a_chunk_that_is_not_what_it_says(code: CodeStore, name: str, data: bytes, says: str) -> None:
    """Another hash, no bytes, too many, or a name that is a path: refused, and nothing is stored."""
    with pytest.raises(CodeRefused, match=says):
        await code.put_chunk(name, data)


async def test_a_manifest_comes_after_its_chunks(code: CodeStore) -> None:
    """Without them it is refused, with the file's name; with them it is there."""
    manifest = CodeManifest(files=(file("src/train.py", b"print(1)"),))
    body = manifest.model_dump_json().encode()
    with pytest.raises(CodeIncomplete, match=r"'src/train\.py': chunk \w+ is not here"):
        await code.put_manifest(sha256(body), body)
    assert not await code.has_manifest(sha256(body))
    name = await put(code, manifest, b"print(1)")
    assert await code.has_manifest(name)
    assert await code.manifest(name) == manifest
    with pytest.raises(CodeIncomplete, match="Submit the run again"):
        await code.manifest("0" * 64)
    with pytest.raises(CodeRefused, match="other contents than its name says"):
        await code.put_manifest("0" * 64, body)


EMPTY = {"size": 0}
ONE = sha256(b"x")


@pytest.mark.parametrize(
    ("document", "says"),
    [
        ({"files": [{"path": "../x", **EMPTY}]}, r"'\.\./x' leads out of its folder"),
        ({"files": [{"path": "a/../../x", **EMPTY}]}, r"'a/\.\./\.\./x' leads out"),
        ({"files": [{"path": "/etc/passwd", **EMPTY}]}, "'/etc/passwd' is not a relative path"),
        ({"files": [{"path": "a\0b", **EMPTY}]}, r"'a\\x00b' is not a relative path"),
        ({"files": [{"path": "", **EMPTY}]}, "'' is not a relative path"),
        ({"files": [{"path": "./x", **EMPTY}]}, r"'\./x' leads out of its folder, or is written in more than one way"),
        ({"files": [{"path": "a//b", **EMPTY}]}, "'a//b' leads out"),
        ({"files": [{"path": "a/" * 2500 + "b", **EMPTY}]}, "b' is longer than 4096 bytes"),
        ({"folders": ["../x"]}, r"'\.\./x' leads out"),
        ({"deleted": ["../x"]}, r"'\.\./x' leads out"),
        ({"deleted": ["/x"]}, "'/x' is not a relative path"),
        ({"links": [{"path": "../l", "target": "x"}]}, r"'\.\./l' leads out"),
        ({"links": [{"path": "l", "target": "/etc"}]}, "'l' leads to an absolute path: '/etc'"),
        ({"links": [{"path": "a/l", "target": "../../x"}]}, r"'a/l' leads out of the folder: '\.\./\.\./x'"),
        (
            {"links": [{"path": "a/b/up", "target": "../.."}, {"path": "a/b/c/l", "target": "../up/../etc"}]},
            r"'a/b/c/l' leads out of the folder, by way of other links",
        ),
        ({"files": [{"path": "a", **EMPTY}, {"path": "a", **EMPTY}]}, "'a' is there twice"),
        ({"files": [{"path": "a", **EMPTY}], "folders": ["a"]}, "'a' is there twice"),
        ({"files": [{"path": "a", **EMPTY}, {"path": "a/b/c", **EMPTY}]}, "'a/b/c' lies below 'a', which is a file"),
        (
            {"links": [{"path": "l", "target": "x"}], "files": [{"path": "l/b", **EMPTY}]},
            "'l/b' lies below 'l', which is a link",
        ),
        ({"links": [{"path": "l", "target": "x"}], "folders": ["l/b"]}, "'l/b' lies below 'l', which is a link"),
        ({"files": [{"path": "a", "size": 5, "chunks": []}]}, "'a' of 5 bytes has 0 chunks"),
        ({"files": [{"path": "a", "size": -1, "chunks": []}]}, "'a' of -1 bytes"),
        ({"files": [{"path": "a", "size": 0, "chunks": [ONE]}]}, "'a' of 0 bytes has 1 chunks"),
        ({"files": [{"path": "a", "size": 2, "chunks": [ONE]}]}, "'a': chunk .* has 1 bytes, not 2"),
        (
            {"files": [{"path": "a", "size": 1, "chunks": ["../../x"]}]},
            "'a' has a chunk that is not named by a SHA-256",
        ),
        ({"files": [{"path": "a", "size": 1}], "more": 1}, "This is no manifest: more"),
        ({"files": "x"}, "This is no manifest: files"),
    ],
)
async def test_what_cannot_be_unpacked_without_harm(code: CodeStore, document: dict[str, Any], says: str) -> None:
    """Whatever would leave its folder, clash, or is not what it says is refused, with the entry's name."""
    await code.put_chunk(ONE, b"x")
    with pytest.raises(CodeRefused, match=says):
        await put_json(code, document)


async def test_a_million_tiny_files(code: CodeStore) -> None:
    """Too many entries are refused with the name of the first one too many, however small they are."""
    entries = [{"path": f"f{number:07}", "size": 0} for number in range(MOST_ENTRIES + 1)]
    with pytest.raises(CodeRefused, match=r"'f0200000' is one entry too many: there may be 200,000"):
        await put_json(code, {"files": entries})
    entries += [{"path": f"f{number:07}", "size": 0} for number in range(MOST_ENTRIES + 1, 1_000_000)]
    with pytest.raises(CodeRefused, match=r"'f0200000' is one entry too many"):
        await put_json(code, {"files": entries})
    with pytest.raises(CodeRefused, match="is one entry too many"):
        await put_json(code, {"folders": ["a"] * 2_000_000})


async def test_a_bomb(code: CodeStore) -> None:
    """One chunk that is named a million times is one chunk to send, and terabytes to unpack: refused by name."""
    chunk = bytes(CHUNK)
    await code.put_chunk(sha256(chunk), chunk)
    for times, says in ((900_000, "'bomb' is too much: the files may have 64 GB"), (1_000_000, "The manifest has 68,")):
        one = {"path": "bomb", "size": CHUNK * times, "chunks": [sha256(chunk)] * times}
        with pytest.raises(CodeRefused, match=says):
            await put_json(code, {"files": [one]})
    many = [{"path": f"f{n}", "size": CHUNK * 100, "chunks": [sha256(chunk)] * 100} for n in range(200)]
    with pytest.raises(CodeRefused, match="'f163' is too much: the files may have 64 GB together"):
        await put_json(code, {"files": many})


async def test_an_archive_has_all_entries(code: CodeStore) -> None:
    """Files with their mode, empty folders and links; long names and names in other scripts, too."""
    big = os.urandom(CHUNK + 1000)
    long = "/".join(["long" * 20] * 4)
    manifest = CodeManifest(
        files=(file("a", b"1"), file("big", big), file("empty"), file(long, b"2"), file("ä/ü", b"3", executable=True)),
        links=(CodeLink(path="l", target="ä/ü"),),
        folders=("nothing",),
        deleted=("gone",),
    )
    name = await put(code, manifest, b"1", b"2", b"3", big)
    data = await archive(code, name)
    assert await code.archive_size(name) == len(data)
    with tarfile.open(fileobj=io.BytesIO(data)) as opened:
        members = {member.name: member for member in opened}
        contents = {n: opened.extractfile(m).read() for n, m in members.items() if m.isreg()}  # type: ignore[union-attr]  # those of files are there
    assert contents == {"a": b"1", "big": big, "empty": b"", long: b"2", "ä/ü": b"3"}
    assert {n: m.mode for n, m in members.items() if m.isreg()} == dict.fromkeys(contents, 0o644) | {"ä/ü": 0o755}
    assert (members["nothing"].isdir(), members["l"].issym(), members["l"].linkname) == (True, True, "ä/ü")
    assert set(members) == {*contents, "nothing", "l"}


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(offset=st.one_of(st.integers(0, 3000), st.integers(0, CHUNK * 2 + 9000)))
async def test_an_archive_can_be_read_from_anywhere(code: CodeStore, offset: int) -> None:
    """From any byte on, the rest is the same bytes as the first time."""
    big = bytes(range(256)) * (CHUNK // 128)
    manifest = CodeManifest(files=(file("a", b"1"), file("big", big), file("c", b"3" * 700)))
    name = await put(code, manifest, b"1", big, b"3" * 700)
    assert await archive(code, name, offset) == (await archive(code, name))[offset:]


async def test_an_empty_archive(code: CodeStore) -> None:
    """A manifest of deletions alone has an archive of nothing."""
    name = await put(code, CodeManifest(deleted=("gone",)))
    with tarfile.open(fileobj=io.BytesIO(await archive(code, name))) as opened:
        assert opened.getnames() == []


@pytest.mark.parametrize("damage", [b"", b"other", None])
async def test_a_damaged_chunk_is_sent_again(code: CodeStore, tmp_path: Path, damage: bytes | None) -> None:
    """What a power cut left of a chunk is noticed by its hash; the next upload brings it anew."""
    manifest = CodeManifest(files=(file("src/a", b"hello"),))
    name = await put(code, manifest, b"hello")
    path = tmp_path / "code" / "chunks" / sha256(b"hello")[:2] / sha256(b"hello")
    path.unlink() if damage is None else path.write_bytes(damage)
    with pytest.raises(CodeIncomplete, match="'src/a' is damaged on the server"):
        await archive(code, name)
    assert not await code.has_manifest(name)
    assert await code.missing([sha256(b"hello")]) == [sha256(b"hello")]
    assert b"hello" in await archive(code, await put(code, manifest, b"hello"))


FULL = """
import asyncio, resource, sys
from hashlib import sha256
from pathlib import Path
from dstack_core._store.code import CodeStore, CodeStoreFull

resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))

async def main():
    code = CodeStore(Path(sys.argv[1]))
    await code.put_chunk(sha256(b"small").hexdigest(), b"small")
    try:
        await code.put_chunk(sha256(b"x" * 5000).hexdigest(), b"x" * 5000)
    except CodeStoreFull as error:
        print(error)
    await code.aclose()

asyncio.run(main())
"""


def test_no_room(tmp_path: Path) -> None:
    """A full disk is said clearly, with the place, and leaves nothing half-written."""
    folder = tmp_path / "code"
    done = subprocess.run([sys.executable, "-c", FULL, str(folder)], capture_output=True, text=True, check=True)
    assert done.stdout.startswith(f"No room for code in {folder} (")
    assert done.stdout.endswith("Free some space there.\n")
    assert [path.name for path in folder.rglob("*") if path.is_file()] == [sha256(b"small")]
    assert resource.getrlimit(resource.RLIMIT_FSIZE)[1] != 1000


async def test_what_nobody_needs_is_removed(code: CodeStore, tmp_path: Path) -> None:
    """After 30 days without use; not what an unfinished run needs, nor what was asked for since."""
    old = await put(code, CodeManifest(files=(file("a", b"old"), file("b", b"both"))), b"old", b"both")
    needed = await put(code, CodeManifest(files=(file("a", b"needed"), file("b", b"both"))), b"needed", b"both")
    now = datetime.now(UTC)
    assert await code.collect(now + UNUSED - timedelta(hours=1), set()) == 0
    assert await code.collect(now + UNUSED + timedelta(hours=1), {needed}) == 1
    assert not await code.has_manifest(old)
    assert b"needed" in await archive(code, needed)
    assert b"both" in await archive(code, needed)
    long_ago = (now - UNUSED - timedelta(days=1)).timestamp()
    os.utime(tmp_path / "code" / "manifests" / needed, (long_ago, long_ago))
    assert await code.has_manifest(needed)
    assert await code.collect(now, set()) == 0
    assert await code.collect(now + UNUSED + timedelta(hours=1), set()) == 2
    assert [path for path in (tmp_path / "code").rglob("*") if path.is_file()] == []


async def test_an_upload_in_progress_is_left_alone(code: CodeStore, tmp_path: Path) -> None:
    """Chunks that no manifest names yet stay for a day after somebody asked for them."""
    await code.put_chunk(sha256(b"a"), b"a")
    (tmp_path / "code" / "tmp" / "draft").write_bytes(b"of a killed server")
    now = datetime.now(UTC)
    assert await code.collect(now + UPLOAD_GRACE - timedelta(hours=1), set()) == 0
    assert await code.missing([sha256(b"a")]) == []
    assert (tmp_path / "code" / "tmp" / "draft").exists()
    assert await code.collect(now + UPLOAD_GRACE + timedelta(hours=1), set()) == 1
    assert await code.missing([sha256(b"a")]) == [sha256(b"a")]
    assert not (tmp_path / "code" / "tmp" / "draft").exists()
