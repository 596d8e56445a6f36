"""Which files stay at home: `.gitignore` and `.dstackignore`, in every folder, read as git reads them."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass

from pathspec.patterns.gitignore.base import GitIgnorePatternError
from pathspec.patterns.gitignore.spec import GitIgnoreSpecPattern

IGNORE_FILES = (".gitignore", ".dstackignore")
"""In the order in which they are read: the last pattern that matches decides."""

_BOM = b"\xef\xbb\xbf"
# pathspec marks with this group where what lies *below* a match begins.
_BELOW = "ps_d"


@dataclass(frozen=True, slots=True)
class _Pattern:
    regex: re.Pattern[str]
    ignores: bool
    folders_only: bool

    def matches(self, text: str, is_folder: bool) -> bool:
        if self.folders_only and not is_folder:
            return False
        match = self.regex.search(text)
        # What lies below a match is no match of its own: its folder was left out already.
        return match is not None and match.groupdict().get(_BELOW) is None


class _Patterns:
    """Patterns, in order. One regular expression for all of them says quickly that none matches."""

    def __init__(self, patterns: list[_Pattern]) -> None:
        self._patterns = patterns[::-1]
        parts = "|".join(p.regex.pattern.replace(f"?P<{_BELOW}>", "?:") for p in patterns)
        self._any = re.compile(parts, re.DOTALL) if patterns else None

    def verdict(self, text: str, is_folder: bool) -> tuple[int, bool] | None:
        """The place of the last pattern that matches, from the end, and whether it ignores."""
        if self._any is None or self._any.search(text) is None:
            return None
        for place, pattern in enumerate(self._patterns):
            if pattern.matches(text, is_folder):
                return place, pattern.ignores
        return None


class _Level:
    """The patterns of one folder.

    Args:
        start: where, in a path, the part below this folder begins.
        lines: of the ignore files.
    """

    def __init__(self, start: int, lines: Iterable[str]) -> None:
        self._start = start
        self._patterns = [pattern for line in lines if (pattern := _pattern(line)) is not None]
        self._all = _Patterns(self._patterns)

    def __bool__(self) -> bool:
        return bool(self._patterns)

    def verdict(self, path: str, is_folder: bool) -> bool | None:
        """Whether an entry is ignored; `None` if no pattern says anything."""
        found = self._all.verdict(path[self._start :], is_folder)
        return None if found is None else found[1]


@dataclass(frozen=True, slots=True)
class IgnoreRules:
    """The rules in a folder: its own, and those of the folders above."""

    levels: tuple[_Level, ...] = ()

    def below(self, folder: str, lines: Iterable[str]) -> IgnoreRules:
        """The rules in a folder that has ignore files.

        Args:
            folder: its path, empty for the uppermost one.
            lines: what they say, in the order of `IGNORE_FILES`.
        """
        level = _Level(len(folder) + 1 if folder else 0, lines)
        return IgnoreRules((level, *self.levels)) if level else self

    def ignores(self, path: str, is_folder: bool = False) -> bool:
        """Whether an entry, whose folder is not ignored, is."""
        for level in self.levels:
            verdict = level.verdict(path, is_folder)
            if verdict is not None:
                return verdict
        return False


def lines_of(content: bytes) -> list[str]:
    """The lines of an ignore file."""
    text = content.removeprefix(_BOM).decode(errors="surrogateescape")
    return [line.removesuffix("\r") for line in text.split("\n")]


def _pattern(line: str) -> _Pattern | None:
    """A line's pattern; `None` if it has none, or one that matches nothing."""
    text = _without_spaces(line)
    if not text or text.startswith("#"):
        return None
    folders_only = text.endswith("/")
    text = text.removesuffix("/")
    try:
        pattern = GitIgnoreSpecPattern(text)
    except GitIgnorePatternError:
        return None
    if pattern.regex is None or pattern.include is None:
        return None
    return _Pattern(re.compile(pattern.regex.pattern, re.DOTALL), pattern.include, folders_only)


def _without_spaces(line: str) -> str:
    """Without the spaces at the end, unless a backslash keeps the first of them."""
    text = line.rstrip(" ")
    backslashes = len(text) - len(text.rstrip("\\"))
    return text + " " if backslashes % 2 and len(text) < len(line) else text
