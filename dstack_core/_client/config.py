"""The client's configuration file: `$DSTACK_HOME/config.yml`. Its repos are `noted_repos`' business."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dstack_core._home import home
from dstack_core.errors import ConfigurationError

if TYPE_CHECKING:
    import yaml

_KEYS = {"name": str, "url": str, "token": str, "default": bool}
_EXAMPLE = """Example:
  projects:
  - name: main
    url: http://127.0.0.1:3000
    token: 7f3c...
    default: true"""


@dataclass(frozen=True)
class ProjectEntry:
    """One project of the file."""

    name: str
    url: str
    token: str
    default: bool = False

    def __repr__(self) -> str:
        return f"ProjectEntry(name={self.name!r}, url={self.url!r})"


def config_path() -> Path:
    """Where the file is."""
    return home() / "config.yml"


def load_projects(path: Path) -> list[ProjectEntry]:
    """The projects of the file; none if there is no file.

    Raises:
        ConfigurationError: it cannot be read; names file, line and cure.
    """
    text = text_of(path)
    return _Reader(path).projects(text) if text else []


def text_of(path: Path) -> str:
    """What is in the file; nothing if there is none.

    Raises:
        ConfigurationError: it cannot be read; names file and cure.
    """
    try:
        return path.read_text(encoding="utf-8")
    except (FileNotFoundError, NotADirectoryError):
        return ""
    except (OSError, UnicodeDecodeError) as error:
        why = error.strerror if isinstance(error, OSError) else error
        cure = "Repair it, or set the environment variable DSTACK_HOME to a folder of your own."
        raise ConfigurationError(f"{path} cannot be read: {why}. {cure}") from error


def choose(projects: list[ProjectEntry], name: str | None, path: Path) -> ProjectEntry:
    """The project of that name, or the default one."""
    known = ", ".join(project.name for project in projects)
    if name is not None:
        found = [project for project in projects if project.name == name]
        if not found:
            raise ConfigurationError(f"Project {name} is not configured. {path} has: {known}")
        return found[0]
    defaults = [project for project in projects if project.default]
    if not defaults:
        raise ConfigurationError(
            f"No default project, specify project name. {path} has: {known}. "
            "Pass project_name=..., or write `default: true` at one of them."
        )
    return defaults[0]


class _Reader:
    def __init__(self, path: Path) -> None:
        self._path = path

    def projects(self, text: str) -> list[ProjectEntry]:
        root = self._parse(text)
        if root is None:
            return []
        sections = self._mapping(root, "the file")
        for key, (key_node, _) in sections.items():
            if key not in {"projects", "repos"}:
                raise self._error(key_node, f"unknown key '{key}'; allowed: projects, repos")
        if "projects" not in sections:
            return []
        return self._all(sections["projects"][1])

    def _parse(self, text: str) -> yaml.Node | None:
        from dstack_core._models.documents import NotYamlError, compose

        try:
            return compose(text)
        except NotYamlError as error:
            raise self._at(error.line or 1, f"not valid YAML: {error}. Correct this, or delete the file") from None

    def _all(self, node: yaml.Node) -> list[ProjectEntry]:
        import yaml

        if _is_null(node):
            return []
        if not isinstance(node, yaml.SequenceNode):
            raise self._error(node, "'projects' is a list")
        entries = [self._one(item) for item in node.value]
        for kind, chosen in (
            ("name", [e.name for e in entries]),
            ("default", ["true"] * sum(e.default for e in entries)),
        ):
            twice = next((value for value in chosen if chosen.count(value) > 1), None)
            if twice:
                raise self._error(node, f"`{kind}: {twice}` is there twice; keep one")
        return entries

    def _one(self, node: yaml.Node) -> ProjectEntry:
        values: dict[str, Any] = {}
        fields = self._mapping(node, "a project")
        for key, (key_node, value_node) in fields.items():
            if key not in _KEYS:
                raise self._error(key_node, f"unknown key '{key}'; allowed: {', '.join(_KEYS)}")
            values[key] = self._value(key, value_node)
        missing = [key for key in ("name", "url", "token") if key not in values]
        if missing:
            raise self._error(node, f"this project lacks {', '.join(repr(key) for key in missing)}")
        return ProjectEntry(**values)

    def _value(self, key: str, node: yaml.Node) -> str | bool:
        import yaml

        if not isinstance(node, yaml.ScalarNode) or _is_null(node):
            raise self._error(node, f"'{key}' has no value")
        if _KEYS[key] is str:
            # As written: a token may look like a number.
            return str(node.value)
        if node.tag != "tag:yaml.org,2002:bool":
            raise self._error(node, f"'{key}' is true or false")
        return str(node.value).lower() in {"true", "yes", "on"}

    def _mapping(self, node: yaml.Node, what: str) -> dict[str, tuple[yaml.Node, yaml.Node]]:
        import yaml

        if not isinstance(node, yaml.MappingNode):
            raise self._error(node, f"{what} is made of `key: value` lines")
        return {str(key.value): (key, value) for key, value in node.value}

    def _error(self, node: yaml.Node, problem: str) -> ConfigurationError:
        return self._at(node.start_mark.line + 1, problem)

    def _at(self, line: int, problem: str) -> ConfigurationError:
        return ConfigurationError(f"{self._path}, line {line}: {problem}. {_EXAMPLE}")


def _is_null(node: yaml.Node) -> bool:
    return node.tag == "tag:yaml.org,2002:null"
