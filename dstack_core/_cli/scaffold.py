"""A new package for a backend, made from the files in `template/`.

The template is a package of its own for a backend called `yourcloud`. Making one for another backend replaces a few
words, in texts and in paths, and nothing else:

    yourcloud           the name that users write             nimbus         my-cloud
    dstack_yourcloud    the Python package                    dstack_nimbus  dstack_my_cloud
    YourCloud           in front of the names of classes      Nimbus         MyCloud
    Your Cloud          the title                             Nimbus         My Cloud
    0.0.0.core          the version of dstack-core            0.1.0          0.1.0

The files end in `.tmpl`, so that no tool takes them for a part of this package.
"""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.resources import files
from importlib.resources.abc import Traversable
from pathlib import Path

from dstack_core import __version__
from dstack_core._hookspecs import BACKEND_NAME
from dstack_core.errors import ConfigurationError

SUFFIX = ".tmpl"
_WORDS = re.compile(r"dstack_yourcloud|YourCloud|Your Cloud|yourcloud|0\.0\.0\.core")
_TITLE_LENGTH = 60
_NAME_LENGTH = 30
"""So that no line of the template becomes longer than formatters allow. The core takes more."""

ABOUT = {
    "pyproject.toml": "dependencies, and the entry point by which dstack-core finds it",
    "README.md": "for those who will use it",
    ".gitignore": "",
    ".github/workflows/tests.yml": "the tests on GitHub, for each change",
    "dstack_yourcloud/__init__.py": "what is known without the cloud: name, configuration, facts",
    "dstack_yourcloud/_backend.py": "the five functions, and the table of errors",
    "dstack_yourcloud/py.typed": "",
    "tests/test_yourcloud.py": "the conformance suite of dstack-core",
}
"""Every file of the template, with what a person wants to know of it."""


@dataclass(frozen=True)
class Package:
    """What is to be written.

    Attributes:
        name: of the backend.
        title: of the backend, for people.
    """

    name: str
    title: str

    @classmethod
    def of(cls, name: str, title: str | None = None) -> Package:
        """A package for a backend of this name.

        Raises:
            ConfigurationError: the name or the title cannot be used; says why, and what could be.
        """
        _check_name(name)
        title = " ".join(part.capitalize() for part in name.split("-")) if title is None else title.strip()
        _check_title(title)
        return cls(name, title)

    @property
    def distribution(self) -> str:
        """What pip installs."""
        return f"dstack-{self.name}"

    def write(self, folder: Path) -> None:
        """Writes all files. The folder may exist, and hold other files.

        Raises:
            ConfigurationError: some file exists already, or cannot be written. In the first case nothing was written.
        """
        texts = {folder / path: text for path, text in self.files().items()}
        there = [path for path in texts if path.exists() or path.is_symlink()]
        if there:
            names = ", ".join(str(path) for path in there)
            raise ConfigurationError(
                f"Nothing was written: {names} exists. Choose another folder with --directory DIR."
            )
        try:
            for path, text in texts.items():
                path.parent.mkdir(parents=True, exist_ok=True)
                with path.open("x", encoding="utf-8", newline="\n") as file:
                    file.write(text)
        except OSError as error:
            where = error.filename or folder
            raise ConfigurationError(f"Cannot write {where}: {error.strerror}. Try --directory DIR.") from error

    def files(self) -> dict[str, str]:
        """The text of each file, by its path in the folder."""
        found = dict(_texts(files(__package__) / "template"))
        return {self.filled(path): self.filled(found[path]) for path in ABOUT}

    def filled(self, text: str) -> str:
        """A text of the template with this package's words. In one pass: a title may well contain one of them."""
        words = {
            "dstack_yourcloud": f"dstack_{self.name.replace('-', '_')}",
            "YourCloud": "".join(part.capitalize() for part in self.name.split("-")),
            "Your Cloud": self.title,
            "yourcloud": self.name,
            "0.0.0.core": __version__,
        }
        return _WORDS.sub(lambda match: words[match[0]], text)

    def report(self, folder: Path) -> str:
        """What was written, and what to do next."""
        width = max(len(path) for path in self.files())
        lines = [f"  {self.filled(path):{width}}  {about}".rstrip() for path, about in ABOUT.items()]
        return "\n".join(
            [
                f"Wrote a backend '{self.name}', for the example cloud Nimbus, to {folder}:",
                "",
                *lines,
                "",
                "Run its tests, which bring a Nimbus along:",
                "",
                f"  cd {shlex.quote(str(folder))}",
                "  python3 -m venv .venv",
                "  . .venv/bin/activate",
                '  pip install -e ".[tests]"',
                "  pytest",
                "",
                f"Then put your cloud in the place of Nimbus, in {self.filled('dstack_yourcloud')}; see README.md.",
            ]
        )


def _texts(folder: Traversable, prefix: str = "") -> Iterator[tuple[str, str]]:
    """Path and text of each file of the template."""
    for entry in folder.iterdir():
        if entry.is_dir():
            yield from _texts(entry, f"{prefix}{entry.name}/")
        elif entry.name.endswith(SUFFIX):
            yield f"{prefix}{entry.name.removesuffix(SUFFIX)}", entry.read_text(encoding="utf-8")


def _check_name(name: str) -> None:
    """A name that the core accepts, and that makes a name for a distribution as well."""
    if not re.fullmatch(BACKEND_NAME, name) or name.endswith("-") or "--" in name:
        hint = f" '{near}' could." if (near := _near(name)) else ""
        raise ConfigurationError(
            f"'{name}' cannot name a backend.{hint} A name has lower-case letters, digits and single dashes, "
            "and begins with a letter."
        )
    if len(name) > _NAME_LENGTH:
        raise ConfigurationError(f"'{name}' is too long to name a backend: at most {_NAME_LENGTH} characters.")
    if name == "core":
        raise ConfigurationError("'core' cannot name a backend: dstack-core is the core itself. Choose another name.")
    if name.startswith("dstack-"):
        raise ConfigurationError(
            f"'{name}' would be in a package dstack-{name}. Say '{name.removeprefix('dstack-')}': 'dstack-' is added."
        )


def _near(name: str) -> str:
    """A name that could be meant, or nothing."""
    near = re.sub(r"[^a-z0-9]+", "-", name.lower()).removeprefix("dstack-")
    return re.sub(r"^[0-9-]+", "", near)[:_NAME_LENGTH].strip("-")


def _check_title(title: str) -> None:
    """A title that can be written between quotation marks everywhere."""
    if not title or len(title) > _TITLE_LENGTH or not title.isprintable() or '"' in title or "\\" in title:
        raise ConfigurationError(
            f"{title!r} cannot be a title: write 1 to {_TITLE_LENGTH} characters on one line, "
            "without quotation marks and backslashes."
        )
