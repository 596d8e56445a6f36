"""`dstack plugin`: for people who write backends."""

from __future__ import annotations

from typing import Annotated

import typer

plugin = typer.Typer(help="Make a backend of your own.", no_args_is_help=True, rich_markup_mode=None)


@plugin.callback()
def _group() -> None:
    """Keeps `new` a word of its own while it is the only command."""


@plugin.command()
def new(
    name: Annotated[str, typer.Argument(metavar="NAME", help="Name of the backend, as users write it: 'nimbus'.")],
    title: Annotated[
        str | None, typer.Option("--title", metavar="TEXT", help="Its name for people; made from NAME if not set.")
    ] = None,
    directory: Annotated[
        str | None, typer.Option("--directory", metavar="DIR", help="Where to write; ./dstack-NAME if not set.")
    ] = None,
) -> None:
    """Write a package with a backend that works.

    It is for an example cloud, until you put yours in its place. It installs, shows up in `dstack backends`, and passes
    the conformance suite as it is. No file is overwritten.
    """
    from pathlib import Path

    from dstack_core._cli.scaffold import Package

    package = Package.of(name, title)
    folder = Path(directory) if directory is not None else Path(package.distribution)
    package.write(folder)
    print(package.report(folder))
