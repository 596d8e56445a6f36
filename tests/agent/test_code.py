"""Code that is sent to the agent: the job finds its files, and no archive gets out of the job's folder."""

from __future__ import annotations

import hashlib
import os
import resource
import signal
import socket
import subprocess
import sys
import tarfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dstack_core._agent import tar, unpack
from dstack_core._models import code as rules
from dstack_core.testing import wait_until
from tests.support.archives import END, archive, changed, entry, extended, folder, link, run_with
from tests.support.real_agents import LONG, RealAgent, Refused, StartAgent

LONG_NAME = "/".join(["deep" * 10] * 30) + "/name"


# ------------------------------------------------------------------------------------------------------- sending --


def test_the_job_finds_its_files(agent: RealAgent) -> None:
    """Files with their contents, executable ones, links, empty folders, long and foreign names; nothing else."""
    data = archive(
        {"a.txt": b"text", "src/ü b.py": b"x" * 700, LONG_NAME: b"far", "empty": b""},
        entry("bin/tool", b"#!/bin/sh\necho tool\n", mode=0o755),
        folder("void"),
        link("src/up", "../a.txt"),
    )
    script = (
        "ls -A; cat src/up; bin/tool; wc -c < 'src/ü b.py'; stat -c %a a.txt bin/tool void src; ls -A void; "
        f"cat {LONG_NAME}"
    )
    run_with(agent, data, script)
    first = ["a.txt", "bin", "deep" * 10, "empty", "src", "void"]
    rest = ["texttool", "700", "644", "755", "755", "755", "far"]
    assert agent.output().decode().split() == first + rest
    assert agent.wait()["exit_code"] == 0
    assert not (agent.directory / "code").exists()


def test_sending_goes_on_where_it_stopped(agent: RealAgent) -> None:
    """The agent says how much it has; a piece that begins anywhere else, or was cut off, changes nothing."""
    data = archive({"big": os.urandom(3_000_000)})
    name = hashlib.sha256(data).hexdigest()
    assert agent.get(f"/v1/code/{name}") == {"size": 0}
    assert agent.call("PUT", f"/v1/code/{name}?offset=0", data[:1_000_000]) == {"size": 1_000_000}
    for wrong in (0, 999_999, 1_000_001):
        with pytest.raises(Refused, match=r"409: .*1000000 bytes"):
            agent.call("PUT", f"/v1/code/{name}?offset={wrong}", data[wrong : wrong + 10])
    with socket.socket(socket.AF_UNIX) as sender:
        sender.connect(agent.address)
        head = f"PUT /v1/code/{name}?offset=1000000 HTTP/1.1\r\nContent-Length: 2000000\r\n\r\n"
        sender.sendall(head.encode() + data[1_000_000:1_500_000])
    assert agent.get(f"/v1/code/{name}") == {"size": 1_000_000}
    agent.call("PUT", f"/v1/code/{name}?offset=1000000", data[1_000_000:])
    agent.run("wc -c < big", code={"hash": name, "size": len(data)})
    assert agent.output() == b"3000000\n"
    assert agent.get(f"/v1/code/{name}") == {"size": len(data)}, "a sender that comes late has nothing to send"


def test_a_job_whose_code_is_not_here(agent: RealAgent) -> None:
    """Is refused, and nothing of it remains: it may come again when its code is complete."""
    data = archive({"a": b"1"})
    code = {"hash": hashlib.sha256(data).hexdigest(), "size": len(data)}
    for sent in (b"", data[:600]):
        agent.call("PUT", f"/v1/code/{code['hash']}?offset=0", sent)
        with pytest.raises(Refused, match=r"409: .*code is not here"):
            agent.run("cat a", code=code)
    agent.call("PUT", f"/v1/code/{code['hash']}?offset=600", data[600:])
    agent.run("cat a", code=code)
    assert agent.output() == b"1"
    assert agent.run("cat a", code=code)["status"] == "exited"


