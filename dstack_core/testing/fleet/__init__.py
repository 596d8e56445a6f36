"""Real machines for tests, on one computer: containers that boot, with systemd, cloud-init and sshd.

- `_fleet`: where machines come from; `_machine`: one of them, and what becomes of it
- `_image` and `recipe/`: what they are made from
- `_daemon`, `_docker`: the container engine, found or started, and the way to it
- `_network`: cutting them off; `_reaper`: what removes them when nobody else does

`python -m dstack_core.testing.fleet` builds the images ahead, and says where they are.
"""

from __future__ import annotations

from dstack_core.testing.fleet._daemon import FleetUnavailable
from dstack_core.testing.fleet._docker import MachineResult
from dstack_core.testing.fleet._fleet import Fleet
from dstack_core.testing.fleet._machine import Machine

__all__ = ["Fleet", "FleetUnavailable", "Machine", "MachineResult"]

for _public in __all__:
    globals()[_public].__module__ = "dstack_core.testing"
