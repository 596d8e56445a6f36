"""Sends a folder of 10,000 files to the server: the first time, and again and again without a change."""

import json
import sys
import time
from pathlib import Path

from dstack.api import Client, LocalRepo
from dstack_core._client.code.uploading import upload


def make(folder: Path, count: int) -> None:
    """Writes files as those of a large program: 100 to a folder, of 1 to 20 kB, and rules for what stays at home."""
    for number in range(count):
        place = folder / f"package{number // 100}" / "module"
        place.mkdir(parents=True, exist_ok=True)
        line = f"value_{number} = {number}\n"
        (place / f"file{number}.py").write_text(line * (1 + number % 20 * 1000 // len(line)))
    (folder / ".gitignore").write_text("*.pyc\n__pycache__/\n.venv/\nbuild/\ndist/\n*.log\n/data/**\n!keep.log\n")


def timed(client: Client, folder: Path) -> float:
    """Seconds until the server has it all, the look through the folder included."""
    start = time.perf_counter()
    upload(client.client, "main", LocalRepo(repo_dir=folder))
    return time.perf_counter() - start


folder, repeat = Path(sys.argv[1]), int(sys.argv[2])
make(folder, 10_000)
client = Client.from_config()
client.runs.list()
first = timed(client, folder)
print(json.dumps({"first": first, "again": [timed(client, folder) for _ in range(repeat)]}))
