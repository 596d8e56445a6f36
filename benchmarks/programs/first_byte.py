"""Submits `echo`, and says when its first byte arrived; with a count above one, again and again."""

import json
import sys
import time

from dstack.api import Client, Task

samples = []
client = Client.from_config()
for _ in range(int(sys.argv[1])):
    start = time.perf_counter()
    run = client.runs.submit(Task(commands=["echo hi"]))
    logs = iter(run.logs())
    first = next(logs)
    samples.append(time.perf_counter() - start)
    if first + b"".join(logs) != b"hi\n":
        sys.exit(f"{run.name} printed something else")
print(json.dumps({"seconds": samples}))
