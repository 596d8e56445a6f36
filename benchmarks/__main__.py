"""`python -m benchmarks`: measures everything, prints the table, fails when a floor was missed."""

from __future__ import annotations

import argparse
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from benchmarks import peers
from benchmarks.amazon import amazon
from benchmarks.booted import cloud_of_machines, seconds_added
from benchmarks.measure import (
    Import,
    idle_cpu_percent,
    import_costs,
    median,
    percentile,
    resident_mb,
    run_program,
    terminal_speed,
)
from benchmarks.ours import PYTHON, new_home
from benchmarks.proxied import killed_under_load, load, proxied
from benchmarks.table import Row, print_table, write_json
from dstack_core.testing import FleetUnavailable

GIB = 1 << 30
ROOT = Path(__file__).parent.parent


def imports(quick: bool) -> Iterator[Row]:
    """What a program pays before its first line."""
    with peers.new_home() as home:
        env = peers.isolated(home)
        subjects = {peer.name: Import(peer.python, peer.statement, env) for peer in peers.PEERS}
        subjects["pydantic"] = Import(PYTHON, "from pydantic import BaseModel", {})
        subjects["ours"] = Import(PYTHON, "from dstack.api import Client, Task", {})
        costs = import_costs(subjects, 5 if quick else 15)
    milliseconds, megabytes = costs.pop("ours")
    yield Row(
        what="import of the client, median",
        ours=milliseconds,
        unit="ms",
        floor=costs["dstack"][0] / 5,
        aim=costs["pydantic"][0] * 1.5,
        because="1/5 of dstack; 1.5 x pydantic",
        peers={name: cost[0] for name, cost in costs.items()},
    )
    figures = {name: cost[1] for name, cost in costs.items()}
    yield Row(what="memory after import", ours=megabytes, unit="MB", floor=45, peers=figures)


def cold(quick: bool) -> Iterator[Row]:
    """Nothing running: from the start of the program to the first byte of its task."""
    repeat = 3 if quick else 7
    ours = [timed_cold_start() for _ in range(repeat)]
    starts = [peer_start(warm=False) for _ in range(1 if quick else 3)]
    yield Row(
        what="cold start to first log byte, median",
        ours=median(ours),
        unit="s",
        floor=min(2.0, median(starts) / 5),
        aim=1.0,
        because="2 s and 1/5 of dstack's server start",
        peers={"dstack (to healthy)": median(starts), "dstack (again)": peer_start(warm=True)},
    )


def timed_cold_start() -> float:
    """Seconds of a whole program, interpreter start included, on an empty home."""
    with new_home() as home:
        start = time.monotonic()
        home.run("cold.py")
        return time.monotonic() - start


def peer_start(warm: bool) -> float:
    """Seconds from start to healthy of the peer's server, on an empty home or on one that it has prepared before."""
    with peers.new_home() as home:
        if warm:
            with peers.dstack_server(home):
                pass
        with peers.dstack_server(home) as server:
            return server.seconds_to_healthy


def warm(quick: bool) -> Iterator[Row]:
    """The server is there: from submit to the first byte."""
    with new_home() as home:
        home.run("first_byte.py", "3")
        samples = home.run("first_byte.py", str(50 if quick else 300))["seconds"]
    yield Row(what="submit to first log byte, median", ours=median(samples) * 1000, unit="ms", floor=150, aim=50)
    yield Row(
        what="submit to first log byte, p99", ours=percentile(samples, 0.99) * 1000, unit="ms", floor=400, aim=200
    )


