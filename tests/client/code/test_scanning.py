"""What is brought along of a folder, and what is refused by name."""

from __future__ import annotations

import hashlib
import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from dstack.api import ConfigurationError, LocalRepo
from dstack_core._client.code.memory import FileMemory
from dstack_core._client.code.repos import tree_of_repo
from dstack_core._client.code.scanning import Found, look_through, tree_of
from dstack_core._models.code import CodeManifest
from tests.support.git import git

pytestmark = pytest.mark.usefixtures("own_home")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """An empty folder."""
    path = tmp_path / "code"
    path.mkdir()
    return path


def write(folder: Path, **files: str) -> None:
    """Writes files; `__` in a name stands for `/`."""
    for name, content in files.items():
        path = folder / name.replace("__", "/")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(content)


def manifest(folder: Path) -> CodeManifest:
    """What a run gets of a folder."""
    return tree_of_repo(LocalRepo(repo_dir=folder)).manifest


def refusal(folder: Path) -> str:
    """Why a folder cannot be sent."""
    with pytest.raises(ConfigurationError) as refused:
        manifest(folder)
    return str(refused.value)


def read_bytes(folder: Path) -> int:
    """How many bytes of a folder are read when it is looked through."""
    sizes: list[int] = []
    tree_of_repo(LocalRepo(repo_dir=folder), sizes.append)
    return sum(sizes)


def test_files_links_and_empty_folders(folder: Path) -> None:
    """All that is there, sorted: files with their mode, links as links, and folders that nothing else would make."""
    write(folder, b__two="22", a="1", empty_file="")
    (folder / "b" / "two").chmod(0o755)
    (folder / "link").symlink_to("b/two")
    (folder / "b" / "up").symlink_to("../a")
    (folder / "nothing" / "at all").mkdir(parents=True)
    found = manifest(folder)
    assert [(f.path, f.size, f.executable, len(f.chunks)) for f in found.files] == [
        ("a", 1, False, 1),
        ("b/two", 2, True, 1),
        ("empty_file", 0, False, 0),
    ]
    assert [(link.path, link.target) for link in found.links] == [("b/up", "../a"), ("link", "b/two")]
    assert found.folders == ("nothing/at all",)
    assert found.deleted == ()


def test_dstackignore_has_the_last_word(folder: Path) -> None:
    """Both kinds of ignore files count, in each folder; the inner one wins, and `.dstackignore` over `.gitignore`."""
    write(folder, a_log="", keep_log="", data__big="", data__small="", sub__a_log="", sub__x_tmp="", old__x="")
    for name in ("a_log", "keep_log", "sub/a_log"):
        (folder / name).rename(folder / name.replace("_log", ".log"))
    (folder / ".gitignore").write_text("*.log\nold/\n")
    (folder / ".dstackignore").write_text("!keep.log\ndata/*\n!data/small\n")
    (folder / "sub" / ".dstackignore").write_text("*_tmp\n!a.log\n")
    paths = {file.path for file in manifest(folder).files}
    assert paths == {".dstackignore", ".gitignore", "data/small", "keep.log", "sub/.dstackignore", "sub/a.log"}


def test_git_s_own_files_stay_at_home(folder: Path) -> None:
    """Neither the repository's `.git` nor that of another one below it, nor the file that a submodule has."""
    git(folder, "init")
    (folder / "inner").mkdir()
    git(folder / "inner", "init")
    write(folder, inner__x="", sub__y="")
    (folder / "sub" / ".git").write_text("gitdir: elsewhere")
    assert [file.path for file in manifest(folder).files] == ["inner/x", "sub/y"]


