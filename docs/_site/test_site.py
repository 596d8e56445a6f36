"""The built site: its links, what it loads, and that the API page says all there is to say.

`nox -s docs` builds the site and runs this.
"""

from __future__ import annotations

import importlib
import inspect
import pkgutil
import re
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from enum import Enum
from functools import cache
from html.parser import HTMLParser
from pathlib import Path
from types import FunctionType
from typing import Any
from urllib.parse import unquote, urlsplit

import pytest
from pydantic import BaseModel

from docs._site.reference import INNER
from dstack import api
from dstack_core import errors, plugin, testing
from dstack_core._models._base import UserModel

SITE = Path(__file__).parents[2] / "build" / "site"
PAGES = sorted(SITE.rglob("*.html"))
SAME_AS = re.compile(r"The arguments are those of `(\w+)`")
# What the theme loads from elsewhere if a page has an element of this class: none has.
LOADERS = {"mermaid", "glightbox", "pyodide"}


@dataclass
class Page(HTMLParser):
    """What a page links to, loads and names."""

    links: list[str] = field(default_factory=list)
    loads: list[str] = field(default_factory=list)
    ids: list[str] = field(default_factory=list)
    classes: set[str] = field(default_factory=set)

    def __post_init__(self) -> None:
        super().__init__()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        """Notes one element."""
        values = {name: value or "" for name, value in attrs}
        self.classes |= set(values.get("class", "").split())
        self.ids += [values["id"]] if values.get("id") else []
        if "href" in values:
            (self.links if tag == "a" else self.loads).append(values["href"])
        if "src" in values:
            self.loads.append(values["src"])


@cache
def page(path: Path) -> Page:
    """One page, read."""
    found = Page()
    found.feed(path.read_text(encoding="utf-8"))
    return found


def name_of(path: Path) -> str:
    """Path inside the site."""
    return path.relative_to(SITE).as_posix()


def test_the_site_is_built() -> None:
    """Each page of the navigation is there, and nothing but pages and the theme."""
    assert {"index.html", "reference/api.html", "reference/plugin.html", "transitions.html"} <= set(map(name_of, PAGES))
    assert not (SITE / "_site").exists()


# ------------------------------------------------------------------------------------------------------- links --


@pytest.mark.parametrize("path", PAGES, ids=name_of)
def test_every_link_leads_somewhere(path: Path) -> None:
    """Each link and each file that a page loads is in the site, with the anchor that it names."""
    found = page(path)
    assert [link for link in [*found.links, *found.loads] if not leads_somewhere(path, link)] == []


def leads_somewhere(path: Path, link: str) -> bool:
    """Whether a link of a page exists, for a reader who has no network if it is one of ours."""
    parts = urlsplit(link)
    if parts.scheme in ("http", "https"):
        return link not in page(path).loads
    # Links of the page for what does not exist begin at the root.
    start = SITE if parts.path.startswith("/") else path.parent
    target = (start / unquote(parts.path).lstrip("/")).resolve() if parts.path else path
    target = target / "index.html" if target.is_dir() else target
    if not target.exists() or not target.is_relative_to(SITE):
        return False
    anchored = target.suffix == ".html" and parts.fragment
    return not anchored or unquote(parts.fragment) in page(target).ids


@pytest.mark.parametrize("path", PAGES, ids=name_of)
def test_nothing_is_loaded_from_elsewhere(path: Path) -> None:
    """A page needs nothing but the site: no font, style, script or image, and nothing that a script would fetch."""
    found = page(path)
    assert [address for address in found.loads if urlsplit(address).netloc] == []
    assert found.classes.isdisjoint(LOADERS)


@pytest.mark.parametrize("path", sorted(SITE.rglob("*.css")), ids=name_of)
def test_styles_load_nothing_from_elsewhere(path: Path) -> None:
    """No style imports another one or an image from an address."""
    assert re.findall(r"(?:@import|url\()\s*[\"']?(?:https?:)?//", path.read_text(encoding="utf-8")) == []


@pytest.mark.parametrize("path", PAGES, ids=name_of)
def test_anchors_are_unique(path: Path) -> None:
    """No two elements of a page have the same id, so that a link can mean only one."""
    assert [name for name, count in Counter(page(path).ids).items() if count > 1] == []


# ------------------------------------------------------------------------------------------------- reference --


def documented() -> list[tuple[str, str]]:
    """Each name behind a door, as a pair of the door and the name, where it has its section."""
    doors = ["dstack.api", *(f"dstack.api.{module.name}" for module in pkgutil.iter_modules(api.__path__))]
    ours = [(door, name) for door in doors for name in importlib.import_module(door).__all__]
    theirs = [("dstack_core.plugin", name) for name in plugin.__all__ if name not in ("Range", "SpotPolicy")]
    tests = [("dstack_core.testing", name) for name in testing.__all__]
    return ours + theirs + tests


def ids() -> set[str]:
    """Every anchor of the reference."""
    return {name for path in (SITE / "reference").glob("*.html") for name in page(path).ids}


@pytest.mark.parametrize(("door", "name"), documented(), ids=str)
def test_every_name_has_a_section(door: str, name: str) -> None:
    """Each name has a heading to link to, and, but for helpers of tests, each member, argument and field of it."""
    value = getattr(importlib.import_module(door), name)
    wanted = {f"{door}.{name}" if name != "hookimpl" else "hookimpl"}
    if inspect.isclass(value) and name not in INNER and door != "dstack_core.testing":
        wanted |= {f"{door}.{name}{part}" for part in parts(value)}
    elif inspect.isfunction(value) and door.startswith("dstack.api"):
        wanted |= {f"{door}.{name}({argument})" for argument in arguments(value)}
    assert sorted(wanted - ids()) == []


def parts(value: type) -> Iterator[str]:
    """What a class has: its fields or arguments, and its members with theirs."""
    if issubclass(value, Enum):
        yield from (f"({name})" for name in value.__members__)
    elif issubclass(value, BaseModel):
        yield from (f"({name})" for name in value.model_fields)
    elif not issubclass(value, Exception) and "Args:" in (value.__doc__ or ""):
        yield from (f"({name})" for name in arguments(value))
    for name, member in members(value):
        yield f".{name}"
        if callable(member):
            owner = SAME_AS.search(inspect.getdoc(member) or "")
            place = name if owner is None else owner[1]
            yield from (f".{place}({argument})" for argument in arguments(member))


def members(value: type) -> Iterator[tuple[str, Any]]:
    """Public methods and properties that a class of ours defines, its own and those of bases that are not public."""
    public = {getattr(api, name) for name in api.__all__} | {UserModel}
    bases = [base for base in value.__mro__ if base is value or base not in public]
    for base in bases:
        if not base.__module__.startswith("dstack"):
            continue
        for name, member in vars(base).items():
            if not name.startswith("_") and isinstance(member, property | staticmethod | classmethod | FunctionType):
                yield name, member if isinstance(member, property) else getattr(value, name)


def arguments(function: Callable[..., Any]) -> list[str]:
    """Names of the arguments that a caller passes."""
    return [name for name in inspect.signature(function).parameters if name not in ("self", "cls")]


def test_every_error_has_a_section() -> None:
    """Each class of `dstack_core.errors` is explained on the API page or on the page of errors."""
    sections = {anchor.rpartition(".")[2] for anchor in ids()}
    assert [name for name in errors.__all__ if name not in sections] == []
