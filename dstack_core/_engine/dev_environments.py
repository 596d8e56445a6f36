"""What a dev environment runs: its `init` commands, then a text that says how to open it, then nothing until it ends.

The text is written by the job itself, as only there all is known: the folder it runs in, the name of its container
(the agent sets `DSTACK_CONTAINER` and its kin), and whether the machine is reached over SSH (`DSTACK_SSH_HOST`).
All of it is for `sh`, without other programs than `sleep`.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from shlex import quote
from typing import Any

from dstack_core._models.configurations import DevEnvironment
from dstack_core._models.instances import Endpoint
from dstack_core._models.runs import JobSpec
from dstack_core._transport import AgentJobSpec
from dstack_core.errors import ConfigurationError

SSH_HOST = "DSTACK_SSH_HOST"
"""Variable of a job whose machine is reached over SSH: the name to log in under."""

_REMEMBER = "dstack_folder=$PWD"
# By this very line the agent knows that the `init` commands are done. It ends at once on SIGTERM.
_STAY = "exec sleep 2147483647"

_OPEN = """\
dstack_encoded() (
LC_ALL=C rest=$1
while [ -n "$rest" ]; do
one=${rest%"${rest#?}"} rest=${rest#?}
case $one in [A-Za-z0-9/._~-]) printf %s "$one";; [\\ -~]) printf %%%02X "'$one";; *) printf %s "$one";; esac
done
)
dstack_line() { printf '  %-@WIDTH@s  %s\\n' "$1" "$2"; }
folder=$dstack_folder quoted=$dstack_folder uri=$(dstack_encoded "$dstack_folder")
case $folder in *\\'*) quoted="\\"$folder\\"";; *[!A-Za-z0-9/._~-]*) quoted="'$folder'";; esac
printf '\\n%s is ready. Its folder is %s\\n\\n' @NAME@ "$folder"
if [ -n "${DSTACK_SSH_HOST-}" ]; then
@THERE@
elif [ -n "${DSTACK_CONTAINER-}" ]; then
@INSIDE@
[ "$DSTACK_CONTAINER_ENGINE" != podman ] || @PODMAN@
else
@HERE@
fi
[ -z "${VIRTUAL_ENV-}" ] || dstack_line Python: "$VIRTUAL_ENV/bin/python"
printf '\\n%s\\n' @NOTES@"""


_PODMAN = "dstack_line 'Before that:' 'set dev.containers.dockerPath to podman in its settings'"
_GOES = "What is in its folder goes with it: push it, or copy it, before that."


@dataclass(frozen=True, slots=True)
class _Ide:
    """An IDE as the text names it, its URI scheme, its command, and whether it is of VS Code's family."""

    title: str
    scheme: str
    command: str
    is_vscode: bool = True
    attaches_to_containers: bool = False


_IDES = {
    "vscode": _Ide("VS Code", "vscode", "code", attaches_to_containers=True),
    "cursor": _Ide("Cursor", "cursor", "cursor", attaches_to_containers=True),
    "windsurf": _Ide("Windsurf", "windsurf", "windsurf"),
    "zed": _Ide("Zed", "zed", "zed", is_vscode=False),
}


def what_runs(configuration: DevEnvironment, max_duration: int | None, run_name: str) -> dict[str, Any]:
    """The fields of a `JobSpec` that are different for a dev environment.

    Args:
        configuration: what the user wrote.
        max_duration: seconds after which it is stopped in any case; `None` for no limit.
        run_name: for the text.

    Raises:
        ConfigurationError: a field that this version cannot carry out.
    """
    _refuse(configuration)
    inactivity = configuration.inactivity_duration
    limit = inactivity if isinstance(inactivity, int) else None
    init = [command for command in (*configuration.setup, *configuration.init) if command.strip()]
    notes = [_limits(limit, max_duration, run_name), *([] if _keeps_its_folder(configuration) else [_GOES])]
    text = _text(configuration.ide, run_name, "\n".join(notes))
    return {
        "commands": (_REMEMBER, *init, text, _STAY),
        "ide": configuration.ide,
        "inactivity_duration": limit,
    }


def _refuse(configuration: DevEnvironment) -> None:
    """What a person wrote is carried out or refused, never passed over."""
    if configuration.entrypoint is not None:
        raise ConfigurationError(
            "DevEnvironment: 'entrypoint' has no use: what runs is a shell. Put commands into 'init', "
            "and choose the shell with 'shell'."
        )
    if configuration.version is not None:
        raise ConfigurationError(
            "DevEnvironment: 'version' is not carried out by this version: your IDE brings what it needs by itself. "
            "Remove it to run this."
        )


