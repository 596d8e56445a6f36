"""Submits many tasks at once from many threads, and waits for all of them."""

import collections
import json
import sys
import time
from concurrent.futures import ThreadPoolExecutor

from dstack.api import Client, Task

count = int(sys.argv[1])
client = Client.from_config()


def one(number: int) -> tuple[str, bool]:
    """Submits one task and reads what it prints: its final status, and whether the output was its own."""
    run = client.runs.submit(Task(commands=[f"echo {number}"]), reserve_ports=False)
    right = b"".join(run.logs()) == b"%d\n" % number
    run.refresh()
    return run.status.value, right


start = time.perf_counter()
with ThreadPoolExecutor(count) as pool:
    ends = list(pool.map(one, range(count)))
seconds = time.perf_counter() - start
statuses = collections.Counter(status for status, _ in ends)
print(json.dumps({"seconds": seconds, "ends": statuses, "right": sum(right for _, right in ends)}))
