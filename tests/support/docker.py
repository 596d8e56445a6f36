"""A real container engine for tests, and tiny images for it.

The engine is the running docker daemon, if there is one. Else one is started for all test processes together, the one
that machines use, too (`dstack_core.testing.fleet._daemon`). Images are made with `docker import` from Debian's
`busybox-static`; nothing is downloaded. Where any of this is missing the tests are skipped with the reason; with
`DSTACK_REQUIRE_DOCKER=1` they fail instead.

Fixtures, to be imported into a `conftest.py`:

- `docker_engine` (session): a `Docker`.
- `docker`: the same, with `DOCKER_HOST` set for the test, so that everything that the test starts finds it.
- `podman`: the same for podman, where it works; the test finds no docker.

The daemon that is started here has a GPU hook that does nothing: `--gpus` is accepted (`Docker.has_gpu_hook`).
"""

from __future__ import annotations

import itertools
import os
import shutil
import subprocess
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import NoReturn

import pytest

from dstack_core.testing import FleetUnavailable
from dstack_core.testing.fleet._daemon import find_or_start

__all__ = ["Docker", "docker", "docker_engine", "podman"]

APPLETS = (
    "[ cat chmod cut echo env false grep head httpd id kill ls mkdir nc printf ps rm sed seq setsid sh sleep stty tail "
    "test touch tr true tty wc wget"
)

# For Debian's podman, where raising limits is not allowed (in some virtual machines, for one).
PODMAN_CONFIG = """
[containers]
default_ulimits = ["nofile=1024:1024", "nproc=1024:1024"]
[engine]
runtime = "runc"
"""


class Docker:
    """The engine. What is made through this object is removed at the end of the session."""

    def __init__(self, host: str | None, holder: int | None = None, program: str = "docker") -> None:
        self.host = host
        self.program = program
        self._holder = holder
        self._names = itertools.count(1)
        self._images: list[str] = []

    @property
    def env(self) -> dict[str, str]:
        """Environment of the commands that are to find this engine."""
        return {**os.environ, **({"DOCKER_HOST": self.host} if self.host else {})}

    def __call__(self, *arguments: str, stdin: bytes = b"") -> str:
        """Runs `docker`, which must succeed, and returns its output."""
        done = subprocess.run([self.program, *arguments], input=stdin, capture_output=True, env=self.env, check=False)
        assert done.returncode == 0, done.stderr.decode()
        return done.stdout.decode().strip()

    def has_gpu_hook(self) -> bool:
        """Whether `--gpus` is accepted."""
        argv = ["docker", "run", "--rm", "--gpus", "all", self.image(), "/bin/true"]
        return subprocess.run(argv, capture_output=True, env=self.env, check=False).returncode == 0

    def image(
        self,
        files: Mapping[str, str] | None = None,
        *,
        name: str | None = None,
        changes: Sequence[str] = (),
        shell: bool = True,
    ) -> str:
        """Imports an image with busybox and these files (all executable), and returns its name.

        Args:
            files: path in the image → contents.
            name: of the image; a new one if not given.
            changes: Dockerfile instructions such as `ENTRYPOINT ["/bin/serve"]`.
            shell: with `/bin/sh` and the other applets; else `/bin/busybox` alone.
        """
        name = name or f"dstack-test-{os.getpid()}-{next(self._names)}:latest"
        with tempfile.TemporaryDirectory() as folder:
            root = Path(folder)
            _fill(root, files or {}, APPLETS.split() if shell else ())
            archive = subprocess.run(["tar", "-C", folder, "-c", "."], capture_output=True, check=True).stdout
        options = [word for change in changes for word in ("--change", change)]
        self("import", *options, "-", name, stdin=archive)
        self._images.append(name)
        return name

    def containers(self, label: str) -> list[str]:
        """Ids of all containers with that label, running or not."""
        return self("ps", "--all", "--quiet", "--filter", f"label={label}").split()

    def close(self) -> None:
        """Removes the images; the daemon ends when nobody uses it any more."""
        for name in self._images:
            subprocess.run([self.program, "rmi", "--force", name], capture_output=True, env=self.env, check=False)
        if self._holder is not None:
            os.close(self._holder)


@pytest.fixture(scope="session")
def docker_engine() -> Iterator[Docker]:
    """A container engine for the whole session."""
    engine = _open()
    try:
        yield engine
    finally:
        engine.close()


@pytest.fixture
def docker(docker_engine: Docker, monkeypatch: pytest.MonkeyPatch) -> Docker:
    """A container engine that everything which the test starts will find."""
    if docker_engine.host:
        monkeypatch.setenv("DOCKER_HOST", docker_engine.host)
    return docker_engine


@pytest.fixture
def podman(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Docker]:
    """Podman, for a test that finds no docker."""
    if not shutil.which("podman") or not _busybox():
        missing("there is no podman with busybox-static; install Debian's podman and runc")
    (tmp_path / "containers.conf").write_text(PODMAN_CONFIG)
    monkeypatch.setenv("CONTAINERS_CONF", str(tmp_path / "containers.conf"))
    monkeypatch.setenv("DOCKER_HOST", f"unix://{tmp_path}/nothing.sock")
    engine = Docker(None, program="podman")
    try:
        probe = [engine.program, "run", "--rm", engine.image(), "/bin/true"]
        done = subprocess.run(probe, capture_output=True, text=True, check=False)
        if done.returncode:
            missing(f"podman does not run containers here: {done.stderr[-300:]}")
        yield engine
    finally:
        engine.close()


def _open() -> Docker:
    if not shutil.which("docker"):
        missing("there is no docker; install Debian's docker.io")
    if not _busybox():
        missing("there is no static busybox; install Debian's busybox-static")
    if subprocess.run(["docker", "version"], capture_output=True, timeout=60, check=False).returncode == 0:
        return Docker(None)
    try:
        daemon = find_or_start()
    except FleetUnavailable as unavailable:
        missing(str(unavailable))
    return Docker(daemon.host, daemon.holder)


def _busybox() -> str | None:
    return shutil.which("busybox")


def _fill(root: Path, files: Mapping[str, str], applets: Sequence[str]) -> None:
    for name in ("bin", "etc", "tmp", "dev", "proc"):
        (root / name).mkdir()
    (root / "tmp").chmod(0o1777)
    root.chmod(0o755)
    shutil.copy2(str(_busybox()), root / "bin/busybox")
    for applet in applets:
        (root / "bin" / applet).symlink_to("busybox")
    (root / "etc/passwd").write_text("root:x:0:0:root:/:/bin/sh\nsomeone:x:1234:1234:Someone:/tmp:/bin/sh\n")
    for path, text in files.items():
        target = root / path.lstrip("/")
        target.parent.mkdir(parents=True, exist_ok=True)
        _write_program(target, text)


def _write_program(path: Path, text: str) -> None:
    path.write_text(text)
    path.chmod(0o755)


def missing(reason: str) -> NoReturn:
    if os.environ.get("DSTACK_REQUIRE_DOCKER"):
        pytest.fail(f"DSTACK_REQUIRE_DOCKER is set, and {reason}")
    pytest.skip(f"needs a container engine: {reason}")