def _keeps_its_folder(configuration: DevEnvironment) -> bool:
    return configuration.image is None and (configuration.working_dir or "").startswith("/")


def reached_by(endpoint: Endpoint, spec: JobSpec, told: AgentJobSpec) -> AgentJobSpec:
    """What the agent is told, with the name that the job's machine is reached under, if that is by SSH."""
    if endpoint.ssh_host is None:
        return told
    run_name = spec.job_name.removesuffix(f"-{spec.replica_num}-{spec.job_num}")
    return replace(told, env={**told.env, SSH_HOST: run_name})


def unused(limit: int | None) -> str:
    """Why a dev environment ended that nobody used, for people."""
    return (
        f"nobody was at work in it for {_duration(limit or 0)} (inactivity_duration). Submit it again to go on; "
        "a longer inactivity_duration, or 'off', keeps it longer"
    )


# ---------------------------------------------------------------------------------------------------------------------
# The text
# ---------------------------------------------------------------------------------------------------------------------


def _text(ide: str | None, run_name: str, notes: str) -> str:
    """A shell command that prints how to open the dev environment."""
    known = _IDES[ide] if ide is not None else None
    places = {"@HERE@": _here(known), "@INSIDE@": _inside(known), "@THERE@": _there(known)}
    titles = [title for lines in places.values() for title, _ in lines]
    script = _OPEN.replace("@WIDTH@", str(max(map(len, titles)) + 1))
    for place, lines in places.items():
        script = script.replace(place, "\n".join(f'dstack_line {quote(title + ":")} "{what}"' for title, what in lines))
    script = script.replace("@PODMAN@", _PODMAN if known is not None and known.attaches_to_containers else ":")
    return script.replace("@NAME@", quote(run_name)).replace("@NOTES@", quote(notes))


_Lines = list[tuple[str, str]]
"""What to call a way in, and how it is written; `$folder`, `$quoted` and `$uri` are the folder."""


def _here(ide: _Ide | None) -> _Lines:
    """For a process on this computer."""
    if ide is None:
        return [("Go there", "cd $quoted")]
    return [(f"Open in {ide.title}", f"{ide.scheme}://file$uri"), ("or in a terminal", f"{ide.command} $quoted")]


def _inside(ide: _Ide | None) -> _Lines:
    """For a container on this computer."""
    lines = list(_attached(ide)) if ide is not None else []
    return [*lines, ("Shell in it", "$DSTACK_CONTAINER_ENGINE exec -it $DSTACK_CONTAINER sh")]


def _attached(ide: _Ide) -> Iterator[tuple[str, str]]:
    if ide.attaches_to_containers:
        yield f"Open in {ide.title}", f"{ide.scheme}://vscode-remote/$DSTACK_CONTAINER_AUTHORITY$uri"
        remote = "vscode-remote://$DSTACK_CONTAINER_AUTHORITY$uri"
        yield "or in a terminal", f"{ide.command} --folder-uri {remote}"
    elif ide.is_vscode:
        yield f"Open in {ide.title}", "Dev Containers: Attach to Running Container, $DSTACK_CONTAINER"


def _there(ide: _Ide | None) -> _Lines:
    """For a machine that is reached over SSH, under the name that attaching gives it."""
    first = ("First, and keep it open", f"dstack attach ${SSH_HOST}")
    login = ("Shell in it", f"ssh ${SSH_HOST}")
    if ide is None:
        return [first, login]
    if not ide.is_vscode:
        uri, command = f"zed://ssh/${SSH_HOST}$uri", f"zed ssh://${SSH_HOST}$uri"
    else:
        uri = f"{ide.scheme}://vscode-remote/ssh-remote+${SSH_HOST}$uri"
        command = f"{ide.command} --remote ssh-remote+${SSH_HOST} $quoted"
    return [first, (f"Open in {ide.title}", uri), ("or in a terminal", command), login]


def _limits(inactivity: int | None, max_duration: int | None, run_name: str) -> str:
    ends = [f"after {_duration(inactivity)} without anybody at work"] if inactivity is not None else []
    ends += [f"after {_duration(max_duration)} in any case"] if max_duration is not None else []
    by_itself = f"\nIt ends by itself {', and '.join(ends)}." if ends else ""
    return f"It runs until you stop it: dstack stop {run_name}{by_itself}"


def _duration(seconds: int) -> str:
    """As people say it: `90 s`, `2 h`."""
    for unit, size in (("d", 86400), ("h", 3600), ("min", 60)):
        if seconds and seconds % size == 0:
            return f"{seconds // size} {unit}"
    return f"{seconds} s"
