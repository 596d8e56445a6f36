"""What must hold in every history, and what must be reached in some."""

from __future__ import annotations

import logging
import re
import sqlite3
from collections import Counter
from contextlib import closing
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any
from uuid import UUID

from dstack_core._engine.instances import MISSED
from dstack_core._store import StoreError
from dstack_core.testing import SimInstance

if TYPE_CHECKING:
    from tests.sim.world import World

WATCH = """
CREATE TABLE sim_violations (text TEXT);
CREATE TRIGGER sim_jobs_final BEFORE UPDATE OF status ON jobs
WHEN OLD.status IN ('done', 'failed', 'terminated', 'aborted') AND NEW.status <> OLD.status
BEGIN INSERT INTO sim_violations VALUES ('job ' || OLD.id || ' went from ' || OLD.status || ' to ' || NEW.status); END;
CREATE TRIGGER sim_runs_final BEFORE UPDATE OF status ON runs
WHEN OLD.status IN ('done', 'failed', 'terminated', 'aborted') AND NEW.status <> OLD.status
BEGIN INSERT INTO sim_violations VALUES ('run ' || OLD.id || ' went from ' || OLD.status || ' to ' || NEW.status); END;
CREATE TRIGGER sim_instances_final BEFORE UPDATE OF status ON instances
WHEN OLD.status IN ('terminated', 'failed') AND NEW.status <> OLD.status
BEGIN INSERT INTO sim_violations VALUES ('instance ' || OLD.id || ' went from ' || OLD.status || ' to ' || NEW.status);
END;
CREATE TRIGGER sim_requests_fixed BEFORE UPDATE OF request ON instances WHEN NEW.request <> OLD.request
BEGIN INSERT INTO sim_violations VALUES ('the request of intent ' || OLD.id || ' changed'); END;
CREATE TRIGGER sim_runs_kept BEFORE DELETE ON runs
BEGIN INSERT INTO sim_violations VALUES ('run ' || OLD.id || ' was deleted'); END;
CREATE TABLE sim_seen (text TEXT);
CREATE TRIGGER sim_jobs_taken BEFORE UPDATE OF lease_owner ON jobs WHEN NEW.lease_owner <> OLD.lease_owner
BEGIN INSERT INTO sim_seen VALUES ('a lease that had run out was taken over'); END;
CREATE TRIGGER sim_instances_taken BEFORE UPDATE OF lease_owner ON instances WHEN NEW.lease_owner <> OLD.lease_owner
BEGIN INSERT INTO sim_seen VALUES ('a lease that had run out was taken over'); END;
CREATE TRIGGER sim_sweeps_taken BEFORE UPDATE OF lease_owner ON sweeps WHEN NEW.lease_owner <> OLD.lease_owner
BEGIN INSERT INTO sim_seen VALUES ('the place of a sweeper was taken over'); END;
"""
"""Triggers of the simulated database: what must never be written is written down, and what is to be reached."""

LOOK_EVERY = 20.0
UNDER_WAY = 90.0
"""Seconds for which a request may be under way."""
UNCLAIMED_FOR = 1200.0
"""Seconds for which an instance may be billed that no row answers for, until its end is asked for."""
SAID = {
    "Lease lost: ": "a result was turned away, since its lease was lost",
    " is not terminated since ": "a termination took so long that a person was alarmed",
}
"""Ways that only the log tells of: a part of the message, and how the way is called."""
_STEP = re.compile(r"(instance|job) .*?: (\w+ -> \w+)")
_FINAL_INSTANCE = ("terminated", "failed")


