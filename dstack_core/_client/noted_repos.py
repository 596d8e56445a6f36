"""The repos that were initialised from this computer: the section `repos` of `$DSTACK_HOME/config.yml`.

People write the rest of that file. It stays as they wrote it, comments included.
"""

from __future__ import annotations

import os
import stat
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import yaml

from dstack_core._client.config import text_of
from dstack_core._home import ensure_home
from dstack_core.errors import ConfigurationError

_SECTION = "repos"
_TYPES = ("local", "remote")


@dataclass(frozen=True)
class RepoEntry:
    """A repo that was initialised from this computer.

    Attributes:
        path: its folder, absolute.
        repo_id: as the server knows it.
        repo_type: `"local"` or `"remote"`.
        ssh_key_path: the private key that was passed for it.
    """

    path: str
    repo_id: str
    repo_type: str
    ssh_key_path: str | None = None


def find_repo(path: Path, folder: str) -> RepoEntry | None:
    """The repo of a folder; `None` if the file has none.

    Args:
        path: the file.
        folder: absolute.

    Raises:
        ConfigurationError: the file cannot be read; names file, line and cure.
    """
    for entry in _entries(path, _parsed(path, text_of(path))):
        if entry["path"] == folder:
            return RepoEntry(folder, entry["repo_id"], entry["repo_type"], entry.get("ssh_key_path") or None)
    return None


def save_repo(path: Path, entry: RepoEntry) -> None:
    """Notes a repo, in place of the one of the same folder. All else in the file stays as it is written.

    Args:
        path: the file.
        entry: the repo.

    Raises:
        ConfigurationError: the file cannot be read or written.
    """
    import fcntl

    ensure_home()
    with path.with_name(f"{path.name}.lock").open("a") as lock:
        # Two programs that note something at once do it one after the other.
        fcntl.flock(lock, fcntl.LOCK_EX)
        text = text_of(path)
        root = _parsed(path, text)
        others = [known for known in _entries(path, root) if known["path"] != entry.path]
        _replace(path, _with_entries(text, root, [*others, asdict(entry)]))


def _parsed(path: Path, text: str) -> yaml.MappingNode | None:
    try:
        root = yaml.compose(text, Loader=yaml.SafeLoader)
    except yaml.YAMLError as error:
        raise ConfigurationError(f"{path} is not YAML: {error}. Correct it, or delete it.") from None
    if root is not None and not isinstance(root, yaml.MappingNode):
        raise ConfigurationError(f"{path}, line 1: the file is made of `key: value` lines. Correct it, or delete it.")
    return root


def _section(root: yaml.MappingNode | None) -> tuple[yaml.Node, yaml.Node] | None:
    """Key and value of the section."""
    return next((pair for pair in root.value if pair[0].value == _SECTION), None) if root else None


def _entries(path: Path, root: yaml.MappingNode | None) -> list[dict[str, Any]]:
    section = _section(root)
    if section is None:
        return []
    entries = _as_text(section[1]) or []
    line = section[0].start_mark.line + 1
    if not isinstance(entries, list) or not all(map(_is_entry, entries)):
        raise ConfigurationError(
            f"{path}, line {line}: an entry of '{_SECTION}' has a path, a repo_id, and a repo_type that is one of "
            f"{', '.join(_TYPES)}. Correct it, or delete the section."
        )
    return entries


def _as_text(node: yaml.Node) -> Any:
    """What a node says, numbers and all as they are written: the id of a repo may look like a number."""
    if isinstance(node, yaml.SequenceNode):
        return [_as_text(item) for item in node.value]
    if isinstance(node, yaml.MappingNode):
        return {_as_text(key): _as_text(value) for key, value in node.value}
    return None if node.tag == "tag:yaml.org,2002:null" else node.value


def _is_entry(entry: object) -> bool:
    if not isinstance(entry, Mapping) or not all(isinstance(entry.get(key), str) for key in ("path", "repo_id")):
        return False
    return entry.get("repo_type") in _TYPES


def _with_entries(text: str, root: yaml.MappingNode | None, entries: list[dict[str, Any]]) -> str:
    filled = [{key: value for key, value in entry.items() if value is not None} for entry in entries]
    block = yaml.safe_dump({_SECTION: filled}, sort_keys=False, allow_unicode=True)
    added = _mapping(block)
    if added is None:
        raise AssertionError("what was just written is a mapping")
    changed = _spliced(text, _section(root), block)
    if _says(changed, _others(root), added):
        return changed
    # Written in a way that lines cannot be put into.
    return yaml.serialize(_joined(root, added)) or ""


def _spliced(text: str, section: tuple[yaml.Node, yaml.Node] | None, block: str) -> str:
    """The text with the section's lines replaced, or with new ones at its end."""
    if section is None:
        return f"{text}{'' if not text or text.endswith(chr(10)) else chr(10)}{block}"
    start = text.rfind("\n", 0, section[0].start_mark.index) + 1
    stop = text.find("\n", _end(section[1]))
    return text[:start] + block + (text[stop + 1 :] if stop >= 0 else "")


def _end(node: yaml.Node) -> int:
    """Where a node ends; what is made of lines says so only of its last part."""
    if not isinstance(node, yaml.CollectionNode) or node.flow_style or not node.value:
        return int(node.end_mark.index)
    parts = [part for item in node.value for part in (item if isinstance(item, tuple) else (item,))]
    return max(_end(part) for part in parts)


def _others(root: yaml.MappingNode | None) -> list[Any]:
    return [_plain(key) + _plain(value) for key, value in root.value if key.value != _SECTION] if root else []


def _plain(node: yaml.Node) -> tuple[Any, ...]:
    """A node without its place in the text."""
    if isinstance(node, yaml.ScalarNode):
        return (node.tag, node.value)
    parts = [part for item in node.value for part in (item if isinstance(item, tuple) else (item,))]
    return (node.tag, tuple(map(_plain, parts)))


def _says(text: str, others: list[Any], added: yaml.MappingNode) -> bool:
    """Whether a text has this section, and all else as it was."""
    try:
        root = _mapping(text)
    except yaml.YAMLError:
        return False
    found, wanted = _section(root), _section(added)
    if found is None or wanted is None:
        return False
    return _plain(found[1]) == _plain(wanted[1]) and _others(root) == others


def _mapping(text: str) -> yaml.MappingNode | None:
    root = yaml.compose(text, Loader=yaml.SafeLoader)
    return root if isinstance(root, yaml.MappingNode) else None


def _joined(root: yaml.MappingNode | None, added: yaml.MappingNode) -> yaml.Node:
    pairs = [pair for pair in root.value if pair[0].value != _SECTION] if root else []
    return yaml.MappingNode(added.tag, [*pairs, *added.value], flow_style=False)


def _replace(path: Path, text: str) -> None:
    """Writes a file at once, with the mode that it had. Behind a link, the file that it leads to."""
    real = path.resolve()
    mode = stat.S_IMODE(real.stat().st_mode) if real.exists() else 0o600
    draft = real.with_name(f"{real.name}.{os.getpid()}")
    try:
        with os.fdopen(os.open(draft, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, mode), "w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        draft.replace(real)
    except OSError as error:
        raise ConfigurationError(f"{path} cannot be written: {error.strerror}. Make it writable.") from error
