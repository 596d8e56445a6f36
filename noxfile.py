"""Everything that is checked, as sessions: `nox -l` lists them, `nox` runs those that CI runs before the tests."""

from __future__ import annotations

import shutil
import sys
import tempfile
import zipfile
from pathlib import Path

import nox

nox.needs_version = ">=2025.11"
nox.options.default_venv_backend = "uv|venv"
nox.options.reuse_venv = "yes"
nox.options.download_python = "never"
nox.options.sessions = ["lint", "types", "imports", "docs", "wheels", "plugin"]

ROOT = Path(__file__).parent
DISTRIBUTIONS = [
    ROOT,
    *sorted(p.parent for p in ROOT.glob("plugins/*/pyproject.toml")),
    ROOT / "examples/dstack-price-cap",
]
PYTHONS = ["3.11", "3.12", "3.13", "3.14"]
DEV = "requirements/dev.txt"
TESTS = "requirements/tests.txt"


def install(session: nox.Session, pinned: str) -> None:
    """Installs a pinned set, then the workspace's own distributions in place."""
    session.install("--require-hashes", "-r", pinned)
    session.install("--no-deps", *[arg for path in DISTRIBUTIONS for arg in ("-e", str(path))])


@nox.session
def lint(session: nox.Session) -> None:
    """Style: ruff, its formatter, and changelog fragments that can be read."""
    session.install("--require-hashes", "-r", DEV)
    session.run("ruff", "check", ".")
    session.run("ruff", "format", "--check", ".")
    session.run("towncrier", "build", "--draft", "--version", "next", silent=True)


@nox.session
def types(session: nox.Session) -> None:
    """mypy, strict: the core with its tests, then every other distribution; pyright on what users see and write."""
    install(session, DEV)
    session.run("mypy")
    session.run("basedpyright")
    session.run("basedpyright", "-p", "typing_tests")
    for path in DISTRIBUTIONS[1:]:
        with session.chdir(path):
            session.run("mypy", "--config-file", str(ROOT / "pyproject.toml"), ".")


@nox.session
def imports(session: nox.Session) -> None:
    """Who may import whom, declared dependencies, and what importing the API costs."""
    install(session, DEV)
    session.run("lint-imports", "--no-cache")
    for path in DISTRIBUTIONS:
        with session.chdir(path):
            session.run("deptry", ".")
    session.run("pytest", "-q", "-p", "no:randomly", "tests/test_house_rules.py", "-k", "import")


@nox.session
def tests(session: nox.Session) -> None:
    """The test-suite on this Python; arguments go to pytest."""
    install(session, TESTS)
    session.run("pytest", *(session.posargs or ["-n", "2"]))


@nox.session
def sim(session: nox.Session) -> None:
    """Simulated histories of engine and store: 500, which must reach everything, or as many as `-- --seeds N` says."""
    install(session, TESTS)
    session.run("python", "-m", "tests.sim", *(session.posargs or ["--seeds", "500"]))


@nox.session(python=PYTHONS)
def pythons(session: nox.Session) -> None:
    """The test-suite on every supported Python that is installed here."""
    install(session, TESTS)
    session.run("pytest", *(session.posargs or ["-n", "2"]))


@nox.session
def lowest(session: nox.Session) -> None:
    """The test-suite with the oldest versions of the direct dependencies that we claim to support."""
    session.install("--require-hashes", "-r", DEV)
    pinned = Path(session.create_tmp()) / "lowest.txt"
    compile_pins(session, str(pinned), "--resolution", "lowest-direct", "--group", "tests")
    session.install("-r", str(pinned))
    session.install("--no-deps", *[arg for path in DISTRIBUTIONS for arg in ("-e", str(path))])
    session.run("pytest", *(session.posargs or ["-n", "2"]))


@nox.session
def docs(session: nox.Session) -> None:
    """The documentation site, in build/site: no warning, no broken link, nothing left out, every program typed."""
    install(session, DEV)
    session.run("python", "-m", "zensical", "build", "--strict", "--clean")
    session.run("pytest", "-q", "docs/_site", *session.posargs)


@nox.session(name="docs-examples")
def docs_examples(session: nox.Session) -> None:
    """The programs of README and of the pages, and the examples, run for real."""
    install(session, TESTS)
    session.run("pytest", "tests/docs", *session.posargs)


