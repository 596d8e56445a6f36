"""Tasks on machines that boot, so many at once; says when the first byte of each arrived, and on which machine."""

import json
import sys
import time
from concurrent.futures import ThreadPoolExecutor

from dstack.api import Client, Profile, Run, Task

SMALL = Profile(name="one", instance_types=["small"], spot_policy="on-demand")


def follow(run: Run) -> tuple[str, float]:
    """What a task printed: the name of its machine; and when that began to arrive."""
    logs = iter(run.logs())
    first = next(logs, b"")
    at = time.time()
    said = (first + b"".join(logs)).decode().strip()
    if not said:
        sys.exit(f"{run.name} printed nothing:\n{b''.join(run.logs(diagnose=True)).decode()}")
    return said, at


client = Client.from_config()
count = int(sys.argv[1])
runs = [
    client.runs.submit(Task(commands=["hostname"]), backends=["nimbus"], profile=SMALL, run_name=f"bench-{n}")
    for n in range(count)
]
with ThreadPoolExecutor(count) as pool:
    followed = list(pool.map(follow, runs))
print(json.dumps({"first": dict(followed)}))