@pytest.mark.parametrize("name", ["x", "../../agent.lock", "A" * 64, "a" * 63, "a" * 65])
def test_an_archive_is_named_by_a_hash_and_nothing_else(agent: RealAgent, name: str) -> None:
    """No name of an archive can be a path."""
    for method in ("GET", "PUT"):
        response = agent.request(method, f"/v1/code/{name}?offset=0", b"data")
        assert response.status in {400, 404}
    assert not (agent.directory / "code").exists()


@pytest.mark.parametrize("code", [{}, {"hash": 1, "size": 2}, {"hash": "a" * 64, "size": "2"}, []])
def test_code_that_is_described_wrongly(agent: RealAgent, code: object) -> None:
    """Is refused as no job."""
    with pytest.raises(Refused, match="400: "):
        agent.run("true", code=code)


def test_no_room_for_an_archive(start_agent: StartAgent) -> None:
    """A piece for which there is no room is refused as a whole, and what came before it stays."""
    limit = 1 << 20
    agent = start_agent(preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit)))
    name = "a" * 64
    agent.call("PUT", f"/v1/code/{name}?offset=0", bytes(1_000_000))
    with pytest.raises(Refused, match=r"507: .*no room for the code"):
        agent.call("PUT", f"/v1/code/{name}?offset=1000000", bytes(1_000_000))
    assert agent.get(f"/v1/code/{name}") == {"size": 1_000_000}
    agent.run("echo lives")
    assert agent.output() == b"lives\n"


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of two megabytes."""
    place = tmp_path / "disk"
    place.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=2m", "tmpfs", str(place)], capture_output=True, check=False
    )
    if mounted.returncode:
        pytest.skip("needs the right to mount a small file system")
    yield place
    subprocess.run(["umount", "-l", str(place)], check=True)


@pytest.mark.root
def test_no_room_for_the_files(small_disk: Path, start_agent: StartAgent) -> None:
    """The archive fits, and its files do not: the job fails with the file's name and the cure."""
    agent = start_agent(directory=small_disk)
    try:
        run_with(agent, archive({"first": bytes(400_000), "second": bytes(900_000)}), "true", stop_grace=0)
        state = agent.wait()
        assert (state["reason"], state["exit_code"]) == ("code_failed", None)
        for words in ("'second' cannot be written", "No space left", "larger one"):
            assert words in state["message"]
    finally:
        agent.end()


def test_memory_does_not_grow_with_the_archive(agent: RealAgent) -> None:
    """Pieces go to the disk as they come: 200 MB take no more than a few pieces' worth."""
    data = archive({"big": bytes(200 << 20)})
    run_with(agent, data, "wc -c < big")
    assert agent.output() == b"209715200\n"
    peak = int(Path(f"/proc/{agent.pid}/status").read_text().split("VmHWM:")[1].split()[0])
    assert peak < 64 << 10


def test_stop_while_it_unpacks(agent: RealAgent) -> None:
    """At once: the job never runs, the unpacking process is gone, and so is the archive."""
    run_with(agent, archive({f"{number}": b"x" for number in range(20_000)}), "touch ran")
    wait_until((agent.directory / "job/0").exists, timeout=LONG, what="the first file")
    agent.stop(LONG)
    state = agent.wait()
    assert (state["reason"], state["exit_code"]) == ("stopped", None)
    assert agent.job_processes() == set()
    assert not (agent.directory / "job/ran").exists()
    assert not (agent.directory / "code").exists()


def test_killing_the_agent_while_it_unpacks(agent: RealAgent) -> None:
    """The watchdog leaves no process."""
    run_with(agent, archive({f"{number}": b"x" for number in range(20_000)}), "touch ran")
    wait_until((agent.directory / "job/0").exists, timeout=LONG, what="the first file")
    os.kill(agent.pid, signal.SIGKILL)
    agent.process.wait(LONG)
    assert agent.processes() == set()
    assert not (agent.directory / "job/ran").exists()


PYTHONS = ["3.8", "3.9", "3.12", "3.13", "3.14"]