@nox.session
def wheels(session: nox.Session) -> None:
    """Builds every wheel, compares it with the sources, and runs a task where only the wheels are installed."""
    session.install("--require-hashes", "-r", DEV)
    folder = Path(session.create_tmp()).resolve()
    shutil.rmtree(folder)
    built = [wheel_of(session, path, folder) for path in DISTRIBUTIONS]
    check_contents(session, next(whl for whl in built if whl.name.startswith("dstack_core-")))
    clean = clean_environment(session, folder, "requirements/runtime.txt", *built)
    with session.chdir(folder):
        session.run(str(clean / "bin/python"), "-I", str(ROOT / "tests/smoke.py"), str(folder / "home"), external=True)


@nox.session
def plugin(session: nox.Session) -> None:
    """What `dstack plugin new` writes, outside of here and from wheels: style, types, its own tests, and a task."""
    session.install("--require-hashes", "-r", DEV)
    with tempfile.TemporaryDirectory(prefix="dstack-plugin-") as name:
        folder = Path(name).resolve()
        clean = clean_environment(session, folder, TESTS, wheel_of(session, ROOT, folder))
        smoke = str(ROOT / "tests/smoke_plugin.py")
        with session.chdir(folder):
            session.run(str(clean / "bin/dstack"), "plugin", "new", "nimbus", external=True, silent=True)
            install_wheels(session, clean, wheel_of(session, folder / "dstack-nimbus", folder))
            with session.chdir("dstack-nimbus"):
                session.run("ruff", "check", "--isolated")
                session.run("ruff", "format", "--isolated", "--check")
                session.run("mypy", "--python-executable", str(clean / "bin/python"))
            # The tests alone, so that what they import is the wheel.
            shutil.copytree("dstack-nimbus/tests", "suite")
            suite = ("-m", "pytest", "-q", "-W", "error", "--rootdir", "suite", "suite")
            session.run(str(clean / "bin/python"), "-I", *suite, *session.posargs, external=True)
            session.run(str(clean / "bin/python"), "-I", smoke, str(folder), external=True)


def wheel_of(session: nox.Session, path: Path, folder: Path) -> Path:
    """Builds a distribution's wheel in a folder."""
    before = set(folder.glob("*.whl"))
    session.run("uv", "build", "--quiet", "--wheel", "--out-dir", str(folder), str(path))
    (built,) = set(folder.glob("*.whl")) - before
    return built


def clean_environment(session: nox.Session, folder: Path, pinned: str, *built: Path) -> Path:
    """An environment in a folder with a pinned set and some wheels, and nothing else."""
    clean = folder / "clean"
    session.run("uv", "venv", "--quiet", "--clear", "--python", sys.executable, str(clean))
    session.run("uv", "pip", "install", "--quiet", "--python", str(clean), "--require-hashes", "-r", str(ROOT / pinned))
    install_wheels(session, clean, *built)
    return clean


def install_wheels(session: nox.Session, clean: Path, *built: Path) -> None:
    """Installs wheels into an environment, and nothing that they depend on."""
    session.run("uv", "pip", "install", "--quiet", "--python", str(clean), "--no-deps", *map(str, built))


def check_contents(session: nox.Session, wheel: Path) -> None:
    """Every tracked file of the two packages is in the wheel."""
    tracked = session.run("git", "ls-files", "dstack", "dstack_core", external=True, silent=True, log=False)
    missing = set(str(tracked).split()) - set(zipfile.ZipFile(wheel).namelist())
    if missing:
        session.error(f"{wheel.name} lacks {sorted(missing)}")


@nox.session
def bench(session: nox.Session) -> None:
    """The benchmark table, with the peers from PyPI in environments of their own."""
    install(session, TESTS)
    session.run("python", "-m", "benchmarks", *session.posargs)


@nox.session
def pins(session: nox.Session) -> None:
    """Renews requirements/*.txt: pinned with hashes, for every platform, without addresses."""
    session.install("uv")
    compile_pins(session, "requirements/runtime.txt", "--upgrade")
    compile_pins(session, "requirements/tests.txt", "--upgrade", "--group", "tests")
    compile_pins(session, "requirements/dev.txt", "--upgrade", "--group", "dev")


def compile_pins(session: nox.Session, target: str, *options: str) -> None:
    """Resolves the workspace's dependencies, its own distributions left out, into one file."""
    sources = [str(path.relative_to(ROOT) / "pyproject.toml") for path in DISTRIBUTIONS]
    own = [path.name if path != ROOT else "dstack-core" for path in DISTRIBUTIONS]
    session.run(
        *("uv", "pip", "compile", "--quiet", "--universal", "--python-version", PYTHONS[0], "--generate-hashes"),
        *("--no-emit-index-url", "--no-emit-find-links", "--no-annotate", "--custom-compile-command", "nox -s pins"),
        *[arg for name in own for arg in ("--no-emit-package", name)],
        *(*sources, "--extra", "postgres", *options, "-o", target),
    )
