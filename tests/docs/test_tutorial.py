"""The tutorial makes a backend: each step is carried out as a reader does it, and shows what the page says it shows."""

from __future__ import annotations

import ast
import os
import re
import shlex
import subprocess
import sys
import tempfile
import textwrap
from collections.abc import Iterator
from pathlib import Path

import pytest

from dstack_core._cli.scaffold import Package
from dstack_core.testing import NimbusServer, wait_until
from tests.support.blocks import ROOT, Block, blocks_of
from tests.support.homes import Home

PAGE = ROOT / "docs" / "guides" / "your-own-backend.md"
BACKEND = "dstack_nimbus/_backend.py"
STEPS = [block for block in blocks_of(PAGE) if block.part]
SHOWN = [block for block in STEPS if block.language == "" and block.orders("pytest", "dstack")]
DSTACK = [sys.executable, "-m", "dstack_core._cli"]


# ------------------------------------------------------------------------------------------ what a reader does --


def package_before(step: Block, folder: Path) -> Path:
    """The package as it is when a reader comes to a step."""
    files: dict[str, str] = {"README.md": ""}
    for block in STEPS[: STEPS.index(step)]:
        carry_out(block, files)
    for name, text in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return folder


def carry_out(block: Block, files: dict[str, str]) -> None:
    """Writes what a block says where its comment says."""
    order = block.part or ""
    if order.startswith("write "):
        files[order.removeprefix("write ")] = block.text
    elif order == "at the end":
        files[BACKEND] += f"\n\n{block.text}"
    elif order.startswith("before "):
        files[BACKEND] = inserted(files[BACKEND], order.removeprefix("before "), block.text)
    elif order.startswith("instead of "):
        for name in order.removeprefix("instead of ").split(", "):
            files[BACKEND] = replaced(files[BACKEND], name, block.text)


def span(program: str, name: str) -> slice:
    """The lines of a function, its decorators included."""
    for node in ast.walk(ast.parse(textwrap.dedent(program))):
        if isinstance(node, ast.FunctionDef) and node.name == name:
            first = min([node.lineno, *(one.lineno for one in node.decorator_list)])
            return slice(first - 1, node.end_lineno)
    raise LookupError(f"there is no function {name}")


def inserted(program: str, name: str, text: str) -> str:
    """With a text in front of a function."""
    lines = program.splitlines(keepends=True)
    at = span(program, name).start
    return "".join([*lines[:at], text, "\n", *lines[at:]])


def replaced(program: str, name: str, text: str) -> str:
    """With a function as it is in a text."""
    lines, fresh = program.splitlines(keepends=True), text.splitlines(keepends=True)
    lines[span(program, name)] = fresh[span(separate(text), name)]
    return "".join(lines)


def separate(text: str) -> str:
    """A text in which methods may be followed by functions, as a program: line by line in the same places."""
    method = False
    lines = []
    for line in text.splitlines():
        method = line.startswith("    ") if re.match(r" *(@|def )", line) else method
        lines.append(line.removeprefix("    ") if method else line)
    return "\n".join(lines)


# ------------------------------------------------------------------------------------------- what a reader sees --


@pytest.fixture
def reader() -> Iterator[Home]:
    """A reader with a home of their own."""
    home = Home(Path(tempfile.mkdtemp(prefix="dsk-")) / ".dstack")
    try:
        yield home
    finally:
        home.close()


