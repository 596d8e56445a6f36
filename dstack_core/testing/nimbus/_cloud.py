"""What there is in a Nimbus cloud, and how it changes with time. Knows nothing of HTTP."""

from __future__ import annotations

import itertools
import json
import re
import secrets
import threading
import time
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any
from uuid import UUID, uuid4

from dstack_core.testing._clouds import Event, Server, Truth
from dstack_core.testing.nimbus._catalogue import REGIONS, TYPES, ZONES
from dstack_core.testing.nimbus._hosts import Hosts

if TYPE_CHECKING:
    from dstack_core.testing.nimbus._machines import Machines

PAGE = 50
_WORD = re.compile(r"[a-z0-9_-]{1,63}")
_KNOWN = {"name", "type", "zone", "spot", "labels", "ssh_keys", "user_data", "command", "delete_at"}
_GONE = ("deleted", "failed")
_ENDS = {
    Event.STOPPED: ("stopped", None),
    Event.SPOT_INTERRUPTION: ("deleted", "spot"),
    Event.SHUTDOWN_FROM_INSIDE: ("deleted", "guest"),
    Event.FAILURE: ("failed", "fault"),
}


class Refusal(Exception):
    """A request is refused.

    Args:
        status: of HTTP.
        code: the cloud's own.
        message: for people.
    """

    def __init__(self, status: int, code: str, message: str) -> None:
        super().__init__(message)
        self.status = status
        self.code = code


@dataclass
class Machine:
    """One server."""

    id: str
    order: dict[str, Any]
    created_at: datetime
    accepted: float
    address: str
    status: str = ""
    reason: str | None = None
    asked_to_end: float | None = None
    disk: bool = True
    labels: dict[str, str] = field(default_factory=dict)

    @property
    def region(self) -> str:
        """Where it is."""
        return ZONES[self.order["zone"]]


