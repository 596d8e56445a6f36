"""A whole program with nothing running: ends with the first log byte, so that its own duration is the figure."""

import os

from dstack.api import Client, Task

run = Client.from_config().runs.submit(Task(commands=["echo hi"]))
first = next(iter(run.logs()))
os.write(1, b"[]\n" if first.startswith(b"h") else b"wrong output\n")
os._exit(0)
