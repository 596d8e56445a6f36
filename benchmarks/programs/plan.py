"""Plans against the backend given, again and again; says how long each took, and among how many offers it chose."""

import json
import sys
import time

from dstack.api import GPU, Client, Resources, Task, VirtualRepo

client = Client.from_config()
task, repo, resources = Task(commands=["true"]), VirtualRepo("none"), Resources(gpu=GPU(memory="24GB"))
samples, total = [], 0
for _ in range(int(sys.argv[2])):
    start = time.perf_counter()
    plan = client.runs.get_plan(task, repo, backends=[sys.argv[1]], resources=resources)
    samples.append(time.perf_counter() - start)
    total = plan.job_plans[0].total_offers
print(json.dumps({"seconds": samples, "offers": total}))