@pytest.mark.parametrize("version", PYTHONS)
@pytest.mark.parametrize("good", [True, False])
def test_other_interpreters(version: str, start_agent: StartAgent, agent_archive: Path, good: bool) -> None:
    """From the same archive of the agent on Python 3.8 and later: good code runs, and bad code is refused."""
    agent = start_agent(command=[interpreter(version), "-I", "-S", str(agent_archive), "serve"])
    data = archive({"dir/ü": b"text"}, link("l", "dir/ü"), *([] if good else [link("bad", "/etc")]))
    run_with(agent, data, "cat l")
    state = agent.wait()
    assert state["reason"] == ("exited" if good else "code_failed")
    assert agent.output() == (b"text" if good else b"")
    assert agent.complaints() == ""


def interpreter(version: str) -> str:
    """An interpreter of this version, installed by pyenv or by the system."""
    for path in [*Path.home().glob(f".pyenv/versions/{version}.*/bin/python"), Path(f"/usr/bin/python{version}")]:
        if path.exists():
            return str(path)
    pytest.skip(f"there is no Python {version} here")


# -------------------------------------------------------------------------------------------------- working_dir --


def test_working_dir_in_the_code(agent: RealAgent) -> None:
    """The commands start there."""
    run_with(agent, archive({"src/app/main.txt": b"main"}), "pwd; cat main.txt", working_dir="src/app")
    assert agent.output().decode() == f"{agent.directory}/job/src/app\nmain"


@pytest.mark.parametrize(
    ("wanted", "words"),
    [
        ("src/ap", ["no folder 'src/ap'", "'readme', 'src'", "Correct working_dir"]),
        ("readme", ["no folder 'readme'"]),
        ("../other", ["'../other' leads out"]),
        ("src/../../x", ["leads out"]),
    ],
)
def test_a_working_dir_that_cannot_be(agent: RealAgent, wanted: str, words: list[str]) -> None:
    """The job fails and says what is there instead; nothing is made anywhere."""
    run_with(agent, archive({"src/app": b"", "readme": b""}), "true", working_dir=wanted)
    state = agent.wait()
    assert (state["reason"], state["exit_code"]) == ("start_failed", None)
    for word in words:
        assert word in state["message"]
    assert not (agent.directory / "other").exists()


def test_a_working_dir_that_leads_out_without_code(agent: RealAgent) -> None:
    """Is refused, too, where the folder would be made."""
    agent.run("true", working_dir="../../beside")
    assert "leads out" in agent.wait()["message"]
    assert not (agent.directory.parent / "beside").exists()


# ------------------------------------------------------------------------------------------------------- refused --

PLAIN = entry("fine", b"1")