def test_links_out_of_the_folder_are_refused(folder: Path) -> None:
    """Absolute, by `..`, and by way of another link: each is named, with where it leads and what to do."""
    (folder / "x" / "y" / "z").mkdir(parents=True)
    (folder / "absolute").symlink_to("/etc/passwd")
    (folder / "x" / "out").symlink_to("../../secret")
    said = refusal(folder)
    assert "'absolute' is a link that leads to an absolute path ('/etc/passwd'); leave it out: add it to .dst" in said
    assert "'x/out' is a link that leads out of the folder ('../../secret')" in said
    (folder / "absolute").unlink()
    (folder / "x" / "out").unlink()
    (folder / "x" / "y" / "top").symlink_to("../..")
    (folder / "x" / "y" / "z" / "trick").symlink_to("../top/../etc")
    assert "'x/y/z/trick' leads out of the folder, by way of other links" in refusal(folder)
    (folder / ".dstackignore").write_text("trick\n")
    assert [link.path for link in manifest(folder).links] == ["x/y/top"]


def test_what_is_neither_file_nor_folder_is_refused(folder: Path) -> None:
    """A pipe and a socket are named; ignored, they are in nobody's way."""
    os.mkfifo(folder / "pipe")
    with socket.socket(socket.AF_UNIX) as listener:
        here = Path.cwd()
        os.chdir(folder)
        listener.bind("sock")
        os.chdir(here)
    said = refusal(folder)
    assert "'pipe' is neither a file, a folder nor a link" in said
    assert "'sock' is neither" in said
    (folder / ".gitignore").write_text("pipe\nsock\n")
    assert [file.path for file in manifest(folder).files] == [".gitignore"]


@pytest.mark.root
def test_a_device_is_refused(folder: Path) -> None:
    """A device is named, and not read."""
    os.mknod(folder / "null", 0o20666, os.makedev(1, 3))
    assert "'null' is neither a file, a folder nor a link" in refusal(folder)


def test_a_name_that_is_no_text_is_refused(folder: Path) -> None:
    """Names are UTF-8 on their way; another one is shown as Python shows it."""
    Path(os.fsdecode(os.fsencode(folder) + b"/caf\xe9")).write_text("x")
    assert r"'caf\udce9' has a name that is not UTF-8; rename it" in refusal(folder)


def test_too_many_entries_are_refused(folder: Path) -> None:
    """The first entry too many is named, whatever kind it is."""
    write(folder, **{f"d__f{number}": "" for number in range(5)})
    look_through(str(folder), Found(str(folder), most_entries=5))
    (folder / "empty").mkdir()
    with pytest.raises(
        ConfigurationError, match=r"'\w+(/f\d)?' is one entry too many, there may be 5\..*\.dstackignore"
    ):
        look_through(str(folder), Found(str(folder), most_entries=5))


