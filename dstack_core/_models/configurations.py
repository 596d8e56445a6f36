"""What runs: tasks, services and dev environments.

A configuration says what is executed and in which surroundings; most of its fields are common to all three kinds.
Durations are seconds or text (`"1h"`), sizes are text with a unit (`"24GB"`), prices are USD per hour.
"""

import re
from collections.abc import Mapping
from typing import TYPE_CHECKING, Annotated, Any, Literal, Self, TypeVar, get_args

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, model_validator

from dstack_core._models._base import Accepts, Items, ValueModel, default, shown
from dstack_core._models.profiles import ProfileParams
from dstack_core._models.resources import Resources
from dstack_core.errors import ConfigurationError

if TYPE_CHECKING:
    from dstack_core._models.repos import VirtualRepo
    from dstack_core._models.services import AnyConfiguration, DevEnvironment, Service

__all__ = [
    "AnyConfiguration",
    "AppSpec",
    "BaseConfiguration",
    "DevEnvironment",
    "FilePathMapping",
    "InstanceMountPoint",
    "NodeGroup",
    "PortMapping",
    "RegistryAuth",
    "RepoSpec",
    "Service",
    "Task",
    "VolumeMountPoint",
    "check_run_name",
    "fill_env",
]


class AppSpec(BaseModel):
    """A port of a job that attach forwards to the user's computer.

    Attributes:
        port: the port inside the job.
        map_to_port: the port on the user's computer; `None` for any free one.
        app_name: what listens there, for people.
        url_path: path to open in a browser.
        url_query_params: query to open in a browser.
    """

    model_config = ConfigDict(extra="ignore", frozen=True, defer_build=True)

    port: int
    map_to_port: int | None = None
    app_name: str
    url_path: str | None = None
    url_query_params: dict[str, str] | None = None


# ---------------------------------------------------------------------------------------------------------------------
# Values with a short form
# ---------------------------------------------------------------------------------------------------------------------


class PortMapping(ValueModel):
    """A port of the job and where it appears on the user's computer while attached.

    Short form: `8080` (the same port on both sides), `"80:8080"` (local 80, job 8080), `"*:8080"` (any free local one).

    Attributes:
        local_port: the port on the user's computer; `None` for any free one.
        container_port: the port inside the job.
    """

    local_port: Annotated[int, Field(ge=1, le=65535)] | None = None
    container_port: Annotated[int, Field(ge=1, le=65535)]

    @classmethod
    def parse(cls, text: int | str) -> Self:
        """Reads the short form.

        Args:
            text: as `8080`, `"80:8080"` or `"*:8080"`.

        Raises:
            ConfigurationError: it cannot be read.
        """
        return cls(**_port_fields(text))


def _port_fields(value: int | str) -> dict[str, Any]:
    match = re.fullmatch(_PORT, str(value))
    if match is None:
        raise ConfigurationError(
            f"{shown(value)} is not a port: write 8080, '80:8080' (local:job) or '*:8080' (any free local port)"
        )
    job = port_number(match[2])
    return {"local_port": None if match[1] == "*" else port_number(match[1] or match[2]), "container_port": job}


def port_number(digits: str) -> int:
    if not 1 <= int(digits) <= 65535:
        raise ConfigurationError(f"port {digits} is not between 1 and 65535")
    return int(digits)


_PORT = r"(?:([0-9]{1,6}|\*):)?([0-9]{1,6})"
PortJson = Annotated[int, Field(ge=1, le=65535)] | Annotated[str, Field(pattern=f"^{_PORT}$")]


def is_short(value: Any) -> bool:
    return isinstance(value, int | str) and not isinstance(value, bool)


def read_port(value: Any) -> Any:
    return _port_fields(value) if is_short(value) else value


class RegistryAuth(ValueModel):
    """Credentials of a private container registry. They are shown in no message and no log.

    Attributes:
        username: the user, or the name of the token.
        password: the password, or the token.
    """

    username: str | None = Field(default=None, repr=False)
    password: str = Field(repr=False)


