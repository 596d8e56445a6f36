"""The commands: thin, over the public API. What they show is in `tables`."""

from __future__ import annotations

import os
import sys
from typing import TYPE_CHECKING, Annotated

import typer

from dstack_core._cli.plugins import plugin

if TYPE_CHECKING:
    from collections.abc import Iterator

    from dstack_core._client.client import Client
    from dstack_core._client.run import Run
    from dstack_core._models.configurations import AnyConfiguration

app = typer.Typer(
    name="dstack",
    help="Runs tasks and services on whichever machines are cheapest and available.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    context_settings={"help_option_names": ["-h", "--help"]},
)
app.add_typer(plugin, name="plugin")

RunName = Annotated[str, typer.Argument(metavar="RUN", help="Name of the run.")]
Project = Annotated[
    str | None, typer.Option("--project", metavar="NAME", help="The project; the default one if not set.")
]
Yes = Annotated[bool, typer.Option("-y", "--yes", help="Do not ask.")]


def _client(project: str | None) -> Client:
    from dstack_core._client.client import Client

    return Client.from_config(project_name=project)


def _run(client: Client, name: str) -> Run:
    run = client.runs.get(name)
    if run is None:
        from dstack_core.errors import NotFoundError

        raise NotFoundError(f"There is no run '{name}' in project '{client.project}'. `dstack ps -a` shows all runs.")
    return run


def _confirm(question: str, yes: bool) -> None:
    """Asks beside the output, which may go to a file."""
    if yes:
        return
    print(f"{question} [y/N]: ", end="", file=sys.stderr, flush=True)
    answer = sys.stdin.readline()
    if not answer:
        print("\ndstack: Nobody is there to answer. Pass -y to say yes.", file=sys.stderr)
    if answer.strip().lower() not in {"y", "yes"}:
        raise typer.Exit(1)


@app.command(context_settings={"allow_extra_args": True, "ignore_unknown_options": True, "help_option_names": []})
def server(context: typer.Context) -> None:
    """Run a server here, in the foreground: on TCP, with a token. See dstack server --help."""
    os.execv(sys.executable, [sys.executable, "-P", "-m", "dstack_core._server", *context.args])  # noqa: S606  # no shell


@app.command()
def backends(
    check: Annotated[
        bool, typer.Option("--check", help="Also have each backend look at its credentials, permissions and network.")
    ] = False,
    project: Project = None,
) -> None:
    """Show which backends are installed and configured, and why one is not usable."""
    from dstack_core._cli.tables import show_backends

    with _client(project) as client:
        found = client.backends.installed(check=check)
    show_backends(found)
    if check and any(backend.problems for backend in found):
        raise typer.Exit(1)


@app.command()
def apply(
    file: Annotated[
        str | None, typer.Option("-f", "--file", metavar="FILE", help="What to run; .dstack.yml if not set.")
    ] = None,
    profile: Annotated[
        str | None, typer.Option("--profile", metavar="NAME", help="A profile of .dstack/profiles.yml.")
    ] = None,
    name: Annotated[str | None, typer.Option("-n", "--name", metavar="RUN", help="Name of the run.")] = None,
    detach: Annotated[bool, typer.Option("-d", "--detach", help="Submit, and do not wait for the end.")] = False,
    env: Annotated[
        list[str] | None,
        typer.Option("-e", "--env", metavar="KEY=VALUE", help="A variable of the run; KEY alone takes it from here."),
    ] = None,
    max_price: Annotated[float | None, typer.Option("--max-price", metavar="USD", help="The most, an hour.")] = None,
    backend: Annotated[
        list[str] | None, typer.Option("-b", "--backend", metavar="NAME", help="A backend that may be used.")
    ] = None,
    yes: Yes = False,
    project: Project = None,
) -> None:
    """Run what a file says, and follow it to its end. Ctrl+C stops it.

    Shows the plan first, and asks. The exit code is that of the run.
    """
    from dstack_core._cli.following import follow, say
    from dstack_core._cli.plans import can_start, show_plan
    from dstack_core._client.files import load_configuration, load_profile

    path, configuration = load_configuration(os.curdir, configuration_file=file)
    said = load_profile(os.curdir, profile)
    _add_variables(configuration, env or [])
    with _client(project) as client:
        plan = client.runs.get_plan(
            configuration,
            configuration_path=path,
            backends=backend or None,
            max_price=max_price,
            run_name=name,
            profile=said,
        )
        show_plan(plan, on_this_computer=client.client.on_this_computer)
        if not can_start(plan):
            say("dstack: No offer can run this now.")
            raise typer.Exit(1)
        _confirm("Submit it?", yes)
        run = client.runs.exec_plan(plan)
        if detach:
            say(f"{run.name} is submitted. To follow it: dstack attach {run.name}. To stop it: dstack stop {run.name}")
            run.detach()
            return
        raise typer.Exit(follow(client, run))


def _add_variables(configuration: AnyConfiguration, given: list[str]) -> None:
    """Puts the variables of the command line over those of the file."""
    if given:
        before = configuration.env
        # First alone: the model reads them, and refuses one that is given twice.
        configuration.env = given
        configuration.env = {**before, **configuration.env}


