"""Repos from the program to the server: real folders, real repositories, a real server that is killed in between."""

from __future__ import annotations

import hashlib
import io
import json
import os
import re
import shutil
import signal
import subprocess
import tarfile
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from dstack.api import (
    Client,
    ConfigurationError,
    LocalRepo,
    RemoteRepo,
    ServerClientError,
    Task,
    VirtualRepo,
)
from dstack_core._client.code.tree import FolderTree
from dstack_core._client.code.uploading import upload
from dstack_core._models.code import CHUNK, MOST_ENTRIES, CodeFile, CodeManifest
from dstack_core._models.repos import Repo
from dstack_core.testing import wait_until
from tests.support.git import ENVIRONMENT, commit, new_clone
from tests.support.git_servers import TOKEN, GitOverHttp
from tests.support.homes import Home, ended

MIB = 1 << 20
CODE = "/api/project/main/code"
TRUE = Task(commands=["true"])


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A folder with a few files."""
    path = tmp_path / "code"
    (path / "src").mkdir(parents=True)
    (path / "src" / "train.py").write_text("print(1)\n")
    (path / "data.bin").write_bytes(os.urandom(3 * CHUNK + 5))
    return path


@pytest.fixture
def sent(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The chunks that this process sends, as they are read for it."""
    names: list[str] = []
    chunk = FolderTree.chunk

    def noted(tree: FolderTree, file: CodeFile, number: int) -> bytes:
        names.append(file.chunks[number])
        return chunk(tree, file, number)

    monkeypatch.setattr(FolderTree, "chunk", noted)
    return names


def send(client: Client, repo: Repo | Path) -> str:
    """Brings the code of a repo to the server."""
    found = upload(client.client, "main", LocalRepo(repo_dir=repo) if isinstance(repo, Path) else repo)
    assert found is not None
    return found


def stored(home: Home) -> set[str]:
    """The chunks that the server has."""
    return {path.name for path in (home.path / "server" / "code" / "chunks").glob("*/*")}


def manifest(home: Home, name: str) -> CodeManifest:
    """A manifest that the server has."""
    return CodeManifest.model_validate_json((home.path / "server" / "code" / "manifests" / name).read_bytes())


def content(home: Home, name: str, path: str) -> bytes:
    """A file of a manifest, as the server has it."""
    (file,) = (file for file in manifest(home, name).files if file.path == path)
    chunks = home.path / "server" / "code" / "chunks"
    return b"".join((chunks / chunk[:2] / chunk).read_bytes() for chunk in file.chunks)


def speak(home: Home) -> httpx.Client:
    """A connection to the home's server, below the client library."""
    transport = httpx.HTTPTransport(uds=str(home.path / "server.sock"))
    return httpx.Client(transport=transport, base_url="http://server", timeout=60)


# ------------------------------------------------------------------------------------------------------------ sending


def test_nothing_is_sent_twice(client: Client, home: Home, folder: Path, sent: list[str]) -> None:
    """The first time all of it, an unchanged folder not at all, a changed one only the chunk that changed."""
    first = send(client, folder)
    assert len(sent) == 5
    assert content(home, first, "data.bin") == (folder / "data.bin").read_bytes()
    assert send(client, folder) == first
    assert len(sent) == 5
    with (folder / "data.bin").open("r+b") as file:
        file.seek(CHUNK)
        file.write(b"changed")
    (folder / "copy.py").write_text("print(1)\n")
    assert send(client, folder) != first
    assert len(sent) == 6


def test_a_run_knows_its_repo(client: Client, home: Home, folder: Path) -> None:
    """What is submitted names the repo and the code; the plan does neither read nor send it."""
    repo = LocalRepo(repo_dir=folder)
    plan = client.runs.get_plan(TRUE, repo, working_dir=str(folder / "src"))
    assert (plan.run_spec.repo_id, plan.run_spec.repo_code_hash) == (repo.repo_id, None)
    assert plan.run_spec.working_dir == "src"
    assert stored(home) == set()
    run = client.runs.exec_plan(plan, repo)
    model = client.client.get_run("main", run.name)
    assert model.run_spec.repo_data == {"repo_type": "local", "repo_dir": str(folder)}
    assert model.run_spec.repo_code_hash == send(client, folder)
    job = model.jobs[0].job_spec
    assert (job.code_hash, job.repo_id, job.repo_data) == (model.run_spec.repo_code_hash, None, None)
    assert [file.path for file in manifest(home, str(job.code_hash)).files] == ["data.bin", "src/train.py"]
    ended(run)