def _env(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {_env_name(name, f"{shown(name)}"): _env_value(name, text) for name, text in value.items()}
    if not isinstance(value, list | tuple):
        raise ConfigurationError("env is a dictionary ({'NAME': 'value'}) or a list (['NAME=value', 'NAME'])")
    return _env_list(value)


def _env_list(items: list[Any] | tuple[Any, ...]) -> dict[str, str | None]:
    env: dict[str, str | None] = {}
    for number, item in enumerate(items):
        # The text itself is not repeated: it may be a secret.
        name, equals, text = item.partition("=") if isinstance(item, str) else ("", "", "")
        name = _env_name(name, f"item {number}")
        if name in env:
            raise ConfigurationError(f"'{name}' is given twice: keep one of them")
        env[name] = _env_value(name, text) if equals else None
    return env


def _env_name(name: Any, place: str) -> str:
    if not isinstance(name, str) or not re.fullmatch(r"[^=\s\0]+", name):
        raise ConfigurationError(
            f"{place} has no name that an environment variable can have: write 'NAME=value' or 'NAME'"
        )
    return name


def _env_value(name: str, value: Any) -> str | None:
    if value is None or (isinstance(value, str) and "\0" not in value):
        return value
    if isinstance(value, int | float) and not isinstance(value, bool):
        return str(value)
    raise ConfigurationError(f"the value of '{name}' is not text: put it in quotes")


_EnvJson = dict[str, str | float | None] | list[str]
Env = Annotated[
    Accepts[dict[str, str | None], Mapping[str, Any] | list[str]],
    BeforeValidator(_env, json_schema_input_type=_EnvJson),
]

PythonVersion = Literal["3.8", "3.9", "3.10", "3.11", "3.12", "3.13", "3.14"]


def _python(value: Any) -> Any:
    text = str(value) if isinstance(value, int | float) else value
    # YAML and Python read an unquoted 3.10 as the number 3.1.
    text = "3.10" if text == "3.1" else text
    if text is not None and text not in get_args(PythonVersion):
        raise ConfigurationError(
            f"{shown(value)} is not a supported Python version: {', '.join(get_args(PythonVersion))}"
        )
    return text


def _is_path(text: str) -> bool:
    return text.startswith("/")


def _shell(value: Any) -> Any:
    if value in (None, "sh", "bash") or (isinstance(value, str) and _is_path(value)):
        return value
    raise ConfigurationError(f"{shown(value)} is not a shell: write 'sh', 'bash' or an absolute path")


_RUN_NAME = r"[a-z][a-z0-9-]{1,40}"


def check_run_name(value: object) -> str:
    """Returns the name of a run if it is one; `ConfigurationError` says what a name looks like."""
    if not isinstance(value, str) or not re.fullmatch(_RUN_NAME, value):
        raise ConfigurationError(
            f"{shown(value)} cannot name a run: use 2 to 41 small letters, digits and dashes, and begin with a letter"
        )
    return value


_RUN_NAME_JSON = Annotated[str, Field(pattern=f"^{_RUN_NAME}$")] | None


def _run_name(value: Any) -> Any:
    return None if value is None else check_run_name(value)


class VolumeMountPoint(ValueModel):
    """A volume and where it appears in the job. Short form: `"name:/path"`.

    Attributes:
        name: name of the volume, or several of which one is used.
        path: absolute path in the job.
    """

    name: str | list[str]
    path: Annotated[str, Field(pattern="^/")]


class InstanceMountPoint(ValueModel):
    """A folder of the machine and where it appears in the job. Short form: `"/folder:/path"`.

    Attributes:
        instance_path: absolute path on the machine.
        path: absolute path in the job.
        optional: go on without it where the machine cannot mount folders.
    """

    instance_path: Annotated[str, Field(pattern="^/")]
    path: Annotated[str, Field(pattern="^/")]
    optional: bool = False


def _read_volume(value: Any) -> Any:
    if isinstance(value, str):
        source, colon, path = value.partition(":")
        if not (source and colon and _is_path(path)):
            raise ConfigurationError(f"{shown(value)} is not a volume: write 'name:/path' or '/folder:/path'")
        value = {"instance_path" if _is_path(source) else "name": source, "path": path}
    if isinstance(value, dict):
        model = InstanceMountPoint if "instance_path" in value else VolumeMountPoint
        return model.__pydantic_validator__.validate_python(value)
    return value


class FilePathMapping(ValueModel):
    """A local file or folder and where it appears in the job. Short form: `"local"`, `"local:remote"`.

    Attributes:
        local_path: path on the user's computer, relative to the configuration's folder.
        path: path in the job, absolute or relative to the working directory; the same as `local_path` if not set.
    """

    local_path: Annotated[str, Field(min_length=1)]
    path: Annotated[str, Field(min_length=1)] | None = None


def _read_file(value: Any) -> Any:
    if not isinstance(value, str):
        return value
    local, colon, path = value.partition(":")
    return {"local_path": local} | ({"path": path} if colon else {})


class RepoSpec(ValueModel):
    """A repository to put into the job. Short form: `"path"`, `"url"`, `"path:/where"`, `"url:/where"`.

    Attributes:
        local_path: a working copy on the user's computer; not together with `url`.
        url: where it is cloned from.
        branch: which branch; the default one if not set.
        hash: which commit; the newest of the branch if not set.
        path: path in the job; the working directory if not set.
    """

    local_path: str | None = None
    url: str | None = None
    branch: str | None = None
    hash: str | None = None
    path: str = "."

    @model_validator(mode="after")
    def _one_source(self) -> Self:
        if (self.local_path is None) == (self.url is None):
            raise ConfigurationError("set either 'local_path' or 'url'")
        return self


_URL = r"(?:[a-z][a-z0-9+]*://|[^/:@\s]+@[^/:\s]+:)"


def _read_repo(value: Any) -> Any:
    if not isinstance(value, str):
        return value
    scheme = re.match(_URL, value)
    source, colon, path = value[scheme.end() if scheme else 0 :].rpartition(":")
    if not colon or not path.startswith(("/", ".", "~")):
        source, path = value[scheme.end() if scheme else 0 :], "."
    if not source:
        raise ConfigurationError(
            f"{shown(value)} is not a repository: write 'path', 'url', 'path:/where' or 'url:/where'"
        )
    return {"url" if scheme else "local_path": (scheme[0] if scheme else "") + source, "path": path}


class NodeGroup(ValueModel):
    """Some nodes of a task, or replicas of a service, that differ from the others.

    Attributes:
        name: unique among the groups.
        nodes: how many.
        commands: what they run; as the configuration if not set.
        resources: what they need; as the configuration if not set.
    """

    name: str
    nodes: Annotated[int, Field(ge=1)] = 1
    commands: list[str] | None = None
    resources: Resources | None = None


# ---------------------------------------------------------------------------------------------------------------------
# Configurations
# ---------------------------------------------------------------------------------------------------------------------


def _read_lines(value: Any) -> Any:
    if isinstance(value, str):
        raise ConfigurationError("this is a list of commands: put the text in brackets, ['...']")
    return value


def _entrypoint(value: str | None) -> str | None:
    from shlex import split

    try:
        split(value or "")
    except ValueError as error:
        raise ConfigurationError(f"this cannot be read as a command line: {error}") from None
    return value


def _distinct(ports: list[PortMapping]) -> list[PortMapping]:
    for side, numbers in (
        ("local port", [port.local_port for port in ports if port.local_port]),
        ("port", [port.container_port for port in ports]),
    ):
        twice = next((number for number in numbers if numbers.count(number) > 1), None)
        if twice:
            raise ConfigurationError(f"{side} {twice} is given twice: keep one of them")
    return ports


Lines = Annotated[list[str], BeforeValidator(_read_lines, json_schema_input_type=list[str])]
Ports = Annotated[
    Accepts[
        list[Annotated[PortMapping, BeforeValidator(read_port, json_schema_input_type=PortMapping | PortJson)]],
        Items[int | str | PortMapping],
    ],
    AfterValidator(_distinct),
]
Volumes = Accepts[
    list[
        Annotated[
            VolumeMountPoint | InstanceMountPoint,
            BeforeValidator(_read_volume, json_schema_input_type=VolumeMountPoint | InstanceMountPoint | str),
        ]
    ],
    list[str],
]
Repos = Annotated[
    Accepts[list[Annotated[RepoSpec, BeforeValidator(_read_repo, json_schema_input_type=RepoSpec | str)]], list[str]],
    Field(max_length=1),
]
Files = Accepts[
    list[Annotated[FilePathMapping, BeforeValidator(_read_file, json_schema_input_type=FilePathMapping | str)]],
    list[str],
]


class BaseConfiguration(ProfileParams):
    """What tasks, services and dev environments have in common, besides the fields of a profile.

    A configuration can be changed after it was made; each change is checked.

    Attributes:
        name: name of the run; made up if not set.
        image: container image. Without one, the commands run as processes on the machine.
        user: user inside the container, as `"1000:1000"`; the image's own if not set.
        privileged: run the container with all privileges.
        entrypoint: takes the place of the image's entrypoint; written as in a shell.
        working_dir: where the commands run, absolute or relative to the job's folder.
        home_dir: home folder of the user inside the container.
        registry_auth: credentials for a private registry.
        python: version of Python, `"3.8"` to `"3.14"`: the commands run in a fresh environment of it. Not together
            with `image`.
        nvcc: bring the CUDA compiler.
        single_branch: fetch only the needed branch of the repository.
        env: environment variables, as `{"NAME": "value"}` or `["NAME=value", "NAME"]`. A name alone (or the value
            `None`) takes the value from the environment of the program that submits the run.
        shell: what runs the commands: `"sh"`, `"bash"` or an absolute path.
        resources: what the job needs.
        priority: runs of a higher priority go first; 0 to 100.
        volumes: what to mount, as `"name:/path"` or `"/folder:/path"`.
        docker: let the job use a container engine of its own.
        repos: a repository to put into the job (at most one), as `"path"` or `"url"`.
        files: files and folders to put into the job, as `"local"` or `"local:remote"`.
        dstack: let the job use this API itself.
        setup: commands that run before the others.
    """

    model_config = ConfigDict(validate_assignment=True)

    name: Annotated[str | None, BeforeValidator(_run_name, json_schema_input_type=_RUN_NAME_JSON)] = None
    image: Annotated[str, Field(min_length=1)] | None = None
    user: str | None = None
    privileged: bool = False
    entrypoint: Annotated[str | None, AfterValidator(_entrypoint)] = None
    working_dir: str | None = None
    home_dir: str = "/root"
    registry_auth: RegistryAuth | None = Field(default=None, repr=False)
    python: Annotated[
        Accepts[PythonVersion | None, str | float],
        BeforeValidator(_python, json_schema_input_type=PythonVersion | Literal["3.1"] | float | None),
    ] = default(None)
    nvcc: bool | None = None
    single_branch: bool | None = None
    env: Env = default({}, repr=False)
    shell: Annotated[str | None, BeforeValidator(_shell, json_schema_input_type=str | None)] = None
    resources: Resources = Resources.model_construct(set())
    priority: Annotated[int, Field(ge=0, le=100)] | None = None
    volumes: Volumes = default([])
    docker: bool | None = None
    repos: Repos = default([])
    files: Files = default([])
    dstack: bool = False
    setup: Lines = default([])

    def get_repo(self) -> "VirtualRepo":
        """The repository that is used when none is passed: an empty one."""
        from dstack_core._models.repos import VirtualRepo

        return VirtualRepo("none")

    @model_validator(mode="after")
    def _fits_together(self) -> Self:
        self.__pydantic_fields_set__.add("type")
        if self.image and self.python:
            raise ConfigurationError("'image' brings its own Python: set 'image' or 'python', not both")
        if self.docker and (self.image or self.python):
            raise ConfigurationError("'docker' brings its own image: set it without 'image' and 'python'")
        return self


class Task(BaseConfiguration):
    """A job that runs to its end.

    Attributes:
        type: always `"task"`.
        commands: what runs, one after the other in one shell, until one fails. Needed unless there is an `image`,
            whose own command runs then.
        ports: ports to forward while attached, as `8080`, `"80:8080"` (local:job) or `"*:8080"` (any free local port).
        nodes: how many machines run it together.
        groups: the same, for machines that differ; not together with `nodes`.

    Raises:
        ConfigurationError: a field is unknown, or a value does not fit; one line per problem.
    """

    type: Literal["task"] = "task"
    commands: Lines = default([])
    ports: Ports = default([])
    nodes: Annotated[int, Field(ge=1)] | None = None
    groups: list[NodeGroup] | None = None

    @model_validator(mode="after")
    def _has_something_to_run(self) -> Self:
        need_commands(self.commands, self.image)
        if self.nodes is not None and self.groups is not None:
            raise ConfigurationError("'groups' says how many nodes there are: leave 'nodes' out")
        return self


def need_commands(commands: list[str], image: str | None) -> None:
    if not commands and image is None:
        raise ConfigurationError("there is nothing to run: set 'commands', 'image' or both")


def __getattr__(name: str) -> Any:
    if name not in ("AnyConfiguration", "DevEnvironment", "Service"):
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from dstack_core._models import services

    return getattr(services, name)


Configuration = TypeVar("Configuration", bound=BaseConfiguration)


def fill_env(configuration: Configuration, environ: Mapping[str, str]) -> Configuration:
    """The configuration with the values of variables that are given by name alone.

    Args:
        configuration: what will be submitted.
        environ: the environment of the program that submits it.

    Raises:
        ConfigurationError: one of them is not set there.
    """
    wanted = [name for name, value in configuration.env.items() if value is None]
    missing = [name for name in wanted if name not in environ]
    if missing:
        raise ConfigurationError(
            f"{type(configuration).__name__}: env: not set in your environment: {', '.join(missing)}. "
            f"Set it (export {missing[0]}=...), or give the value: env={{'{missing[0]}': '...'}}"
        )
    filled = {name: environ[name] if value is None else value for name, value in configuration.env.items()}
    return configuration.model_copy(update={"env": filled}) if wanted else configuration
