"""Submits a service of `replica.py`, and says where it is once all replicas listen: `serve.py REPLICAS FILE`."""

import json
import sys
import time
from pathlib import Path

from dstack.api import Client, Service

count, file = int(sys.argv[1]), Path(sys.argv[2])
program = Path(__file__).with_name("replica.py")
service = Service(port=8000, commands=[f"exec {sys.executable} {program} {file}"], replicas=count, stop_duration=1)
run = Client.from_config().runs.submit(service)
run.wait_until_ready(timeout=120)
while not file.exists() or len(file.read_text().splitlines()) < count:
    time.sleep(0.02)
run.refresh()
print(json.dumps({"url": run.url}))
