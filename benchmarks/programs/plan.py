"""Plans against the backend given, again and again; says how long each took, and among how many offers it chose.

For a GPU of 24 GB, or with `any` for whatever there is.
"""

import json
import sys
import time

from dstack.api import GPU, Client, Resources, Task, VirtualRepo

client = Client.from_config()
task, repo = Task(commands=["true"]), VirtualRepo("none")
resources = Resources(cpu="1..", memory="0.5GB..") if "any" in sys.argv else Resources(gpu=GPU(memory="24GB"))
samples, total = [], 0
for _ in range(int(sys.argv[2])):
    start = time.perf_counter()
    plan = client.runs.get_plan(task, repo, backends=[sys.argv[1]], resources=resources)
    samples.append(time.perf_counter() - start)
    total = plan.job_plans[0].total_offers
print(json.dumps({"seconds": samples, "offers": total}))
