"""A process of its own that creates an instance, so that it can be killed in the middle. Its order is JSON on stdin."""

from __future__ import annotations

import json
import sys
from importlib.metadata import EntryPoint

from dstack_core.plugin import InstanceRequest
from dstack_core.testing import _loading


def main() -> None:
    """Creates what the request says, and prints the answer."""
    order = json.loads(sys.stdin.readline())
    point = EntryPoint(order["entry"], order["value"], _loading.GROUP)
    info = _loading.info(point, order["backend"])
    config = info.config.model_validate({"type": info.name, **order["config"]})
    hooks = _loading.hooks_of(_loading.factory(info)(config))
    request = InstanceRequest.model_validate_json(order["request"])
    made = hooks.call("dstack_create_instance", backend=info.name, request=request)
    sys.stdout.write(made.model_dump_json() + "\n")
    sys.stdout.flush()
    # Whoever started this process kills it: an answer that was received and never stored.
    sys.stdin.readline()
    sys.stdout.close()


if __name__ == "__main__":
    main()
