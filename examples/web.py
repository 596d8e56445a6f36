"""Serves a page from a task, fetches it here through the forwarded port, and stops the task."""

import sys
import time
import urllib.error
import urllib.request

from dstack.api import Client, Task

PORT = 8642


def fetch(url: str, patience: float = 60.0) -> str:
    """The page, as soon as the server in the task answers: "running" means started, not yet listening."""
    deadline = time.monotonic() + patience
    while True:
        try:
            with urllib.request.urlopen(url, timeout=10) as answer:
                return str(answer.read().decode())
        except (urllib.error.URLError, ConnectionError):
            if time.monotonic() > deadline:
                raise
            time.sleep(0.1)


def main() -> int:
    """Runs the web server for as long as it takes to read one page."""
    task = Task(
        commands=[
            "echo '<h1>Hello from a task</h1>' > index.html",
            f"exec {sys.executable} -m http.server {PORT}",
        ],
        ports=[f"*:{PORT}"],  # any free port here, this one there
    )
    run = Client.from_config().runs.submit(task)
    try:
        if not run.attach():
            print(b"".join(run.logs()).decode(errors="replace"))
            return 1
        assert run.ports, "an attached run has its ports"
        url = f"http://127.0.0.1:{run.ports[PORT]}/"
        print(url)
        print(fetch(url), end="")
    finally:
        run.stop()
        run.detach()
    return 0


if __name__ == "__main__":
    sys.exit(main())
