"""The command `dstack`.

Start-up is what a person at a terminal waits for: the commands import what they need when they run.
"""

from __future__ import annotations

import sys


def main() -> None:
    """Runs the command line, and turns errors into a message and an exit code."""
    try:
        from dstack_core._cli.app import app
        from dstack_core.errors import DstackError

        try:
            app()
        except DstackError as error:
            sys.stdout.flush()
            print(f"dstack: {error}", file=sys.stderr)
            sys.exit(1)
    except KeyboardInterrupt as interrupt:
        # What became of a run that was being submitted.
        print(*getattr(interrupt, "__notes__", ()), sep="\n", end="", file=sys.stderr)
        sys.exit(130)