FORGED = {
    "a path with ..": (entry("../x"), "'../x' leads out of its folder"),
    "a path that comes back": (entry("a/../../x"), "'a/../../x' leads out of its folder"),
    "an absolute path": (entry("/tmp/x"), "'/tmp/x' is not a relative path"),
    "an empty part": (entry("a//x"), "'a//x' leads out of its folder, or is written in more than one way"),
    "a dot": (entry("./x"), "'./x' leads out of its folder, or is written in more than one way"),
    "the folder itself": (folder("."), "'.' leads out"),
    "no name": (entry(""), "'' is not a relative path"),
    "a NUL": (extended({"path": b"a\0b"}) + entry("x"), "'a\\x00b' is not a relative path"),
    "a path that is too long": (entry("/".join(["a" * 99] * 41)), "is longer than 4096 bytes"),
    "a name that no file system takes": (entry("a" * 300), "cannot be written: File name too long"),
    "a file that ends like a folder": (entry("x/"), "'x/' leads out of its folder, or is written"),
    "a link to an absolute path": (link("l", "/etc/passwd"), "'l' leads to an absolute path"),
    "a link that leads out": (link("d/l", "../../x"), "'d/l' leads out of the folder"),
    "a link that leads out and back": (link("l", "../job/x"), "'l' leads out of the folder"),
    "a link to nothing": (link("l", ""), "'l' leads to an absolute path"),
    "a link that leads out through another": (
        link("a/up", "..") + link("l", "a/up/../x"),
        "'l' leads out of the folder through another link",
    ),
    "a link out through two others": (
        link("d/e/up", "../..") + link("d/again", "e/up") + link("m", "d/again/../y"),
        "'m' leads out of the folder through another link",
    ),
    "a file in a link": (link("d", ".") + entry("d/x"), "'d/x' lies in 'd', which is a link"),
    "a file in a link, before it": (entry("d/e/x") + link("d", "fine"), "'d/e/x' lies in 'd', which is a link"),
    "a file in a file": (entry("f/x") + entry("f"), "'f/x' lies in 'f', which is a file"),
    "a hard link": (entry("h", kind=tarfile.LNKTYPE, linkname="fine"), "'h' is a hard link"),
    "a hard link out": (entry("h", kind=tarfile.LNKTYPE, linkname="/etc/shadow"), "'h' is a hard link"),
    "a character device": (entry("dev", kind=tarfile.CHRTYPE, devmajor=1, devminor=8), "'dev' is a device"),
    "a block device": (entry("dev", kind=tarfile.BLKTYPE, devmajor=8, devminor=0), "'dev' is a device"),
    "a named pipe": (entry("p", kind=tarfile.FIFOTYPE), "'p' is a named pipe"),
    "a sparse file": (entry("s", kind=tarfile.GNUTYPE_SPARSE), "'s' is a sparse file"),
    "a sparse file of the newer kind": (
        extended({"GNU.sparse.major": b"1", "GNU.sparse.realsize": b"9999999999999"}) + entry("s"),
        "'s' has the unknown attribute 'GNU.sparse.",
    ),
    "a long name as GNU writes it": (
        entry("g", b"name\0", kind=tarfile.GNUTYPE_LONGNAME),
        "'g' is of the unknown kind",
    ),
    "an unknown kind": (entry("u", kind=b"Z"), "'u' is of the unknown kind 'Z'"),
    "attributes for all that follow": (entry("g", b"9 path=x\n", kind=tarfile.XGLTYPE), "'g' is of the unknown kind"),
    "a name twice": (entry("x") + entry("x"), "'x' is there twice"),
    "a folder twice": (folder("x") + entry("x/y") + folder("x"), "'x' is there twice"),
    "a file and a link of one name": (entry("x") + link("x", "fine"), "'x' is there twice"),
    "more bytes than the archive": (changed(entry("big"), 124, b"77777777777\0"), "'big' has more bytes"),
    "far more bytes than the archive": (
        extended({"size": b"99999999999999999999"}) + entry("big"),
        "'big' has more bytes",
    ),
    "a folder with contents": (changed(folder("d"), 124, b"00000001000\0") + bytes(512), "'d/' is a folder and has"),
    "a link with contents": (changed(link("l", "fine"), 124, b"00000001000\0") + bytes(512), "'l' is a link and has"),
    "a damaged header": (changed(entry("x"), 100, b"7", mend=False), "The header of 'x' is damaged"),
    "another kind of archive": (changed(entry("x"), 257, b"ustar  \0"), "The header of 'x' is damaged, or of another"),
    "a size in a script of its own": (changed(entry("x"), 124, b"\x80" + bytes(10) + b"\1"), "is no number"),
    "a size that is none": (extended({"size": b"-1"}) + entry("x"), "'-1' in an extended header is no number"),
    "a record longer than its header": (entry("pax", b"99 path=x\n", tarfile.XHDTYPE) + entry("x"), "cannot be read"),
    "a record of no length": (entry("pax", b"0 path=x\n", tarfile.XHDTYPE) + entry("x"), "cannot be read"),
    "a record of an absurd length": (entry("pax", b"9" * 5000 + b" a=b\n", tarfile.XHDTYPE), "cannot be read"),
    "an extended header that is too long": (entry("pax", bytes(70_000), tarfile.XHDTYPE), "longer than 65536 bytes"),
    "no end": (b"cut", "is cut off"),
}