def test_files_from_memory(client: Client, home: Home) -> None:
    """A `VirtualRepo` brings what was put into it; an empty one, and no repo, bring nothing."""
    repo = VirtualRepo("mine")
    run = client.runs.submit(TRUE, repo=repo)
    assert client.client.get_run("main", run.name).run_spec.repo_code_hash is None
    repo.add_file("src/train.py", b"print(2)\n")
    run = client.runs.submit(TRUE, repo=repo)
    code_hash = client.client.get_run("main", run.name).run_spec.repo_code_hash
    assert code_hash is not None
    assert content(home, code_hash, "src/train.py") == b"print(2)\n"
    repo.add_file("src", b"a file where a folder is")
    with pytest.raises(ConfigurationError, match=r"'src/train\.py' lies below 'src', which is a file"):
        client.runs.submit(TRUE, repo=repo)


def test_a_plan_is_carried_out_with_its_own_repo(client: Client, folder: Path, tmp_path: Path) -> None:
    """Another repo, or none, is not what was planned."""
    (tmp_path / "other").mkdir()
    repo, other = LocalRepo(repo_dir=folder), LocalRepo(repo_dir=tmp_path / "other")
    with pytest.raises(ConfigurationError, match=f"The plan was made with the repo '{repo.repo_id}'"):
        client.runs.exec_plan(client.runs.get_plan(TRUE, repo), other)
    with pytest.raises(ConfigurationError, match="The plan was made with the repo"):
        client.runs.exec_plan(client.runs.get_plan(TRUE, repo))
    with pytest.raises(ConfigurationError, match="The plan was made without a repo"):
        client.runs.exec_plan(client.runs.get_plan(TRUE), repo)
    with pytest.raises(ConfigurationError, match="repo is a str; pass a LocalRepo"):
        client.runs.submit(TRUE, repo=str(folder))  # type: ignore[arg-type]  # what a person may try


def test_a_working_dir_outside_of_the_repo(client: Client, home: Home, folder: Path) -> None:
    """Refused before anything is sent, with the repo and what was written."""
    for path in ("..", "src/../..", "/etc", f"{folder}/..", f"{folder}-other"):
        with pytest.raises(ConfigurationError, match=r"Working directory is outside of the repo") as refused:
            client.runs.submit(TRUE, repo=LocalRepo(repo_dir=folder), working_dir=path)
        assert str(folder) in str(refused.value)
        assert path in str(refused.value)
    assert stored(home) == set()
    with pytest.raises(ConfigurationError, match="Working directory is outside"):
        client.runs.submit(Task(commands=["true"], working_dir="../x"), repo=LocalRepo(repo_dir=folder))


