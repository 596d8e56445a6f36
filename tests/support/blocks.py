"""The fenced blocks of README and the pages under docs/, as a reader would copy them.

A comment on the line before a block, as `<!-- needs a GPU -->`, says what it needs that a test does not have. One as
`<!-- nimbus: at the end -->` makes it a part of the tutorial, whose test says what may stand there.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[2]
FENCE = re.compile(
    r'(?:<!-- (?P<comment>[^\n]+) -->\n)?```(?P<language>\w+)?(?: title="[^"\n]+")?\n(?P<text>.*?)^```$',
    re.DOTALL | re.MULTILINE,
)


@dataclass(frozen=True)
class Block:
    """One fenced block.

    Attributes:
        page: path of its page inside the repository.
        line: where its text starts.
        language: as written after the fence; empty if nothing is.
        text: what is in it.
        comment: the comment on the line before it.
    """

    page: str
    line: int
    language: str
    text: str
    comment: str | None

    @property
    def needs(self) -> str | None:
        """What it needs that a test does not have."""
        words = (self.comment or "").partition("needs ")
        return words[2] or None

    @property
    def part(self) -> str | None:
        """What it is for in the tutorial, of which it is a part."""
        words = (self.comment or "").partition("nimbus: ")
        return words[2] or None

    def orders(self, *beginnings: str) -> bool:
        """Whether it is for this in the tutorial."""
        return (self.part or "").startswith(beginnings)

    def __str__(self) -> str:
        return f"{self.page}:{self.line}"


def pages() -> list[Path]:
    """README, and every page of the site."""
    return [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]


def blocks(*languages: str) -> list[Block]:
    """All blocks in these languages."""
    return [block for page in pages() for block in blocks_of(page) if block.language in languages]


def blocks_of(page: Path) -> Iterator[Block]:
    """The blocks of one page."""
    text = page.read_text(encoding="utf-8")
    for match in FENCE.finditer(text):
        line = text.count("\n", 0, match.start("text")) + 1
        name = page.relative_to(ROOT).as_posix()
        yield Block(name, line, match["language"] or "", match["text"], match["comment"])
