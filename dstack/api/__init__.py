"""The Python API: submit runs, follow them, stop them.

    from dstack.api import Client, Task

    run = Client.from_config().runs.submit(Task(commands=["echo Hello"]))
    for log in run.logs():
        print(log.decode(), end="")

Names are loaded when they are first used: this module costs little more than pydantic.
"""

from importlib import import_module as _import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from dstack_core._client.backends import Backend, BackendCollection
    from dstack_core._client.client import Client
    from dstack_core._client.code.repos import LocalRepo, RemoteRepo
    from dstack_core._client.output import LogsDroppedWarning
    from dstack_core._client.repos import RepoCollection
    from dstack_core._client.run import Run, SubmittedRun
    from dstack_core._client.runs import RunCollection
    from dstack_core._models.configurations import DevEnvironment, RegistryAuth, Service, Task
    from dstack_core._models.profiles import Profile, RetryPolicy, SpotPolicy
    from dstack_core._models.repos import VirtualRepo
    from dstack_core._models.resources import CPU, GPU, Disk, Memory, Range, Resources
    from dstack_core._models.runs import RunStatus
    from dstack_core.errors import (
        AttachError,
        BackendNotInstalledError,
        ClientError,
        ConfigurationError,
        DstackError,
        NoOffersError,
        NotFoundError,
        PortUsedError,
        RunNameTakenError,
        ServerClientError,
        ServerUnavailableError,
        VersionMismatchError,
    )

__all__ = [  # noqa: RUF022  # in plain order, as dir() shows them
    "AttachError",
    "Backend",
    "BackendCollection",
    "BackendNotInstalledError",
    "CPU",
    "Client",
    "ClientError",
    "ConfigurationError",
    "DevEnvironment",
    "Disk",
    "DstackError",
    "GPU",
    "LocalRepo",
    "LogsDroppedWarning",
    "Memory",
    "NoOffersError",
    "NotFoundError",
    "PortUsedError",
    "Profile",
    "Range",
    "RegistryAuth",
    "RemoteRepo",
    "RepoCollection",
    "Resources",
    "RetryPolicy",
    "Run",
    "RunCollection",
    "RunNameTakenError",
    "RunStatus",
    "ServerClientError",
    "ServerUnavailableError",
    "Service",
    "SpotPolicy",
    "SubmittedRun",
    "Task",
    "VersionMismatchError",
    "VirtualRepo",
]

# Where each name lives. `dstack_core.errors` is a door of its own, so errors keep its name.
_HOMES = {
    "_client.backends": ("Backend", "BackendCollection"),
    "_client.client": ("Client",),
    "_client.code.repos": ("LocalRepo", "RemoteRepo"),
    "_client.output": ("LogsDroppedWarning",),
    "_client.repos": ("RepoCollection",),
    "_client.run": ("Run", "SubmittedRun"),
    "_client.runs": ("RunCollection",),
    "_models.configurations": ("DevEnvironment", "RegistryAuth", "Service", "Task"),
    "_models.profiles": ("Profile", "RetryPolicy", "SpotPolicy"),
    "_models.repos": ("VirtualRepo",),
    "_models.resources": ("CPU", "GPU", "Disk", "Memory", "Range", "Resources"),
    "_models.runs": ("RunStatus",),
}
_HOME_OF = {name: home for home, names in _HOMES.items() for name in names}

if not TYPE_CHECKING:
    # Type checkers see the imports above, and so that no other name exists.
    def __getattr__(name: str) -> object:
        if name not in __all__:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        home = _HOME_OF.get(name, "errors")
        found = getattr(_import_module(f"dstack_core.{home}"), name)
        if home != "errors":
            found.__module__ = __name__
        globals()[name] = found
        return found

    def __dir__() -> list[str]:
        return __all__