@pytest.mark.parametrize("kind", FORGED)
def test_a_forged_archive_is_refused(agent: RealAgent, kind: str, tmp_path: Path) -> None:
    """With the entry's name and before anything is written: neither outside the job's folder nor in it."""
    forged, words = FORGED[kind]
    data = PLAIN + forged + (END if kind != "no end" else b"")
    beside = sorted(path.name for path in tmp_path.iterdir())
    run_with(agent, data, "touch ran")
    state = agent.wait()
    assert (state["reason"], state["exit_code"]) == ("code_failed", None)
    assert words in state["message"]
    written = sorted(path.name for path in (agent.directory / "job").rglob("*"))
    assert written == (["fine"] if "cannot be written" in words else [])
    assert sorted(path.name for path in tmp_path.iterdir()) == beside
    assert not (agent.directory / "code").exists()
    assert agent.complaints() == ""


@pytest.mark.parametrize("path", ["../x", "/etc/hosts", "a/../../x", "a//b"])
def test_a_path_to_delete_that_leads_out(agent: RealAgent, path: str) -> None:
    """Is refused like any other."""
    run_with(agent, archive({"fine": b""}), "true", deleted=[path])
    state = agent.wait()
    assert state["reason"] == "code_failed"
    assert repr(path) in state["message"]


def test_the_refusal_says_what_to_do(agent: RealAgent) -> None:
    """The cure is in the message, and a name is printable whatever it holds."""
    run_with(agent, archive({"fine": b""}, link("evil\x1b[2J\n", "/x")), "true")
    message = agent.wait()["message"]
    assert ".dstackignore" in message
    assert "'evil\\x1b[2J\\n'" in message


def unpacked(tmp_path: Path, data: bytes, deleted: tuple[str, ...] = ()) -> str:
    """Runs the program that unpacks, on a folder that may hold something already; what it refused."""
    (tmp_path / "archive").write_bytes(data)
    (tmp_path / "deleted").write_bytes(b"\0".join(path.encode() for path in deleted))
    (tmp_path / "job").mkdir(exist_ok=True)
    root = Path(unpack.__file__).parents[2]
    code = "import sys; from dstack_core._agent.unpack import run; sys.exit(run(sys.argv[1:]))"
    argv = [sys.executable, "-c", code, str(tmp_path / "job"), str(tmp_path / "archive"), str(tmp_path / "deleted")]
    done = subprocess.run(argv, cwd=root, capture_output=True, text=True, check=False)
    assert done.returncode == (unpack.EXIT_REFUSED if done.stdout else 0), done.stderr
    return done.stdout


def test_a_million_tiny_files(tmp_path: Path) -> None:
    """Are refused at the first one too many, by its name, and none is written."""
    header = bytearray(entry("0" * 7))
    data = bytearray()
    for number in range(unpack.MOST_ENTRIES + 1):
        header[:7] = b"%07d" % number
        data += changed(bytes(header), 0, b"")
    refusal = unpacked(tmp_path, bytes(data) + b"anything may follow")
    assert "'0200000' is one entry too many: there may be 200000" in refusal
    assert list((tmp_path / "job").iterdir()) == []


