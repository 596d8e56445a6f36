"""How the reference shows values and types, and what it refuses to leave out."""

from __future__ import annotations

import griffe
import pytest

from docs._site import diagrams, reference
from dstack.api import CPU, Disk, Memory, Range, Resources, SpotPolicy


@pytest.mark.parametrize(
    ("value", "written"),
    [
        (None, "None"),
        ("/root", '"/root"'),
        (SpotPolicy.AUTO, '"auto"'),
        ((SpotPolicy.AUTO, SpotPolicy.SPOT), '("auto", "spot")'),
        (Range(min=Memory("8GB")), '"8GB.."'),
        (CPU(count="2..4"), '"2..4"'),
        (Disk(size="1TB"), '"1TB.."'),
        (Resources(), "Resources()"),
    ],
)
def test_defaults_are_shown_as_one_would_write_them(value: object, written: str) -> None:
    """A default is shown in the short form that a reader can copy."""
    assert reference.written_value(value) == written


@pytest.mark.parametrize(
    ("annotation", "shown"),
    [
        ("Annotated[Accepts[int | None, str], Field(gt=0)]", "int | str | None"),
        ("Literal['a', 'b'] | None", '"a" | "b" | None'),
        ("Items[int | str]", "list[int | str]"),
        ("None | builtins.list[Run]", "list[Run] | None"),
        ("Repo | None", "VirtualRepo | LocalRepo | RemoteRepo | None"),
    ],
)
def test_types_are_shown_as_what_may_be_given(annotation: str, shown: str) -> None:
    """All alternatives are shown, without the wrappers that only programs need, and `None` comes last."""
    with griffe.temporary_visited_module(f"from typing import Literal\nx: {annotation}") as module:
        found = reference.written_type(module["x"].annotation, "dstack.api")
    assert str(found) == shown


def test_a_field_without_a_description_is_an_error() -> None:
    """A model whose docstring leaves a field out cannot be shown, and the message names it."""
    attribute = griffe.Attribute("size", annotation="int")
    owner = griffe.Class("Disk", docstring=griffe.Docstring("A disk.", parser="google"))
    owner.set_member("size", attribute)
    with pytest.raises(ValueError, match="Disk does not describe its field 'size'"):
        reference._row(attribute, owner, Disk, "dstack.api")


def test_diagrams_become_tables() -> None:
    """Each arrow is a row with where it begins, what happens, and where it leads."""
    shown = diagrams.table("stateDiagram-v2\n  [*] --> a\n  a --> b: x, y\n", "mermaid", "transitions", {}, None)
    assert shown.count("<tr>") == 3
    assert "<td><code>a</code></td><td><code>x</code>, <code>y</code></td><td><code>b</code></td>" in shown
    with pytest.raises(ValueError, match="only state diagrams"):
        diagrams.table("flowchart LR\n  a --> b", "mermaid", "transitions", {}, None)