@app.command()
def init(
    path: Annotated[str, typer.Argument(metavar="[PATH]", help="The folder; this one if not set.")] = ".",
    local: Annotated[bool, typer.Option("--local", help="Bring the files along, even of a git repository.")] = False,
    git_identity: Annotated[
        str | None, typer.Option("--git-identity", metavar="FILE", help="A private key that may clone it.")
    ] = None,
    project: Project = None,
) -> None:
    """Make a folder known to the server as a repo, so that runs can bring its code."""
    with _client(project) as client:
        repo = client.repos.load(path, local=local, init=True, git_identity_file=git_identity)
    print(f"{path} is initialised as the repo {repo.repo_id}")


@app.command()
def ps(
    all: Annotated[bool, typer.Option("-a", "--all", help="Also runs that have ended.")] = False,
    project: Project = None,
) -> None:
    """List the active runs or, if there is none, the latest one."""
    from dstack_core._cli.tables import show_runs

    with _client(project) as client:
        runs = client.client.list_runs(client.project, all=all)
        published = client.client.services_url() if any(run.service for run in runs) else None
    show_runs(runs, published)


@app.command()
def logs(
    run_name: RunName,
    diagnose: Annotated[
        bool, typer.Option("-d", "--diagnose", help="Show what the server did about the run instead.")
    ] = False,
    replica: Annotated[int, typer.Option(min=0, help="Of a service with several replicas: which one.")] = 0,
    project: Project = None,
) -> None:
    """Print what a run printed and prints, until it ends. Ctrl+C leaves the run alone."""
    with _client(project) as client:
        _print(_run(client, run_name).logs(diagnose=diagnose, replica_num=replica))


@app.command()
def attach(
    run_name: RunName,
    ssh_identity: Annotated[
        str | None,
        typer.Option(
            "--ssh-identity",
            "-i",
            metavar="FILE",
            help="The private key for its machine; the one in the home folder if not set.",
        ),
    ] = None,
    project: Project = None,
) -> None:
    """Forward the ports of a run to this computer and print its output. Ctrl+C detaches; the run goes on.

    While a run on a cloud's machine is attached, `ssh RUN` in another terminal logs in where its job is.
    """
    from dstack_core._cli.following import ends_in_order, print_output, show_ways

    with ends_in_order(), _client(project) as client, _run(client, run_name) as run:
        try:
            attached = run.attach(ssh_identity)
            show_ways(run)
            print_output(client, run, run.check_attached)
        except KeyboardInterrupt:
            print(f"\nDetached; {run.name} goes on. To stop it: dstack stop {run.name}", file=sys.stderr)
            raise
        run.refresh()
        if run.message:
            print(run.message, file=sys.stderr)
        raise typer.Exit(0 if attached and run.status.value == "done" else 1)


@app.command()
def stop(
    run_name: RunName,
    abort: Annotated[
        bool, typer.Option("-x", "--abort", help="Kill it at once, without time to end by itself.")
    ] = False,
    yes: Yes = False,
    project: Project = None,
) -> None:
    """Stop a run."""
    with _client(project) as client:
        run = _run(client, run_name)
        if run.status.is_finished:
            print(f"{run.name} has ended already: {run.status.value}")
            return
        _confirm(f"Stop the run {run.name}?", yes)
        run.stop(abort=abort)
    print(f"{run.name} is being stopped")


@app.command()
def delete(run_name: RunName, yes: Yes = False, project: Project = None) -> None:
    """Delete a run that has ended, and its output."""
    with _client(project) as client:
        run = _run(client, run_name)
        _confirm(f"Delete the run {run.name} and its output?", yes)
        client.client.delete_runs(client.project, [run.name])
    print(f"{run.name} was deleted")


@app.command()
def doctor(
    fix: Annotated[bool, typer.Option("--fix", help="End the instances that should not be there.")] = False,
    confirm_restore: Annotated[
        bool,
        typer.Option(
            "--confirm-restore",
            help="Say that the server's database, restored from a copy, is the only one: what it does not know of its "
            "instances may be ended.",
        ),
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print what was found as JSON.")] = False,
    yes: Yes = False,
    project: Project = None,
) -> None:
    """Show which instances there are in all clouds, and what is wrong with them.

    The exit code is 1 if something needs a person.
    """
    from dstack_core._cli.doctor import ask_for, ids_of, show_fixed, show_report

    with _client(project) as client:
        report = client.client.examine(client.project)
        if confirm_restore and report.restored_since is not None:
            show_report(report, stderr=True)
            _confirm("Is this database the only one of its runs, and may what it does not know be ended?", yes)
            client.client.confirm_restore(client.project)
            report = client.client.examine(client.project)
        orphans = [one for one in report.instances if one.is_orphan and not one.ending]
        if fix and orphans:
            show_report(report, stderr=True)
            _confirm(ask_for(orphans), yes)
            show_fixed(client.client.fix(client.project, ids_of(orphans)))
            report = client.client.examine(client.project)
    if as_json:
        print(report.model_dump_json(indent=2))
    else:
        show_report(report)
    if report.problems:
        raise typer.Exit(1)


@app.command()
def version() -> None:
    """Show the version of this client."""
    from dstack_core import __version__

    print(f"dstack-core {__version__}")


def _print(chunks: Iterator[bytes]) -> None:
    for chunk in chunks:
        sys.stdout.buffer.write(chunk)
        sys.stdout.buffer.flush()