def installed(package: Path, reader: Home) -> dict[str, str]:
    """Builds and installs the package for programs of the reader; their environment."""
    top = reader.path.parent
    uv = [sys.executable, "-m", "uv"]
    for command in (
        [*uv, "build", "--quiet", "--offline", "--wheel", "--out-dir", str(top / "wheels"), str(package)],
        [*uv, "pip", "install", "--quiet", "--offline", "--no-deps", "--target", str(top / "site")],
    ):
        wheels = [str(path) for path in (top / "wheels").glob("*.whl")] if "install" in command else []
        done = subprocess.run([*command, *wheels], env=reader.env, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
    return {**reader.env, "PYTHONPATH": os.pathsep.join([str(ROOT), str(top / "site")])}


def matches(shown: str, real: str) -> bool:
    """Whether the page shows what is real; an ellipsis stands for anything."""
    return re.fullmatch(re.escape(shown.strip()).replace("…", ".*"), tidy(real), re.DOTALL) is not None


def tidy(text: str) -> str:
    """Without spaces at the end of lines."""
    return "\n".join(line.rstrip() for line in text.splitlines()).strip()


def test_the_tutorial_makes_what_the_command_writes() -> None:
    """All steps together are, byte for byte, the package that `dstack plugin new nimbus` writes."""
    made: dict[str, str] = {}
    for block in STEPS:
        carry_out(block, made)
    assert BACKEND in made
    written = Package.of("nimbus").files()
    assert made == {name: written[name] for name in made}


def test_a_reader_is_told_where_code_goes() -> None:
    """The title of each piece of code says what the test that carries it out goes by."""
    page = PAGE.read_text()
    for block in STEPS:
        if block.language == "python":
            order = (block.part or "").removeprefix("write ").replace("before ", "above ")
            title = order if block.orders("write ") else f"{BACKEND}, {order}"
            assert f'<!-- nimbus: {block.part} -->\n```python title="{title}"\n' in page


def test_the_tutorial_is_short() -> None:
    """A working backend is under 300 lines, with its registration and its configuration."""
    made: dict[str, str] = {}
    for block in STEPS:
        carry_out(block, made)
    programs = [text for name, text in made.items() if name.startswith("dstack_nimbus/")]
    assert len(programs) == 2
    assert sum(text.count("\n") for text in programs) < 300


@pytest.mark.parametrize("block", [one for one in SHOWN if one.orders("pytest")], ids=str)
def test_the_suite_shows_what_the_page_says(block: Block, reader: Home) -> None:
    """At each step the conformance suite finds what is missing, or that nothing is, in the words of the page."""
    package = package_before(block, reader.path.parent / "dstack-nimbus")
    env = {**installed(package, reader), "COLUMNS": "88"}
    plain = ("-p", "no:randomly", "-p", "no:cacheprovider")
    words = shlex.split(block.part or "")[1:]
    done = subprocess.run(
        [sys.executable, "-P", "-m", "pytest", *plain, *words],
        env=env,
        cwd=package,
        capture_output=True,
        text=True,
        timeout=280,
        check=False,
    )
    assert matches(block.text, done.stdout), f"{tidy(done.stdout)}\n{done.stderr}"


@pytest.mark.parametrize("block", [one for one in SHOWN if one.orders("dstack backends")], ids=str)
def test_it_is_listed_as_the_page_says(block: Block, reader: Home) -> None:
    """`dstack backends` shows the package that was just installed."""
    package = package_before(block, reader.path.parent / "dstack-nimbus")
    # Who reads the page has no other packages than it says.
    env = {**installed(package, reader), "DSTACK_DISABLE_PLUGINS": "aws,azure,gcp,lambda"}
    done = subprocess.run([*DSTACK, "backends"], env=env, capture_output=True, text=True, check=False)
    assert matches(block.text, done.stdout), f"{tidy(done.stdout)}\n{done.stderr}"


def test_a_task_runs_on_nimbus(reader: Home) -> None:
    """With the files of the page, `dstack apply` runs a real task as a process of a Nimbus, and leaves nothing."""
    (shown,) = [block for block in SHOWN if block.orders("dstack apply")]
    config, task = [next(b for b in STEPS if b.part == name) for name in ("server/config.yml", ".dstack.yml")]
    package = package_before(shown, reader.path.parent / "dstack-nimbus")
    env = installed(package, reader)
    with NimbusServer(agents=reader.path.parent / "nimbus", token="secret") as nimbus:  # of the page
        (reader.path / "server").mkdir(parents=True)
        text = config.text.replace("http://127.0.0.1:8470", nimbus.url)
        assert nimbus.url in text
        (reader.path / "server" / "config.yml").write_text(text)
        (package / ".dstack.yml").write_text(task.text)
        done = subprocess.run(
            [*DSTACK, *(shown.part or "").split()[1:]],
            env=env,
            cwd=package,
            capture_output=True,
            text=True,
            timeout=120,
            check=False,
        )
        assert done.returncode == 0, done.stderr + reader.log()
        assert matches(shown.text, done.stderr.rstrip() + "\n" + done.stdout), done.stderr + done.stdout
        wait_until(lambda: [server.billed for server in nimbus.truth().servers] == [False], what="the server's end")
        assert nimbus.truth().leftovers == []