def test_too_many_bytes_are_refused(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The largest file is named."""
    write(folder, small="x", large="x" * 1000)
    monkeypatch.setattr("dstack_core._client.code.scanning.MOST_BYTES", 1000)
    assert "The largest file is 'large'" in refusal(folder)


AS_NOBODY = """
import io, os, sys
from dstack.api import ConfigurationError, LocalRepo

def write(folder):
    LocalRepo(repo_dir=folder).write_code_file(io.BytesIO())

# Loads all that is needed: the other user may not be able to read the environment of this test.
write(sys.argv[2])
if os.geteuid() == 0:
    os.setgid(65534); os.setuid(65534)
try:
    write(sys.argv[1])
except ConfigurationError as error:
    print(error)
"""


def test_what_cannot_be_read_is_named(folder: Path, tmp_path: Path) -> None:
    """All files and folders without read permission are named, each with its cure."""
    write(folder, fine="", secret="", also__secret="", closed__inner="")
    write(tmp_path / "another", file="x")
    for path in (folder / "also", *folder.parents, folder):
        # Other users may not look into the folders that pytest makes.
        if path.stat().st_mode & 0o005 != 0o005:
            path.chmod(0o755)
    for name in ("secret", "also/secret", "closed"):
        (folder / name).chmod(0)
    command = [sys.executable, "-c", AS_NOBODY, str(folder), str(tmp_path / "another")]
    env = {**os.environ, "DSTACK_HOME": str(tmp_path / "nobodys")}
    done = subprocess.run(command, capture_output=True, text=True, env=env, check=True)
    (folder / "closed").chmod(0o700)
    assert "'secret' cannot be read (Permission denied); make it readable (chmod u+r), or leave it out" in done.stdout
    assert "'also/secret' cannot be read" in done.stdout
    assert "'closed' cannot be read (Permission denied); make it readable (chmod u+rx)" in done.stdout
    assert "'fine'" not in done.stdout


def test_an_unchanged_folder_is_not_read_again(folder: Path) -> None:
    """Only what has changed is read, however the change is hidden: even size and time of change may be the same."""
    write(folder, one="1" * 100, two="2" * 1000)
    assert read_bytes(folder) == 1100
    assert read_bytes(folder) == 0
    before = (folder / "one").stat()
    (folder / "one").write_text("x" * 100)
    os.utime(folder / "one", ns=(before.st_atime_ns, before.st_mtime_ns))
    assert read_bytes(folder) == 100
    assert read_bytes(folder) == 0


def test_memory_that_is_damaged_is_as_good_as_none(folder: Path, own_home: Path) -> None:
    """What is no JSON, is of another form, or of another folder, is left aside and written anew."""
    write(folder, one="1" * 100)
    for nonsense in ("", "{", "[]", '{"format": 0}', json.dumps({"format": 1, "folder": "other", "files": {"one": 1}})):
        assert read_bytes(folder) in (0, 100)
        (file,) = (own_home / "client" / "code").iterdir()
        file.write_text(nonsense)
        assert read_bytes(folder) == 100
        assert file.stat().st_mode & 0o777 == 0o600


def test_a_home_that_cannot_be_written_only_costs_time(folder: Path, own_home: Path) -> None:
    """Without a memory, everything is read each time."""
    own_home.write_text("in the way")
    write(folder, one="1" * 100)
    assert [read_bytes(folder), read_bytes(folder)] == [100, 100]


def test_a_file_that_goes_away_is_no_error(folder: Path) -> None:
    """What was there at the first look and not at the second is left out."""
    write(folder, stays="x", goes="x")
    found = Found(str(folder))
    look_through(str(folder), found)
    (folder / "goes").unlink()
    tree = tree_of(found, FileMemory(str(folder)))
    assert [file.path for file in tree.manifest.files] == ["stays"]


def test_a_file_that_changes_all_the_time_is_named(folder: Path) -> None:
    """A file that somebody writes without a pause is given up after some tries, and named with what to do."""
    log = folder / "train.log"
    log.write_text("begin\n")

    def written(_: int) -> None:
        with log.open("a") as file:
            file.write("more\n")

    with pytest.raises(
        ConfigurationError, match=r"'train\.log' changes while it is read, again and again\. Wait until"
    ):
        tree_of_repo(LocalRepo(repo_dir=folder), written)


def test_a_file_that_changes_once_is_read_again(folder: Path) -> None:
    """What is kept is the later version, whole."""
    path = folder / "data"
    path.write_text("before")
    changes = iter(["and after"])

    def changed(_: int) -> None:
        for text in changes:
            path.write_text(text)

    tree = tree_of_repo(LocalRepo(repo_dir=folder), changed)
    assert tree.manifest.files[0].chunks == (hashlib.sha256(b"and after").hexdigest(),)
    assert tree.manifest.files[0].size == 9


def test_a_file_that_just_changed_is_read_when_its_tick_is_over(folder: Path) -> None:
    """Two versions within one tick of the clock, of one size, do not pass for one another."""
    path = folder / "file"
    for number in range(20):
        path.write_bytes(b"%03d" % number)
        tree = tree_of_repo(LocalRepo(repo_dir=folder))
        path.write_bytes(b"%03d" % (number + 500))
        (file,) = manifest(folder).files
        assert file.chunks != tree.manifest.files[0].chunks
