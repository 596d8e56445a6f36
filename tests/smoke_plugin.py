"""Run by `nox -s plugin` where only wheels are installed: a package of `dstack plugin new` is found, and runs a task.

`python -I tests/smoke_plugin.py FOLDER`, with a folder to use. The package is `dstack-nimbus`.
"""

from __future__ import annotations

import os
import subprocess
import sys
import sysconfig
from pathlib import Path

CONFIG = "projects: [{{name: main, backends: [{{type: nimbus, url: '{url}', token: '{token}'}}]}}]"


def main(folder: Path) -> None:
    """What its author does after the tests."""
    import dstack_nimbus

    from dstack_core.testing import NimbusServer, wait_until

    assert Path(dstack_nimbus.__file__).is_relative_to(sys.prefix), f"not the wheel: {dstack_nimbus.__file__}"
    home = folder / "home"
    os.environ.update(HOME=str(home), DSTACK_HOME=str(home / "dstack"), DSTACK_SERVER_IDLE_SECONDS="1")
    (home / "dstack" / "server").mkdir(parents=True)
    os.chdir(home)
    assert "not configured" in line_of("nimbus", output("backends"))
    with NimbusServer(agents=folder / "agents") as nimbus:
        config = CONFIG.format(url=nimbus.url, token=nimbus.token)
        (home / "dstack" / "server" / "config.yml").write_text(config)
        assert " configured" in line_of("nimbus", output("backends", "--check"))
        (home / ".dstack.yml").write_text("type: task\ncommands: [echo hi]\n")
        assert output("apply", "--yes", "--backend", "nimbus") == "hi\n"
        wait_until(
            lambda: [server.billed for server in nimbus.truth().servers] == [False], what="the end of one server"
        )
        assert not nimbus.truth().leftovers


def line_of(name: str, table: str) -> str:
    """The line of a table that begins with a name."""
    found = [line for line in table.splitlines() if line.split()[0] == name]
    assert len(found) == 1, table
    return found[0]


def output(*arguments: str) -> str:
    """What the command `dstack` prints."""
    command = Path(sysconfig.get_path("scripts")) / "dstack"
    return subprocess.run([command, *arguments], stdout=subprocess.PIPE, text=True, check=True, timeout=120).stdout


if __name__ == "__main__":
    main(Path(sys.argv[1]))