def test_a_million_folders_in_few_entries(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Folders that no entry names count as well."""
    monkeypatch.setattr(unpack, "MOST_ENTRIES", 1000)
    data = archive({f"{number}/" + "a/" * 900 + "x": b"" for number in range(3)})
    (tmp_path / "archive").write_bytes(data)
    with (tmp_path / "archive").open("rb") as file, pytest.raises(tar.BadArchive, match="one folder too many"):
        unpack.check(file.fileno())


def test_what_is_in_the_way_is_replaced_and_no_link_is_followed(tmp_path: Path) -> None:
    """Whatever a git repository has there: links out of the folder, files for folders, folders for files."""
    outside = tmp_path / "outside"
    outside.mkdir()
    (outside / "kept").write_text("kept")
    job = tmp_path / "job"
    job.mkdir()
    (job / "data").symlink_to(outside)
    (job / "file").symlink_to(outside / "kept")
    (job / "was-file").write_text("")
    (job / "was-folder/deep").mkdir(parents=True)
    (job / "was-folder/link").symlink_to(outside)
    (job / "linked").symlink_to(outside)
    data = archive(
        {"data/kept": b"new", "file": b"new", "was-file/x": b"new", "was-folder": b"new"},
        folder("linked"),
        link("was-file/l", "x"),
    )
    assert unpacked(tmp_path, data) == ""
    assert {path.name: path.read_text() for path in outside.iterdir()} == {"kept": "kept"}
    assert (job / "data/kept").read_text() == (job / "file").read_text() == (job / "was-folder").read_text() == "new"
    assert not any((job / name).is_symlink() for name in ("data", "file", "linked"))
    assert (job / "was-file/l").read_text() == "new"


def test_deleting_follows_no_link_and_leaves_no_empty_folder(tmp_path: Path) -> None:
    """Files, links, whole folders; what is not there is fine; what lies behind a link stays."""
    outside = tmp_path / "outside"
    (outside / "sub").mkdir(parents=True)
    (outside / "sub/kept").write_text("kept")
    job = tmp_path / "job"
    (job / "a/b").mkdir(parents=True)
    for name in ("a/b/gone", "a/stays", "top"):
        (job / name).write_text("")
    (job / "link").symlink_to(outside)
    (job / "gone-link").symlink_to(outside)
    (job / "module/x").mkdir(parents=True)
    gone = ("a/b/gone", "top", "link/sub/kept", "gone-link", "module", "never/was", "top/below")
    assert unpacked(tmp_path, archive({"new": b""}), gone) == ""
    assert sorted(path.relative_to(job).as_posix() for path in job.rglob("*")) == ["a", "a/stays", "link", "new"]
    assert (outside / "sub/kept").read_text() == "kept"


# --------------------------------------------------------------------------------------------------------- rules --

PARTS = st.sampled_from(["a", "b", "..", ".", "", "ü", "\0", "x" * 3000, " "])
PATHS = st.lists(PARTS, max_size=5).map("/".join)


@given(PATHS, PATHS)
def test_the_agents_rules_are_the_servers(path: str, target: str) -> None:
    """Both ends agree on every path and every link."""
    assert unpack.path_problem(path) == rules.path_problem(path)
    assert unpack.link_problem(path, target) == rules.link_problem(path, target)


def test_the_agents_limits_are_the_servers() -> None:
    """What the server accepts, the agent unpacks."""
    assert (unpack.MOST_ENTRIES, unpack.LONGEST_PATH) == (rules.MOST_ENTRIES, rules.LONGEST_PATH)


NAMES = st.text(st.characters(blacklist_characters="/\0", blacklist_categories=["Cs"]), min_size=1, max_size=150)
FILES = st.dictionaries(NAMES.filter(lambda name: name.strip(".")), st.binary(max_size=1100), max_size=5)


@given(FILES, st.booleans(), NAMES)
def test_every_archive_of_the_server_is_read(files: dict[str, bytes], executable: bool, target: str) -> None:
    """Whatever Python's own writer makes of names and sizes, the reader finds again."""
    made = [entry(f"d/{name}", data, mode=0o755 if executable else 0o644) for name, data in files.items()]
    file = os.memfd_create("archive")
    try:
        os.write(file, b"".join([*made, folder("void"), link("l", target), END]))
        *found, void, last = tar.entries(file)
        assert {one.name: os.pread(file, one.size, one.offset) for one in found} == {
            f"d/{name}": data for name, data in files.items()
        }
        assert {one.executable for one in found} <= {executable}
        assert (void.kind, void.name, last.kind, last.target) == (tar.FOLDER, "void", tar.LINK, target)
    finally:
        os.close(file)


def test_names_that_are_no_text(tmp_path: Path) -> None:
    """Bytes that are no UTF-8 are the same bytes on the disk."""
    name = b"caf\xe9".decode(errors="surrogateescape")
    assert unpacked(tmp_path, archive({name: b"x"})) == ""
    assert [os.fsencode(path.name) for path in (tmp_path / "job").iterdir()] == [b"caf\xe9"]


def test_sending_nothing(agent: RealAgent) -> None:
    """An empty archive is a folder without anything."""
    run_with(agent, END, "ls -A | wc -l")
    assert agent.output() == b"0\n"
