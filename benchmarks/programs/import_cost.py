"""Executes the statement given, and says how long it took and how much memory the process has after it."""

import json
import sys
import time

start = time.perf_counter()
exec(sys.argv[1])  # noqa: S102  # the statement is this benchmark's own
seconds = time.perf_counter() - start

with open("/proc/self/status") as status:  # noqa: PTH123  # pathlib would be in the figure
    resident = next(int(line.split()[1]) for line in status if line.startswith("VmRSS:"))
print(json.dumps({"seconds": seconds, "megabytes": resident * 1024 / 1e6}))
