"""Plans and submits through peer dstack's own client, one after the other; runs in the peer's environment."""

import json
import sys
import time

from dstack.api import Client, Task

url, token, count = sys.argv[1], sys.argv[2], int(sys.argv[3])
client = Client.from_config(project_name="main", server_url=url, user_token=token)
samples = []
for _ in range(count):
    start = time.perf_counter()
    plan = client.runs.get_run_plan(Task(commands=["true"]))
    client.runs.apply_plan(plan, reserve_ports=False)
    samples.append(time.perf_counter() - start)
print(json.dumps({"seconds": samples}))
