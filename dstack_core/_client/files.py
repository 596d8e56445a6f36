"""Files that people keep beside their code: profiles, and the configurations of runs."""

from __future__ import annotations

import os
from collections.abc import Iterator
from difflib import get_close_matches
from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dstack_core._home import home
from dstack_core._models.documents import Document, KeyPath, load_document
from dstack_core.errors import ConfigurationError

if TYPE_CHECKING:
    from dstack_core._models.configurations import DevEnvironment, Service, Task
    from dstack_core._models.profiles import Profile

_ENDINGS = (".yml", ".yaml")
_EXAMPLE = "for example\n  profiles:\n  - name: cheap\n    spot_policy: spot\n    default: true"

# ------------------------------------------------------------------------------------------------------------- profiles


def load_profile(cwd: str | PathLike[str], profile_name: str | None = None) -> Profile:
    """A profile from `.dstack/profiles.yml` in a folder, or else from `profiles.yml` in the home folder of dstack.

        profiles:
        - name: cheap
          spot_policy: spot
          max_price: 1.5
          default: true

    Args:
        cwd: the folder, in general that of the project.
        profile_name: name of the profile. If not set: the one with `default: true`, or if there is none, an empty one.

    Returns:
        The profile. Pass it as `profile=` to `client.runs.submit` or `get_plan`.

    Raises:
        ConfigurationError: no profile has that name; or a file cannot be read, or holds something that does not fit:
            one line for each problem, with file, line, key and cure.
    """
    from dstack_core._models.profiles import Profile

    files = [(file, _profiles(file)) for file in _profile_files(Path(cwd))]
    for _, profiles in files:
        for profile in profiles:
            if profile.name == profile_name or (profile_name is None and profile.default):
                return profile
    if profile_name is None:
        return Profile(name="default")
    raise ConfigurationError(f"There is no profile '{profile_name}'. {_known(cwd, files)}")


def _profile_files(cwd: Path) -> Iterator[Path]:
    """Those that are there: the project's own first."""
    own, general = cwd.absolute() / ".dstack" / "profiles", home() / "profiles"
    for place in dict.fromkeys((own, general)):
        file = _one_of(place)
        if file is not None:
            yield file


def _one_of(place: Path) -> Path | None:
    """The file of that name, with either ending."""
    found = [file for ending in _ENDINGS if os.path.lexists(file := place.with_name(place.name + ending))]
    if len(found) > 1:
        raise ConfigurationError(f"There are both {found[0]} and {found[1].name}: keep one of them.")
    return found[0] if found else None


def _known(cwd: str | PathLike[str], files: list[tuple[Path, list[Profile]]]) -> str:
    if not files:
        own, general = Path(cwd).absolute() / ".dstack" / "profiles.yml", home() / "profiles.yml"
        return f"There is neither {own} nor {general}. Write one, {_EXAMPLE}"
    listed = (f"{file} has: {', '.join(profile.name for profile in profiles) or 'none'}." for file, profiles in files)
    return " ".join(listed)


def _profiles(file: Path) -> list[Profile]:
    document = load_document(file)
    if document is None or document.value is None:
        return []
    top = document.mapping(document.value, (), ("profiles",))
    items = document.list(top.get("profiles"), ("profiles",))
    profiles = [_profile(document, item, ("profiles", index)) for index, item in enumerate(items)]
    for index, profile in enumerate(profiles):
        before = profiles[:index]
        if profile.name in (other.name for other in before):
            raise document.error(("profiles", index, "name"), f"there are two profiles '{profile.name}'; rename one")
        if profile.default and any(other.default for other in before):
            raise document.error(("profiles", index, "default"), "two profiles say 'default: true'; keep one")
    return profiles


def _profile(document: Document, value: object, path: KeyPath) -> Profile:
    from dstack_core._models.profiles import Profile

    values = document.mapping(value, path)
    if not isinstance(values.get("name"), str) or not values["name"]:
        raise document.error((*path, "name"), "a profile needs a name, for example 'name: cheap'")
    return document.read(Profile, values, path)


# ------------------------------------------------------------------------------------------------------- configurations


def load_configuration(
    cwd: str | PathLike[str],
    work_dir: str | PathLike[str] | None = None,
    configuration_file: str | PathLike[str] | None = None,
) -> tuple[str, Task | Service | DevEnvironment]:
    """What to run, from a YAML file whose `type` is `task`, `service` or `dev-environment`.

        type: task
        commands:
        - python train.py
        resources:
          gpu: 24GB

    Args:
        cwd: the folder that the other paths start from, in general that of the project.
        work_dir: a folder in it, where the file is looked for if none is named.
        configuration_file: the file. If not set: `.dstack.yml` or `.dstack.yaml` in `work_dir`, or else in `cwd`.

    Returns:
        The file's path, relative to `cwd`, and the configuration. They are what `client.runs.submit` takes as
        `configuration_path` and `configuration`.

    Raises:
        ConfigurationError: there is no such file; `work_dir` is outside of `cwd`; or the file holds something that
            does not fit: one line for each problem, with file, line, key and cure.
    """
    root = Path(cwd).absolute()
    file = root / configuration_file if configuration_file is not None else _default_file(root, work_dir)
    document = load_document(file)
    if document is None:
        raise ConfigurationError(f"Configuration file {file} does not exist. Check its path.")
    return os.path.relpath(file, root), _configuration(document)


def _default_file(root: Path, work_dir: str | PathLike[str] | None) -> Path:
    folder = Path(os.path.normpath(root / (work_dir or ".")))
    if not folder.is_relative_to(os.path.normpath(root)):
        raise ConfigurationError(f"Working directory is outside of {root}: '{os.fspath(work_dir or '')}'.")
    file = _one_of(folder / ".dstack")
    if file is None:
        raise ConfigurationError(f"There is no .dstack.yml in {folder}. Write one, or say which file to read.")
    return file


def _configuration(document: Document) -> Task | Service | DevEnvironment:
    values = document.mapping(document.value if document.value is not None else {}, ())
    from dstack_core._models.configurations import DevEnvironment, Service, Task

    kinds: dict[str, type[Task | Service | DevEnvironment]]
    kinds = {"task": Task, "service": Service, "dev-environment": DevEnvironment}
    kind = values.get("type")
    if not isinstance(kind, str) or kind not in kinds:
        raise _no_kind(document, kind, list(kinds))
    if isinstance(values.get("env"), dict):
        values = {**values, "env": _as_written(document, values["env"])}
    return document.read(kinds[kind], values)


def _no_kind(document: Document, kind: object, allowed: list[str]) -> ConfigurationError:
    from dstack_core._models._base import shown

    wanted = f"write one of: {', '.join(f'type: {name}' for name in allowed)}"
    if kind is None:
        return document.error(("type",), f"it is not said what this is; {wanted}")
    near = get_close_matches(str(kind), allowed, n=1)
    hint = f" Did you mean '{near[0]}'?" if near else ""
    return document.error(("type",), f"{shown(kind)} cannot be run.{hint} Instead, {wanted}")


def _as_written(document: Document, env: dict[Any, Any]) -> dict[Any, Any]:
    """Variables whose values are digits keep them: a version `3.10` is not the number 3.1."""
    return {name: document.written.get(("env", str(name)), value) for name, value in env.items()}
