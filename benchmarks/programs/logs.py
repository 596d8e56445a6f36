"""Reads a task that prints as much as it can, compares every byte, and says how long it took from the first one on."""

import json
import sys
import time

from dstack.api import Client, Task

LINE = b"The quick brown fox jumps over the lazy dog, again and again, until the spool is full and nothing is lost.\n"
PATTERN = LINE * (4_000_000 // len(LINE))

size = int(sys.argv[1])
run = Client.from_config().runs.submit(Task(commands=[f"yes '{LINE.decode().rstrip()}' | head -c {size}"]))
read, wrong, start = 0, 0, 0.0
for chunk in run.logs():
    start = start or time.perf_counter()
    at = read % len(LINE)
    while chunk:
        part, chunk = chunk[: len(PATTERN) - at], chunk[len(PATTERN) - at :]  # noqa: PLW2901  # peeled off piece by piece
        wrong += part != PATTERN[at : at + len(part)]
        read += len(part)
        at = 0
seconds = time.perf_counter() - start
print(json.dumps({"seconds": seconds, "bytes": read, "wrong": wrong}))