class Cloud:
    """Servers and disks. Safe to use from several threads.

    Args:
        boot: seconds until a server runs.
        shutdown: seconds that its end takes.
        hosts: what makes servers run; they only seem to if not set.
    """

    def __init__(self, boot: float, shutdown: float, hosts: Hosts | Machines | None = None) -> None:
        self.boot = boot
        self.shutdown = shutdown
        self.lag = 0.0
        self._hosts = hosts
        self._lock = threading.RLock()
        self._machines: dict[str, Machine] = {}
        self._keys: dict[str, tuple[str, str]] = {}
        self._numbers = itertools.count(1)

    # -- what the API does ------------------------------------------------------------------------------------------

    def create(self, order: dict[str, Any], key: str | None) -> dict[str, Any]:
        """Makes a server, or finds the one that was made with this key."""
        _check(order)
        body = json.dumps(order, sort_keys=True)
        with self._lock:
            if key is not None and key in self._keys:
                known, made = self._keys[key]
                if known != body:
                    raise Refusal(409, "key_reused", "This idempotency key was used for another request")
                return self.shown(self._machines[made])
            _check_stock(order)
            machine = self._make(order)
            if key is not None:
                self._keys[key] = (body, machine.id)
            return self.shown(machine)

    def get(self, server: str) -> dict[str, Any]:
        """One server."""
        with self._lock:
            return self.shown(self._known(server))

    def delete(self, server: str, *, disks: bool) -> dict[str, Any]:
        """Begins the end of a server."""
        with self._lock:
            machine = self._known(server)
            if disks:
                machine.disk = False
            if machine.asked_to_end is None and self._status(machine) not in _GONE:
                machine.asked_to_end = time.monotonic()
                machine.reason = "user"
                self._switch_off(machine)
            return self.shown(machine)

    def page(self, region: str, labels: list[str], number: int) -> dict[str, Any]:
        """One page of the servers of a region that are not gone."""
        if region not in REGIONS:
            raise Refusal(422, "invalid", f"There is no region '{region}'; there are: {', '.join(REGIONS)}")
        wanted = [label.partition(":")[::2] for label in labels]
        with self._lock:
            found = [one for one in self._machines.values() if self._listed(one, region, wanted)]
            pages = max(1, -(-len(found) // PAGE))
            shown = [self.shown(one) for one in found[(number - 1) * PAGE : number * PAGE]]
        return {"servers": shown, "page": number, "pages": pages}

    def shown(self, machine: Machine) -> dict[str, Any]:
        """A server as the API shows it."""
        status = self._status(machine)
        up = status not in ("starting", *_GONE)
        return {
            "id": machine.id,
            "name": machine.order["name"],
            "type": machine.order["type"],
            "region": machine.region,
            "zone": machine.order["zone"],
            "spot": bool(machine.order.get("spot")),
            "labels": machine.labels,
            "status": status,
            "reason": machine.reason,
            "created_at": machine.created_at.isoformat(timespec="milliseconds").replace("+00:00", "Z"),
            "address": self._address(machine) if up else None,
            "agent_socket": self._hosts.socket(machine.id) if up and self._hosts else None,
        }

    def console(self, server: str) -> dict[str, Any]:
        """What appeared on the console of a server."""
        with self._lock:
            machine = self._known(server)
            return {"console": self._hosts.console(machine.id) if self._hosts else ""}

    def label(self, server: str, labels: dict[str, str]) -> dict[str, Any]:
        """Replaces the labels of a server."""
        with self._lock:
            machine = self._known(server)
            _check_labels(labels)
            machine.labels = dict(labels)
            return self.shown(machine)

    # -- what tests do ----------------------------------------------------------------------------------------------

    def befall(self, server: str, event: Event) -> None:
        """See `Eventful.befall`."""
        with self._lock:
            machine = self._known(server)
            machine.status, machine.reason = _ENDS[event]
            self._switch_off(machine)
            if machine.status in _GONE:
                machine.disk = False

    def unmark(self, server: str) -> None:
        """See `Unmarking.unmark`."""
        with self._lock:
            self._known(server).labels = {}

    def stock(self, count: int) -> None:
        """See `Stocked.stock`."""
        owner = uuid4()
        for number, zone in zip(range(count), itertools.cycle(ZONES), strict=False):
            foreign = {"managed-by": "dstack", "owner": str(owner), "intent": str(uuid4())}
            labels = [foreign, {}, {"team": "web", "intent": "to-stay"}][number % 3]
            self.create({"name": f"other-{number}", "type": "small", "zone": zone, "labels": labels}, None)

    def truth(self) -> Truth:
        """See `Truthful.truth`."""
        with self._lock:
            machines = list(self._machines.values())
            gone = [one for one in machines if self._status(one) in _GONE and one.disk]
            left = [f"disk of server {one.id} ({one.order['name']})" for one in gone]
            return Truth([self._true(one) for one in machines], left)

    # -- inside -----------------------------------------------------------------------------------------------------

    def _make(self, order: dict[str, Any]) -> Machine:
        number = next(self._numbers)
        machine = Machine(
            id=f"srv-{number}-{secrets.token_hex(4)}",
            order=order,
            created_at=datetime.now(UTC),
            accepted=time.monotonic(),
            address=f"198.51.{100 + number // 250 % 100}.{number % 250 + 1}",
            labels=dict(order.get("labels", {})),
        )
        if self._hosts is not None:
            self._switch_on(machine, self._hosts)
        self._machines[machine.id] = machine
        return machine

    def _switch_on(self, machine: Machine, hosts: Hosts | Machines) -> None:
        try:
            hosts.start(machine.id, machine.order)
        except (OSError, ValueError, IndexError) as error:
            raise Refusal(422, "invalid", f"The command cannot be started: {error}") from error

    def _switch_off(self, machine: Machine) -> None:
        if self._hosts is not None:
            self._hosts.end(machine.id)

    def _address(self, machine: Machine) -> str:
        """Its own, or one that leads nowhere."""
        own = self._hosts.address(machine.id) if self._hosts is not None else None
        return own or machine.address

    def _known(self, server: str) -> Machine:
        if server not in self._machines:
            raise Refusal(404, "not_found", f"There is no server '{server}'")
        return self._machines[server]

    def _status(self, machine: Machine) -> str:
        now = time.monotonic()
        if machine.status in _GONE:
            return machine.status
        runs = self._hosts is not None and self._hosts.lives(machine.id)
        if machine.asked_to_end is not None:
            over = now - machine.asked_to_end >= self.shutdown and not runs
            return "deleted" if over else "deleting"
        if self._hosts is not None and not runs:
            machine.status, machine.reason = _ENDS[Event.SHUTDOWN_FROM_INSIDE]
            machine.disk = False
        if machine.status:
            return machine.status
        return "running" if now - machine.accepted >= self.boot else "starting"

    def _listed(self, machine: Machine, region: str, wanted: list[Any]) -> bool:
        if machine.region != region or self._status(machine) in _GONE:
            return False
        if time.monotonic() - machine.accepted < self.lag:
            return False
        return all(machine.labels.get(key) == value for key, value in wanted)

    def _true(self, machine: Machine) -> Server:
        return Server(
            id=machine.id,
            name=machine.order["name"],
            region=machine.region,
            labels=dict(machine.labels),
            intent=_uuid(machine.labels.get("intent")),
            owner=_uuid(machine.labels.get("owner")),
            billed=self._status(machine) not in _GONE,
            born_with=dict(machine.order.get("labels", {})),
        )


def _check(order: object) -> None:
    """Refuses what is no order."""
    if not isinstance(order, dict) or not order.keys() <= _KNOWN:
        raise Refusal(422, "invalid", f"A server has only these fields: {', '.join(sorted(_KNOWN))}")
    if order.get("type") not in TYPES:
        raise Refusal(422, "invalid", f"There is no type '{order.get('type')}'; there are: {', '.join(TYPES)}")
    if order.get("zone") not in ZONES:
        raise Refusal(422, "invalid", f"There is no zone '{order.get('zone')}'; there are: {', '.join(ZONES)}")
    if not _WORD.fullmatch(str(order.get("name"))):
        raise Refusal(422, "invalid", "A name has 1 to 63 of these: a-z, 0-9, - and _")
    _check_labels(order.get("labels", {}))


def _check_labels(labels: object) -> None:
    good = isinstance(labels, dict) and all(
        _WORD.fullmatch(str(key)) and _WORD.fullmatch(str(value)) for key, value in labels.items()
    )
    if not good:
        raise Refusal(422, "invalid", "Keys and values of labels have 1 to 63 of these: a-z, 0-9, - and _")


def _check_stock(order: dict[str, Any]) -> None:
    if order["zone"] in TYPES[order["type"]].sold_out:
        raise Refusal(503, "no_capacity", f"{order['type']} is sold out in {order['zone']}")


def _uuid(text: str | None) -> UUID | None:
    try:
        return UUID(text) if text else None
    except ValueError:
        return None