def rate(quick: bool) -> Iterator[Row]:
    """Plan and submit, one after the other; as at the peer, nothing is there to run them."""
    count = 100 if quick else 500
    with new_home() as home:
        home.run("rate.py", "bench", "5")
        nothing_runs = home.run("rate.py", "bench", str(count))["seconds"]
    with new_home() as home:
        home.run("rate.py", "local", "5")
        all_run = home.run("rate.py", "local", str(count // 5))["seconds"]
    theirs = peer_rate(20 if quick else 60)
    yield Row(
        what="plan + submit, one after the other",
        ours=len(nothing_runs) / sum(nothing_runs),
        unit="1/s",
        floor=20 * theirs,
        aim=50 * theirs,
        because="20 x, 50 x dstack",
        peers={"dstack": theirs},
        more_is_better=True,
    )
    yield Row(
        what="plan + submit while each task runs here",
        ours=len(all_run) / sum(all_run),
        unit="1/s",
        more_is_better=True,
        peers={"dstack (nothing runs)": theirs},
    )


def peer_rate(count: int) -> float:
    """Plans and submits per second at the peer, by its own client."""
    with peers.new_home() as home, peers.dstack_server(home) as server:
        args = (peers.DSTACK.python, "peer_dstack_rate.py", server.url, peers.TOKEN)
        env = peers.isolated(home)
        run_program(*args, "3", env=env)
        samples = run_program(*args, str(count), env=env)["seconds"]
        return len(samples) / float(sum(samples))


def burst(quick: bool) -> Iterator[Row]:
    """Many at once: none is lost, and each has its own output."""
    count = 50 if quick else 200
    with new_home() as home:
        home.run("first_byte.py", "1")
        result = home.run("burst.py", str(count))
    done = min(result["ends"].get("done", 0), result["right"])
    what = f"{count} tasks at once, finished with their own output"
    yield Row(what=what, ours=done, unit="tasks", floor=count, more_is_better=True)
    yield Row(what=f"{count} tasks at once, until the last byte", ours=result["seconds"], unit="s")


def plan(quick: bool) -> Iterator[Row]:
    """A plan over 100,000 offers, asked for by a client: the way there and back is in the figure."""
    with new_home(shapes=1000, regions=100) as home:
        home.run("plan.py", "bench", "3")
        result = home.run("plan.py", "bench", str(50 if quick else 200))
    what = f"plan over 100,000 offers ({result['offers']:,} fit), median"
    yield Row(what=what, ours=median(result["seconds"]) * 1000, unit="ms", floor=20, aim=10)


def amazon_plan(quick: bool) -> Iterator[Row]:
    """A plan over all that Amazon sells, read from the cache on the disk by a server that was just started."""
    with amazon() as (home, count):
        first = home.run("plan.py", "aws", "1")["seconds"][0]
        few = home.run("plan.py", "aws", str(50 if quick else 200))
        home.run("plan.py", "aws", "1", "any")
        every = home.run("plan.py", "aws", str(50 if quick else 200), "any")
    of = f"of {count:,} of Amazon"
    yield Row(what=f"first plan over {few['offers']:,} {of}, server and SDK cold", ours=first * 1000, unit="ms")
    for result in (few, every):
        what = f"plan over {result['offers']:,} {of}, cache warm, median"
        yield Row(what=what, ours=median(result["seconds"]) * 1000, unit="ms", floor=30)


def logs(quick: bool) -> Iterator[Row]:
    """A task that prints as fast as it can, read by a client that compares every byte."""
    size = GIB // 8 if quick else GIB
    with new_home() as home:
        home.run("logs.py", str(16 << 20))
        pid = home.server_pid
        before = resident_mb(pid)
        with peak_memory(pid) as peak:
            result = home.run("logs.py", str(size))
    if result["bytes"] != size or result["wrong"]:
        sys.exit(f"logs: {result['bytes']:,} of {size:,} bytes arrived, {result['wrong']} pieces differ")
    limit = median(terminal_speed(GIB // 4) for _ in range(3))
    yield Row(
        what=f"logs, {size >> 20} MiB to the client",
        ours=result["bytes"] / result["seconds"] / 1e6,
        unit="MB/s",
        floor=min(100, limit * 0.8),
        aim=200,
        because="100 MB/s, or 0.8 x what a terminal moves on a slow machine",
        peers={"a bare terminal, nothing kept": limit},
        more_is_better=True,
    )
    yield Row(
        what="server memory at its peak while they stream, over before", ours=peak[0] - before, unit="MB", floor=32
    )


class peak_memory:  # noqa: N801  # used as a context manager
    """Watches the memory of a process: the list has its peak so far in MB."""

    def __init__(self, pid: int) -> None:
        self._pid, self._stop, self._peak = pid, threading.Event(), [0.0]
        self._thread = threading.Thread(target=self._watch, daemon=True)

    def __enter__(self) -> list[float]:
        self._thread.start()
        return self._peak

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()

    def _watch(self) -> None:
        while not self._stop.wait(0.05):
            self._peak[0] = max(self._peak[0], resident_mb(self._pid))


def upload(quick: bool) -> Iterator[Row]:
    """A folder of 10,000 files, from the look through it to the server's word that it has it all."""
    with new_home() as home:
        result = home.run("upload.py", str(home.path / "code"), "5" if quick else "25")
    yield Row(what="10,000 files to the server, the first time", ours=result["first"], unit="s")
    again = median(result["again"])
    yield Row(what="10,000 files to the server, unchanged, median", ours=again, unit="s", floor=1.0, aim=0.3)


def idle(quick: bool) -> Iterator[Row]:
    """A server with nothing to do, after its first run."""
    with new_home() as home:
        home.run("first_byte.py", "1")
        ours = settle(home.server_pid, quick)
    with peers.new_home() as folder, peers.dstack_server(folder) as server:
        theirs = settle(server.pid, quick)
    yield Row(what="idle server, memory", ours=ours[0], unit="MB", floor=120, peers={"dstack": theirs[0]})
    yield Row(what="idle server, CPU", ours=ours[1], unit="%", floor=0.5, aim=0.1, peers={"dstack": theirs[1]})


def settle(pid: int, quick: bool) -> tuple[float, float]:
    """Memory and CPU share of a server that has been left alone for a moment."""
    time.sleep(3)
    share = idle_cpu_percent(pid, 5 if quick else 20)
    return resident_mb(pid), share


def proxy(quick: bool) -> Iterator[Row]:
    """Requests to a service, compared with the same requests to its replica; all share the CPUs."""
    seconds = 3 if quick else 10
    with proxied(1) as service:
        direct = f"http://127.0.0.1:{service.replicas()[0].port}/"
        rounds = [[load(url, 8, seconds, 200)["seconds"] for url in (direct, service.url)] for _ in range(3)]
        added = median(median(ours) - median(theirs) for theirs, ours in rounds)
        most = load(service.url, 32, seconds, 0)["rate"]
        without = load(direct, 32, seconds, 0)["rate"]
    yield Row(what="proxy, median latency added at 200 requests/s", ours=added * 1000, unit="ms", floor=3, aim=1)
    yield Row(
        what="proxy, most requests with 32 connections",
        ours=most,
        unit="1/s",
        floor=800,
        aim=3000,
        more_is_better=True,
        peers={"the replica alone": without},
    )
    with proxied(2) as service:
        failed, took = killed_under_load(service, 10 if quick else 20)
    yield Row(what="proxy, requests that fail when a replica is killed", ours=failed, unit="requests", floor=0)
    yield Row(what="proxy, from its replacement listening to its first answer", ours=took, unit="s", floor=2, aim=1)


def machines(quick: bool) -> Iterator[Row]:
    """Machines that boot: what we add to the time they take, one after the other, and ten at once."""
    with cloud_of_machines() as (home, fleet):
        seconds_added(home, fleet, 1)
        added = [seconds_added(home, fleet, 1)[0] for _ in range(3 if quick else 9)]
    yield Row(what="SSH answers to first log byte, median", ours=median(added), unit="s", floor=1.5)
    with cloud_of_machines() as (home, fleet):
        together = seconds_added(home, fleet, 10)
    what = "10 machines at once, those whose task printed what it should"
    yield Row(what=what, ours=len(together), unit="tasks", floor=10, more_is_better=True)
    yield Row(what="10 machines at once, SSH answers to first log byte, median", ours=median(together), unit="s")


def many(quick: bool) -> Iterator[Row]:
    """A thousand running instances of a simulated cloud, all in one process: engine, cloud, and agents."""
    count = 200 if quick else 1000
    result = run_program(PYTHON, "many.py", str(count), "10" if quick else "30", env={"PYTHONPATH": str(ROOT)})
    yield Row(
        what=f"{count} instances, due to taken up, p99", ours=percentile(result["overdue"], 0.99), unit="s", floor=1.0
    )
    what = f"beside {count} instances, a run that does nothing, p99"
    yield Row(what=what, ours=percentile(result["short"], 0.99), unit="s", floor=1.0)
    yield Row(what=f"{count} instances, CPU of engine, cloud and agents", ours=100 * result["cpu"], unit="%")


SECTIONS: dict[str, Callable[[bool], Iterator[Row]]] = {
    "imports": imports,
    "cold": cold,
    "warm": warm,
    "rate": rate,
    "burst": burst,
    "plan": plan,
    "amazon": amazon_plan,
    "logs": logs,
    "upload": upload,
    "idle": idle,
    "proxy": proxy,
    "machines": machines,
    "many": many,
}


def main() -> int:
    """Runs the chosen sections."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    parser.add_argument("sections", nargs="*", choices=[*SECTIONS, []], help="which to run (all)")
    parser.add_argument("--quick", action="store_true", help="fewer repetitions")
    parser.add_argument("--json", type=Path, help="also write the rows to this file")
    options = parser.parse_args()
    rows: list[Row] = []
    failed = [name for name in options.sections or SECTIONS if not measured(name, options.quick, rows)]
    print_table(rows)
    if options.json:
        write_json(rows, options.json)
    return 0 if not failed and all(row.holds for row in rows) else 1


def measured(name: str, quick: bool, rows: list[Row]) -> bool:
    """Adds the rows of one section; a section that fails says so, and leaves the others their turn."""
    print(f"{name} …", file=sys.stderr, flush=True)
    try:
        rows.extend(SECTIONS[name](quick))
    except (RuntimeError, OSError, subprocess.SubprocessError, FleetUnavailable) as error:
        print(f"{name} FAILED: {error}", file=sys.stderr, flush=True)
        return False
    return True


if __name__ == "__main__":
    sys.exit(main())
