"""Plans and submits, one after the other, to the backend given; says how long each took."""

import json
import sys
import time

from dstack.api import Client, Task, VirtualRepo

backend, count = sys.argv[1], int(sys.argv[2])
client, repo = Client.from_config(), VirtualRepo("none")
samples = []
for _ in range(count):
    start = time.perf_counter()
    plan = client.runs.get_plan(Task(commands=["true"]), repo, backends=[backend])
    client.runs.exec_plan(plan, repo, reserve_ports=False)
    samples.append(time.perf_counter() - start)
print(json.dumps({"seconds": samples}))