@dataclass
class Checks:
    """Looks at a world from outside.

    Attributes:
        violations: what did not hold.
        unasked: ids of instances that were made by a request which arrived for the second time.
    """

    world: World
    violations: list[str] = field(default_factory=list)
    unasked: set[str] = field(default_factory=set)
    _said: Counter[str] = field(default_factory=Counter)

    def violate(self, what: str) -> None:
        """An invariant does not hold."""
        if what not in self.violations:
            self.world.trace(f"VIOLATION {what}")
            self.violations.append(what)

    def said(self, record: logging.LogRecord) -> None:
        """The engine logs: an exception that is no failure of the store or a plugin is a bug."""
        self._said[str(record.msg)] += 1
        self.world.seen[f"log: {str(record.msg)[:60]}"] += 1
        for part, way in SAID.items():
            if part in record.getMessage():
                self.world.seen[way] += 1
        error = record.exc_info[1] if record.exc_info else None
        if error is not None and not isinstance(error, StoreError) and not _simulated(error):
            self.violate(f"the engine logged {type(error).__name__}: {error} ({record.getMessage()})")

    # -- while it goes on --------------------------------------------------------------------------------------------

    async def watch(self) -> None:
        """Looks again and again."""
        while True:
            await self.world.sleep(LOOK_EVERY)
            self.look()

    def look(self) -> None:
        """All that must hold at every moment."""
        self._one_instance_each()
        self._claims(self.world.reader)

    def _one_instance_each(self) -> None:
        live = Counter(one.intent for one in self.world.cloud.alive())
        for intent, count in live.items():
            if count > 1:
                self.violate(f"intent {intent} has {count} live instances")

    def _claims(self, db: Reader) -> None:
        owner = db.owner()
        if owner is None:
            return
        rows = {UUID(hex=row[0]): row for row in db.all("SELECT id, status, ref FROM instances")}

        def claimed(one: SimInstance) -> bool:
            row = rows.get(one.intent)
            if row is None or row[1] in _FINAL_INSTANCE:
                return False
            return row[2] is None or f'"id":"{one.id}"' in row[2]

        for one in self.world.cloud.alive(owner):
            row = rows.get(one.intent)
            if row is not None and row[1] in _FINAL_INSTANCE and one.id not in self.unasked:
                self.violate(f"the row of {one.id} says that it is {row[1]}, and it is billed")
        now = self.world.loop.time()
        alone = self.world.cloud.meter.observe(now, owner, claimed)
        for instance_id, seconds in alone.items() if self.world.restored_at is None else ():
            if seconds > UNCLAIMED_FOR and self.world.cloud.instances[instance_id].ending_at > now:
                self.violate(f"nobody has claimed {instance_id} for more than {UNCLAIMED_FOR:g} s")

    def ending(self, instance_id: str) -> None:
        """Somebody asks for the end of an instance: not of one that is in use, or just being taken over."""
        one = self.world.cloud.instances.get(instance_id)
        if one is None or self._may_be_older():
            return
        if sum(other.intent == one.intent for other in self.world.cloud.alive()) > 1:
            return
        found = self.world.reader.all("SELECT status, wanted FROM instances WHERE id = ?", one.intent.hex)
        if not found and self.world.restored_at is not None and not self.world.confirmed:
            self.violate(f"the end of {instance_id} was asked for, which the restored database does not know")
        if found and found[0][1] and found[0][0] in ("intent", "unknown", "starting", "running"):
            self.violate(f"the end of {instance_id} was asked for, which is {found[0][0]} and wanted")

    def _may_be_older(self) -> bool:
        """An old copy was restored just now: what arrives may have been sent before, with good reason."""
        restored = self.world.restored_at
        return restored is not None and self.world.loop.time() <= restored + UNDER_WAY

    # -- the end -----------------------------------------------------------------------------------------------------

    def settled(self) -> bool:
        """Whether every run has ended and nothing of ours is billed."""
        return not self.unsettled()

    def unsettled(self) -> list[str]:
        """What has not ended."""
        db = self.world.reader
        runs = db.all("SELECT name, status FROM runs WHERE finished_at IS NULL ORDER BY name")
        instances = db.all(
            "SELECT name, status FROM instances WHERE status NOT IN ('terminated', 'failed') ORDER BY id"
        )
        owner = db.owner()
        billed = [f"{one.id} is billed" for one in self.world.cloud.alive(owner)] if owner else []
        return [*(f"run {name} is {status}" for name, status in runs), *(f"{n} is {s}" for n, s in instances), *billed]

    async def at_the_end(self) -> None:
        """All that must have held."""
        self.look()
        db = self.world.reader
        self._count_ways(db)
        for (text,) in db.all("SELECT text FROM sim_violations"):
            self.violate(text)
        self._kept_promises(db)
        self._jobs(db)
        self._prices(db)
        self._foreign()
        for row in db.all("SELECT name, status, reason, message FROM runs ORDER BY name"):
            self.world.trace(f"end: run {row}")
            self.world.seen[f"run: {row[1]}" + (f", {row[2]}" if row[2] else "")] += 1
        for row in db.all("SELECT id, status, error FROM instances ORDER BY id"):
            self.world.trace(f"end: instance {row}")

    def _count_ways(self, db: Reader) -> None:
        """Which ways the engine went, by its own account."""
        seen = self.world.seen
        for (text,) in db.all("SELECT text FROM events"):
            if step := _STEP.match(text):
                seen[f"{step[1]}: {step[2]}"] += 1
            if MISSED in text:
                seen["what was neither listed nor answered was ended"] += 1
        seen.update(text for (text,) in db.all("SELECT text FROM sim_seen"))
        for reason, count in db.all("SELECT reason, count(*) FROM orphans GROUP BY reason"):
            seen[f"swept: {reason}"] += count
        seen["a shortage was remembered"] += db.all("SELECT count(*) FROM shortages")[0][0]
        seen["the database was found to be a copy"] += len(db.all("SELECT 1 FROM meta WHERE key = 'restored'"))
        seen["a restored database was confirmed"] += len(db.all("SELECT 1 FROM meta WHERE key = 'restore_confirmed'"))

    def _kept_promises(self, db: Reader) -> None:
        known = {row[0] for row in db.all("SELECT id FROM runs")}
        copied_at = self.world.copied_at if self.world.restored_at is not None else None
        for name, promise in self.world.users.promises.items():
            if copied_at is not None and promise.at >= copied_at:
                continue
            if promise.run_id.hex not in known:
                self.violate(f"the accepted run {name} is lost")

    def _jobs(self, db: Reader) -> None:
        starts: dict[str, list[Any]] = {}
        for one in self.world.cloud.instances.values():
            for job_id in one.machine.starts:
                starts.setdefault(job_id, []).append(one)
        for row_id, status, instance in db.all("SELECT id, status, instance_id FROM jobs ORDER BY id"):
            job_id = str(UUID(hex=row_id))
            where = starts.pop(job_id, [])
            if self.world.restored_at is not None:
                # What the database forgot it may do again.
                continue
            if len(where) > 1:
                self.violate(f"job {job_id} was started {len(where)} times: {[one.id for one in where]}")
            for one in where:
                if instance is None or one.intent.hex != instance:
                    self.violate(f"job {job_id} ran on {one.id}, which was not made for it")
            self._output(job_id, status, where)
        for job_id in starts if self.world.restored_at is None else ():
            self.violate(f"job {job_id} ran, and no row knows of it")

    def _output(self, job_id: str, status: str, where: list[Any]) -> None:
        path = self.world.folder / "logs" / f"{job_id}.log"
        stored = path.read_bytes() if path.exists() else b""
        if not where:
            if stored:
                self.violate(f"job {job_id} never ran, and has output")
            return
        job = where[0].machine.job
        if stored != job.output(0, len(stored)) or len(stored) > job.printed(self.world.loop.time()):
            self.violate(f"the stored output of job {job_id} is not what it printed")
        if status == "done" and len(stored) != job.printed(self.world.loop.time()):
            self.violate(f"job {job_id} is done, and a part of its output is missing")

    def _prices(self, db: Reader) -> None:
        wishes = {promise.run_id.hex: promise.wish for promise in self.world.users.promises.values()}
        runs = dict(db.all("SELECT id, run_id FROM instances"))
        for one in self.world.cloud.instances.values():
            wish = wishes.get(runs.get(one.intent.hex, ""))
            if wish is None:
                continue
            if wish.max_price is not None and one.price > wish.max_price:
                self.violate(f"{one.id} costs {one.price} an hour, and {wish.name} allows {wish.max_price}")
            if wish.spot == "on-demand" and one.spot:
                self.violate(f"{one.id} is spot, and {wish.name} wants none")

    def _foreign(self) -> None:
        for instance_id in self.world.cloud.trespasses:
            self.violate(f"the instance {instance_id} of somebody else was touched")


def _simulated(error: BaseException | None) -> bool:
    while error is not None:
        if "simulated" in str(error):
            return True
        error = error.__cause__ or error.__context__
    return False


class Reader:
    """Looks into the database without anybody noticing."""

    def __init__(self, path: Path) -> None:
        self._connection = sqlite3.connect(path, isolation_level=None)

    def all(self, query: str, *values: object) -> list[tuple[Any, ...]]:
        """The rows of a query."""
        return self._connection.execute(query, values).fetchall()

    def copy_to(self, path: Path) -> None:
        """Makes a copy of the database."""
        with closing(sqlite3.connect(path)) as copy:
            self._connection.backup(copy)

    def owner(self) -> UUID | None:
        """The owner id of this database."""
        found = self.all("SELECT value FROM meta WHERE key = 'owner'")
        return UUID(found[0][0]) if found else None

    def close(self) -> None:
        """Ends."""
        self._connection.close()