def test_a_killed_server_is_sent_only_what_it_lacks(
    client: Client, home: Home, folder: Path, sent: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """SIGKILL in the middle of an upload, twice: it goes on with the next server, without what had arrived."""
    for number in range(40):
        (folder / f"part{number:02}").write_bytes(os.urandom(MIB))
    had: list[set[str]] = []
    sent_before: list[int] = []
    chunk = FolderTree.chunk

    def killing(tree: FolderTree, file: CodeFile, number: int) -> bytes:
        if len(had) < 2 and len(sent) > 15 * (len(had) + 1):
            wait_until(lambda: len(stored(home)) > (len(had[-1]) if had else 0), what="some chunks to arrive")
            home.kill_server()
            had.append(stored(home))
            sent_before.append(len(sent))
        return chunk(tree, file, number)

    monkeypatch.setattr(FolderTree, "chunk", killing)
    name = send(client, folder)
    assert len(had) == 2
    assert had[0] < had[1]
    for arrived, before in zip(had, sent_before, strict=True):
        assert arrived.isdisjoint(sent[before:])
    for path in folder.glob("part*"):
        assert content(home, name, path.name) == path.read_bytes()


PROGRAM = """
import sys
from dstack.api import Client, LocalRepo
from dstack_core._client.code.uploading import upload
client = Client.from_config()
client.runs.list()
upload(client.client, "main", LocalRepo(repo_dir=sys.argv[1]))
"""


def test_a_killed_client_s_work_is_not_lost(client: Client, home: Home, folder: Path, sent: list[str]) -> None:
    """What a program had sent when it was killed need not be sent by the next one."""
    for number in range(60):
        (folder / f"part{number:02}").write_bytes(os.urandom(MIB))
    program = home.start(PROGRAM, str(folder))
    wait_until(lambda: len(stored(home)) >= 8, what="some chunks to arrive")
    program.kill()
    program.communicate()
    had = stored(home)
    send(client, folder)
    assert had.isdisjoint(sent)
    assert len(stored(home)) == 65


def test_several_programs_send_the_same(client: Client, home: Home, folder: Path) -> None:
    """All at once, none in the way of another."""
    programs = [home.start(PROGRAM, str(folder)) for _ in range(4)]
    assert [(program.communicate(), program.returncode)[1] for program in programs] == [0] * 4
    assert content(home, send(client, folder), "data.bin") == (folder / "data.bin").read_bytes()
    assert list((home.path / "server" / "code" / "tmp").iterdir()) == []


def test_a_file_that_changes_during_the_upload(
    client: Client, home: Home, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What arrives is one of its versions, whole; the folder is looked through again, as often as a few times."""
    path = folder / "data.bin"
    versions = [bytes([number]) * (2 * CHUNK) for number in range(4)]
    path.write_bytes(versions[0])
    chunk, changes = FolderTree.chunk, iter(versions[1:])

    def changing(tree: FolderTree, file: CodeFile, number: int) -> bytes:
        if file.path == "data.bin" and number == 0 and (version := next(changes, None)):
            data = chunk(tree, file, number)
            path.write_bytes(version)
            return data
        return chunk(tree, file, number)

    monkeypatch.setattr(FolderTree, "chunk", changing)
    assert content(home, send(client, folder), "data.bin") in versions


def test_a_file_that_never_stops_changing(client: Client, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """After some tries it is named, with what to do."""
    chunk = FolderTree.chunk

    def changing(tree: FolderTree, file: CodeFile, number: int) -> bytes:
        (folder / "src" / "train.py").write_bytes(os.urandom(20))
        return chunk(tree, file, number)

    monkeypatch.setattr(FolderTree, "chunk", changing)
    with pytest.raises(ConfigurationError, match=r"'src/train\.py' changes while it is read.*\.dstackignore"):
        send(client, folder)


MEASURED = """
import json, resource, sys
from dstack.api import Client, LocalRepo
from dstack_core._client.code.uploading import upload
client = Client.from_config()
upload(client.client, "main", LocalRepo(repo_dir=sys.argv[1]))
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
upload(client.client, "main", LocalRepo(repo_dir=sys.argv[2]))
print(json.dumps([before, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss]))
"""


def test_a_large_folder_needs_no_memory(client: Client, home: Home, folder: Path, tmp_path: Path) -> None:
    """400 MB are sent and stored by a client and a server that both need less than 50 MB for it."""
    large = tmp_path / "large"
    large.mkdir()
    with (large / "data").open("wb") as file:
        for number in range(100):
            file.seek(number * CHUNK)
            file.write(b"%d" % number)
        file.truncate(100 * CHUNK)
    send(client, folder)
    pid = client.client.get_server_info().pid
    before = peak_kib(pid)
    done = home.run(MEASURED, str(folder), str(large), timeout=300)
    assert done.returncode == 0, done.stderr.decode()
    client_before, client_after = json.loads(done.stdout)
    assert client_after - client_before < 50 * 1024
    assert peak_kib(pid) - before < 50 * 1024
    assert len(stored(home)) >= 100


def peak_kib(pid: int) -> int:
    """The most memory that a process ever had."""
    found = re.search(r"VmHWM:\s+(\d+) kB", Path(f"/proc/{pid}/status").read_text())
    assert found
    return int(found[1])


SHOWING = """
import sys
from dstack.api import Client, LocalRepo
from dstack_core._client.code import progress
from dstack_core._client.code.uploading import upload
progress.PATIENCE = float(sys.argv[2])
upload(Client.from_config().client, "main", LocalRepo(repo_dir=sys.argv[1]))
"""


@pytest.mark.parametrize(("terminal", "patience", "shown"), [(True, 0, True), (True, 100, False), (False, 0, False)])
def test_progress_is_for_people_who_wait(
    client: Client, home: Home, folder: Path, terminal: bool, patience: float, shown: bool
) -> None:
    """On a terminal, and when it takes a while, there is a line on stderr; else nothing is written."""
    inner, outer = os.openpty()
    process = home.start(SHOWING, str(folder), str(patience), stderr=outer if terminal else subprocess.PIPE)
    os.close(outer)
    said = bytearray()
    reader = threading.Thread(target=drain, args=(inner, said))
    reader.start()
    stdout, stderr = process.communicate()
    reader.join(20)
    os.close(inner)
    assert (b"Sending code" in said) == shown
    assert not stdout
    assert not stderr


def drain(descriptor: int, into: bytearray) -> None:
    """Reads a terminal until nobody writes to it any more."""
    try:
        while data := os.read(descriptor, 4096):
            into.extend(data)
    except OSError:
        return


def test_ctrl_c_ends_an_upload(client: Client, home: Home, folder: Path) -> None:
    """The program ends at once, says that nothing was submitted, and sends no more."""
    for number in range(100):
        (folder / f"part{number:02}").write_bytes(os.urandom(MIB))
    program = home.start(
        "import sys\nfrom dstack.api import Client, LocalRepo, Task\n"
        "Client.from_config().runs.submit(Task(commands=['true']), repo=LocalRepo(repo_dir=sys.argv[1]))",
        str(folder),
    )
    wait_until(lambda: len(stored(home)) >= 4, what="some chunks to arrive")
    program.send_signal(signal.SIGINT)
    _, said = program.communicate(timeout=30)
    assert b"KeyboardInterrupt" in said
    assert b"The run was not submitted." in said
    assert client.runs.list() == []


# ------------------------------------------------------------------------------------------------- what gets refused


def put(api: httpx.Client, document: dict[str, Any]) -> httpx.Response:
    """Sends a manifest that our client would not make."""
    body = json.dumps(document).encode()
    return api.put(f"{CODE}/manifests/{hashlib.sha256(body).hexdigest()}", content=body)


FORGED: list[tuple[dict[str, Any], str]] = [
    ({"files": [{"path": "../x", "size": 0}]}, "'../x' leads out of its folder"),
    ({"files": [{"path": "/etc/cron.d/x", "size": 0}]}, "'/etc/cron.d/x' is not a relative path"),
    ({"links": [{"path": "l", "target": "../../etc"}]}, "'l' leads out of the folder"),
    ({"files": [{"path": f"f{n}", "size": 0} for n in range(1_000_000)]}, "'f200000' is one entry too many"),
    (
        {"files": [{"path": "bomb", "size": CHUNK * 900_000, "chunks": ["0" * 64] * 900_000}]},
        "'bomb' is too much: the files may have 64 GB together",
    ),
    ({"files": [{"path": "a", "size": 1, "chunks": ["0" * 64]}]}, "'a': chunk 000"),
]


def test_forged_manifests_are_refused_by_the_server(client: Client, home: Home) -> None:
    """The entry is named each time, and the server is as well as before."""
    pid = client.client.get_server_info().pid
    for document, says in FORGED:
        with speak(home) as api:
            answer = put(api, document)
        assert answer.status_code == 400
        assert says in answer.json()["detail"][0]["msg"]
    assert client.client.get_server_info().pid == pid
    assert list((home.path / "server" / "code" / "manifests").iterdir()) == []


def test_forged_chunks_are_refused_by_the_server(client: Client, home: Home) -> None:
    """Wrong hash, wrong length, a stream cut off, and one without an end: answered, while what was good is kept."""
    client.runs.list()
    good = hashlib.sha256(b"good").digest() + (4).to_bytes(4, "big") + b"good"
    for bad, says in (
        (bytes(32) + (3).to_bytes(4, "big") + b"bad", "other contents than its name says"),
        (bytes(32) + (1 << 31).to_bytes(4, "big"), "may have 1 to 4194304 bytes"),
        (good[:-1], "The last chunk is not complete"),
    ):
        client.runs.list()
        with speak(home) as api:
            answer = api.put(
                f"{CODE}/chunks", content=iter([good + bad, b"x" * MIB if says.startswith("may") else b""])
            )
        assert answer.status_code == 400
        assert says in answer.json()["detail"][0]["msg"]
        assert stored(home) == {hashlib.sha256(b"good").hexdigest()}


def test_a_manifest_that_is_too_large(client: Client, home: Home) -> None:
    """Over the limit nothing is kept in memory, and the client gets to read why."""
    client.runs.list()
    with speak(home) as api:
        answer = api.put(f"{CODE}/manifests/{'0' * 64}", content=iter([bytes(MIB)] * 70))
        assert answer.status_code == 413
        assert "larger than 64 MB" in answer.json()["detail"][0]["msg"]
        assert api.get(f"{CODE}/manifests/nonsense").status_code == 400
        assert api.get(f"{CODE}/manifests/{'0' * 64}").status_code == 404
        assert api.post("/api/project/nope/code/missing", json={"hashes": []}).status_code == 400
        assert api.post(f"{CODE}/missing", json={"hashes": ["0" * 64] * 20_001}).status_code == 400


def test_too_many_entries_are_refused_by_the_client(client: Client, home: Home) -> None:
    """A manifest that the server would refuse is not sent: the client says the same before."""
    repo = VirtualRepo("many")
    repo.files = dict.fromkeys((f"f{number:07}" for number in range(MOST_ENTRIES + 1)), b"")
    with pytest.raises(ConfigurationError, match="'f0200000' is one entry too many: there may be 200,000"):
        client.runs.submit(TRUE, repo=repo)


def test_old_code_is_removed_when_the_server_starts(client: Client, home: Home, folder: Path) -> None:
    """Code that nobody asked for in a long time goes, but for that of a run which has not ended."""
    waiting = Task(commands=["while [ ! -e $GO ]; do sleep 0.05; done"], env={"GO": str(home.path / "go")})
    run = client.runs.submit(waiting, repo=LocalRepo(repo_dir=folder))
    needed = stored(home)
    (folder / "src" / "train.py").write_text("print(3)\n")
    unused = send(client, folder)
    home.kill_server()
    for path in (home.path / "server" / "code").rglob("*"):
        os.utime(path, (0, 0))
    client.runs.list()
    wait_until(lambda: stored(home) == needed, what="the end of old code")
    assert not (home.path / "server" / "code" / "manifests" / unused).exists()
    (home.path / "go").touch()
    ended(run)


def test_a_run_whose_code_is_not_there(client: Client, home: Home, folder: Path) -> None:
    """Refused at once, with what to do; nothing is started."""
    plan = client.runs.get_plan(TRUE)
    spec = plan.run_spec.model_copy(update={"repo_code_hash": "0" * 64})
    with pytest.raises(ServerClientError, match=r"code \(0000.*\) is not on the server\. Submit with `repo=\.\.\.`"):
        client.runs.exec_plan(plan.model_copy(update={"run_spec": spec}))
    assert client.runs.list() == []
    name = send(client, folder)
    shutil.rmtree(home.path / "server" / "code" / "manifests")
    (home.path / "server" / "code" / "manifests").mkdir()
    assert send(client, folder) == name


# --------------------------------------------------------------------------------------------------- git repositories


@pytest.fixture
def web(tmp_path: Path) -> Iterator[GitOverHttp]:
    """A git server on the web with the private repository `team/code.git`."""
    (tmp_path / "served" / "team").mkdir(parents=True)
    with GitOverHttp(tmp_path / "served") as server:
        yield server


@pytest.fixture
def copy(web: GitOverHttp, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A clone of it, with a change that was not pushed."""
    for name, value in ENVIRONMENT.items():
        monkeypatch.setenv(name, value)
    copy = new_clone(tmp_path, f"{web.url}/team/code.git")
    (tmp_path / "server.git").rename(web.folder / "team" / "code.git")
    commit(copy, second=b"\0binary\xff")
    return copy


def test_a_private_repository(client: Client, home: Home, web: GitOverHttp, copy: Path) -> None:
    """Once initialised with a token, runs get what differs from the pushed commit, and are told what to clone."""
    repo = RemoteRepo.from_dir(copy)
    assert not client.repos.is_initialized(repo)
    with pytest.raises(ServerClientError, match=r"is not initialized\. .*client\.repos\.init\(repo\)"):
        client.runs.submit(TRUE, repo=repo)
    client.repos.init(repo, oauth_token=TOKEN)
    assert client.repos.is_initialized(repo)
    asked = len(web.asked)
    client.repos.init(repo)
    assert len(web.asked) == asked, "what the server has opens it"
    run = client.runs.submit(TRUE, repo=repo)
    model = client.client.get_run("main", run.name)
    job = model.jobs[0].job_spec
    assert (job.repo_id, job.repo_data) == (repo.repo_id, repo.run_repo_data)
    assert content(home, str(job.code_hash), "second") == b"\0binary\xff"
    run.stop(abort=True)
    secrets = [path for path in home.path.rglob("*") if path.is_file() and TOKEN.encode() in path.read_bytes()]
    assert secrets == []


def test_wrong_credentials_are_not_kept(client: Client, home: Home, copy: Path) -> None:
    """Which repo, what was tried, what to do; the server hears nothing of it."""
    repo = RemoteRepo.from_dir(copy)
    with pytest.raises(ConfigurationError, match=r"The repo 127\.0\.0\.1/team/code cannot be cloned") as refused:
        client.repos.init(repo, oauth_token="a-wrong-token")
    assert "with the token" in str(refused.value)
    assert "a-wrong-token" not in str(refused.value)
    with pytest.raises(ConfigurationError, match="as anybody"):
        client.repos.init(repo)
    assert not client.repos.is_initialized(repo)
    assert not (home.path / "server" / "secret.key").exists()


def test_load_of_a_folder_that_was_never_initialised(client: Client, folder: Path) -> None:
    """Without `init`, only what was initialised before; the message has the call that does it."""
    with pytest.raises(ConfigurationError, match=r"The repo is not initialized: .*init=True\)") as refused:
        client.repos.load(folder)
    assert repr(str(folder)) in str(refused.value)


def test_load_of_a_folder(client: Client, home: Home, folder: Path) -> None:
    """Once initialised, the same repo comes back, also in another program; another server does not know it."""
    (home.path / "config.yml").write_text("# mine\n")
    repo = client.repos.load(folder, init=True)
    assert isinstance(repo, LocalRepo)
    assert client.repos.is_initialized(repo)
    again = client.repos.load(str(folder))
    assert (type(again), again.repo_id, again.repo_dir) == (LocalRepo, repo.repo_id, str(folder))
    assert (home.path / "config.yml").read_text().startswith("# mine\nrepos:\n- path: ")
    home.kill_server()
    for path in (home.path / "server").glob("server.db*"):
        path.unlink()
    with pytest.raises(ConfigurationError, match="The repo is not initialized"):
        client.repos.load(folder)


def test_load_of_a_git_repository(client: Client, web: GitOverHttp, copy: Path) -> None:
    """A repository becomes a `RemoteRepo`, unless it is asked for as a folder."""
    with pytest.raises(ConfigurationError, match="cannot be cloned"):
        client.repos.load(copy, init=True)
    with pytest.raises(ConfigurationError, match="not initialized"):
        client.repos.load(copy)
    with pytest.raises(ConfigurationError, match="no-such-key"):
        client.repos.load(copy, init=True, git_identity_file=copy / "no-such-key")
    repo = client.repos.load(copy, init=True, oauth_token=TOKEN)
    assert isinstance(repo, RemoteRepo)
    assert repo.run_repo_data.repo_branch == "main"
    assert type(client.repos.load(copy)) is RemoteRepo
    with pytest.raises(ConfigurationError, match=r"not initialized.*local=True, init=True"):
        client.repos.load(copy, local=True)
    local = client.repos.load(copy, local=True, init=True)
    assert type(local) is type(client.repos.load(copy)) is LocalRepo


def test_the_archive_of_a_folder(folder: Path, home: Home, monkeypatch: pytest.MonkeyPatch) -> None:
    """`write_code_file` has the files of the folder, and returns the hash of what it wrote."""
    monkeypatch.setenv("DSTACK_HOME", str(home.path))
    digest, data = archived(folder)
    assert archived(folder) == (digest, data)
    assert digest == hashlib.sha256(data).hexdigest()
    with tarfile.open(fileobj=io.BytesIO(data)) as archive:
        assert archive.getnames() == ["data.bin", "src/train.py"]


def archived(folder: Path) -> tuple[str, bytes]:
    """The archive of a folder, and its hash."""
    buffer = io.BytesIO()
    return LocalRepo(repo_dir=folder).write_code_file(buffer), buffer.getvalue()


def test_a_server_that_cannot_decrypt(client: Client, home: Home, copy: Path) -> None:
    """With another key, what is kept cannot be read: which repo, and what to do; a new token helps."""
    repo = RemoteRepo.from_dir(copy)
    client.repos.init(repo, oauth_token=TOKEN)
    home.kill_server()
    (home.path / "server" / "secret.key").unlink()
    with pytest.raises(ServerClientError, match=r"What opens the repo '.*' cannot be decrypted.*secret\.key"):
        client.repos.init(repo)
    client.repos.init(repo, oauth_token=TOKEN)
    assert client.repos.is_initialized(repo)
