"""The cloud under test: the API that the backend speaks to, and what a test may do to it."""

from __future__ import annotations

import hmac
import itertools
import json
import math
import re
import threading
import time
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Any, Self
from urllib.parse import unquote, urlsplit
from uuid import UUID, uuid4

from dstack_core.plugin import Offer
from dstack_core.testing import Event, Failure, Fault, FaultPlane, Fleet, Server, Struck, Truth
from dstack_core.testing.nimbus._machines import Machines
from tests.support.lambda_cloud import _rules, _wares
from tests.support.lambda_cloud._document import Document
from tests.support.lambda_cloud._http import Answer, Call, Listener

API_KEY = "secret_lambda-test_0123456789abcdef"
RETRY_AFTER = 1
INSTANCES = "instances"
"""The quota: how many of them at once."""

_WORDS = {
    Fault.THROTTLE: (429, "global/too-many-requests", "Too many requests"),
    Fault.NO_CAPACITY: (
        400,
        "instance-operations/launch/insufficient-capacity",
        "Not enough capacity to fulfill launch request",
    ),
    Fault.QUOTA: (400, "global/quota-exceeded", "Quota exceeded"),
    Fault.UNAUTHORIZED: (401, "global/invalid-api-key", "API key was invalid, expired, or deleted"),
    Fault.FORBIDDEN: (403, "global/account-inactive", "Your account is inactive"),
    Fault.INVALID: (400, "global/invalid-parameters", "Invalid request data"),
    Fault.SERVER_ERROR: (500, "global/internal-error", "An internal error has occurred"),
}
"""Status, code and message."""
_FAILURES = {
    **{fault: Failure(message) for fault, (_, _, message) in _WORDS.items()},
    Fault.THROTTLE: Failure(_WORDS[Fault.THROTTLE][2], retry_after=RETRY_AFTER),
    Fault.NO_CAPACITY: Failure(_WORDS[Fault.NO_CAPACITY][2], scope="region"),
    Fault.QUOTA: Failure(_WORDS[Fault.QUOTA][2], scope="account"),
}
_UNKNOWN = "global/object-does-not-exist"
_ROUTES = {
    ("GET", "instance-types"): "listInstanceTypes",
    ("GET", "instances"): "listInstances",
    ("GET", "instances/{id}"): "getInstance",
    ("GET", "images"): "listImages",
    ("GET", "ssh-keys"): "listSSHKeys",
    ("POST", "ssh-keys"): "addSSHKey",
    ("POST", "instance-operations/launch"): "launchInstance",
    ("POST", "instance-operations/terminate"): "terminateInstance",
}
_CHANGING = ("addSSHKey", "launchInstance", "terminateInstance")
_NOT_BILLED = ("terminated", "preempted")
_ACTIONS = ("migrate", "rebuild", "restart", "cold_reboot", "terminate")


class Refusal(Exception):
    """A request is refused."""

    def __init__(self, status: int, code: str, message: str, suggestion: str = "") -> None:
        super().__init__(message)
        self.answer = Answer(status, {"error": {"code": code, "message": message, "suggestion": suggestion}})


@dataclass
class Instance:
    """One instance, as Lambda knows it.

    Attributes:
        id: its id.
        order: the request that made it.
        born: when, by the clock of the plane.
        status: what is said of it.
        changed: when that changed.
        address: where it is.
    """

    id: str
    order: dict[str, Any]
    born: float
    status: str = "booting"
    changed: float = field(default=0.0)
    address: str | None = None

    @property
    def tags(self) -> dict[str, str]:
        """Its tags, those included whose keys Lambda would not take as they are."""
        found = {}
        for tag in self.order.get("tags", ()):
            key, value = tag["key"], tag["value"]
            if re.fullmatch(r"dstack:\d+", key):
                key, _, value = value.partition("=")
            found[key] = value
        return found


class LambdaCloud:
    """Lambda's API, on a port of this computer. A context manager.

    Args:
        regions: those of the configuration; empty for all.
        fleet: its machines are the instances; without it they only seem to run.
        requests: so many a second are taken; `None`: as many as one likes.
        launches: likewise for launches.
        burst: so many at once are taken after a pause.

    Attributes:
        url: where it is.
        plane: what goes wrong, and what is scarce. Calls have the names of the document's operations.
        seen: each call, and when it came.
        wrong: what was not as the document says, in requests and answers; empty if there is no document.
        keys: SSH keys by their names.
        strange: fields that the document does not know, to be added to each instance.
    """

    def __init__(
        self,
        regions: Sequence[str] = (),
        *,
        fleet: Fleet | None = None,
        requests: float | None = None,
        launches: float | None = None,
        burst: float = 2,
    ) -> None:
        self._regions = tuple(regions)
        self._machines = Machines(fleet) if fleet is not None else None
        self._rates = (requests, launches)
        self._document = Document.at_hand()
        self._lock = threading.RLock()
        self._numbers = itertools.count(1)
        self._instances: dict[str, Instance] = {}
        self._boot, self._shutdown = 0.0, 0.05
        self._stack = ExitStack()
        self.plane = FaultPlane(_FAILURES)
        self.plane.throttle(requests, burst=burst)
        self.plane.throttle(launches, burst=burst, call="launchInstance")
        self.seen: list[tuple[str, float]] = []
        self.wrong: list[str] = []
        self.keys: dict[str, str] = {}
        self.strange: dict[str, Any] = {}
        self.url = ""

    def __enter__(self) -> Self:
        if self._machines is not None:
            self._stack.callback(self._machines.close)
        listener = Listener(self._answer)
        self.url = f"http://127.0.0.1:{listener.server_address[1]}"
        thread = threading.Thread(target=listener.serve_forever, args=(0.02,), daemon=True)
        thread.start()
        self._stack.callback(thread.join, 60)
        self._stack.callback(listener.close)
        self._stack.callback(self.plane.heal)
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    # -- abilities ---------------------------------------------------------------------------------------------------

    def config(self) -> dict[str, Any]:
        """See `Cloud`. Turns are as far apart as the limits of this cloud want them."""
        requests, launches = (1 / rate if rate else 0.0 for rate in self._rates)
        intervals = {"request_interval": requests, "launch_interval": launches}
        return {"api_key": API_KEY, "regions": list(self._regions), "url": self.url, **intervals}

    def truth(self) -> Truth:
        """See `Truthful`."""
        with self._lock:
            self._tick()
            return Truth([_server(one) for one in self._instances.values()])

    def catalogue(self) -> Sequence[Offer]:
        """See `Catalogued`."""
        return list(_wares.offers(self._regions))

    def fail(self, kind: Fault, times: int = 1, *, after: bool = False, skip: int = 0) -> Failure:
        """See `Faulty`."""
        return self.plane.fail(kind, times, after=after, skip=skip)

    def heal(self) -> None:
        """See `Faulty`."""
        self.plane.heal()

    def lag(self, seconds: float) -> None:
        """See `Lagging`."""
        self.plane.lag(seconds)

    def calls(self) -> int:
        """See `Counting`."""
        return self.plane.calls()

    def boot(self, seconds: float) -> None:
        """See `Booting`."""
        with self._lock:
            self._boot = seconds

    def stock(self, count: int) -> None:
        """See `Stocked`."""
        strangers = [{"key": "owner", "value": str(uuid4())}, {"key": "intent", "value": str(uuid4())}]
        for place in _wares.REGIONS:
            for number in range(count):
                tags = [[], strangers, [{"key": "owner", "value": "me"}]][number % 3]
                order = {"region_name": place, "instance_type_name": "gpu_1x_a10", "ssh_key_names": ["mine"]}
                with self._lock:
                    self._make(self._next_id(), {**order, "tags": tags, "name": "by-hand"})

    def befall(self, server: str, event: Event) -> None:
        """See `Eventful`. What is switched off or broken is billed on, whoever switched it off."""
        states = {Event.SPOT_INTERRUPTION: "preempted", Event.FAILURE: "terminated"}
        self.say(server, states.get(event, "unhealthy"))

    def unmark(self, server: str) -> None:
        """See `Unmarking`."""
        with self._lock:
            self._instances[server].order["tags"] = []

    def say(self, server: str, status: str) -> None:
        """From now on this is said of an instance."""
        with self._lock:
            instance = self._instances[server]
            self._put(instance, status)
            if status in _NOT_BILLED:
                self._switch_off(instance)

    def instance(self, id: str) -> Instance:
        """One of them."""
        with self._lock:
            return self._instances[id]

    # -- answering ---------------------------------------------------------------------------------------------------

    def _answer(self, call: Call) -> Answer | None:
        operation, named = _routed(call)
        if operation is None:
            return Refusal(404, "global/not-found", "The requested resource was not found").answer
        with self._lock:
            self.seen.append((operation, time.monotonic()))
        if not hmac.compare_digest(call.authorization.encode(), f"Bearer {API_KEY}".encode()):
            return self._looked_at(operation, _struck(Fault.UNAUTHORIZED, None))
        try:
            answer = self.plane.carry_out(
                operation,
                lambda: self._do(operation, named, call.body),
                making=operation == "launchInstance",
                changing=operation in _CHANGING,
            )
        except Struck as struck:
            if struck.fault is Fault.DROP:
                return None
            answer = _struck(struck.fault, struck.retry_after)
        return self._looked_at(operation, answer)

    def _looked_at(self, operation: str, answer: Answer) -> Answer:
        """Whether this cloud itself keeps to the document."""
        if self._document is not None and not self.strange:
            self.wrong += self._document.wrong_answer(operation, answer.status, answer.body)
        return answer

    def _do(self, operation: str, id: str, content: bytes | None) -> Answer:
        try:
            with self._lock:
                self._tick()
                body = self._body(operation, content)
                name = "_do_" + re.sub(r"(?<=[a-z])(?=[A-Z])", "_", operation).lower()
                data = getattr(self, name)(id if operation == "getInstance" else body)
                return Answer(200, {"data": data})
        except Refusal as refusal:
            return refusal.answer

    def _body(self, operation: str, content: bytes | None) -> Any:
        """What was sent, if it is as the document says."""
        try:
            body = None if content is None else json.loads(content)
        except ValueError:
            raise Refusal(400, "global/invalid-parameters", "The body is not JSON") from None
        wrong = self._document.wrong_request(operation, body) if self._document is not None else []
        if wrong:
            self.wrong += wrong
            raise Refusal(400, "global/invalid-parameters", "; ".join(wrong))
        return body

    def _tick(self) -> None:
        """Time has passed."""
        now = self.plane.now()
        for one in self._instances.values():
            if one.status == "booting" and now - one.born >= self._boot:
                self._put(one, "active")
            if one.status == "terminating" and now - one.changed >= self._shutdown:
                self._put(one, "terminated")
            if self._machines is not None and one.status in ("active", "unhealthy"):
                one.address = self._machines.address(one.id)
                # Its system is down, and it costs what it cost before.
                if not self._machines.lives(one.id):
                    self._put(one, "unhealthy")

    def _put(self, instance: Instance, status: str) -> None:
        instance.status, instance.changed = status, self.plane.now()
        if status == "active":
            instance.address = instance.address or f"198.51.100.{int(instance.id, 16) % 250 + 1}"

    # -- operations --------------------------------------------------------------------------------------------------

    def _do_list_instance_types(self, _: None) -> dict[str, Any]:
        return {
            name: {
                "instance_type": ware.described(name),
                "regions_with_capacity_available": [
                    _wares.region(place) for place in ware.regions if self.plane.left(name, place) != 0
                ],
            }
            for name, ware in _wares.WARES.items()
        }

    def _do_list_instances(self, _: None) -> list[dict[str, Any]]:
        return [self._described(one) for one in self._instances.values() if self.plane.listed(one.born)]

    def _do_get_instance(self, id: str) -> dict[str, Any]:
        if id not in self._instances:
            raise Refusal(404, _UNKNOWN, "Specified instance does not exist.")
        return self._described(self._instances[id])

    def _do_list_images(self, _: None) -> list[dict[str, Any]]:
        return list(_wares.images())

    def _do_list_sshkeys(self, _: None) -> list[dict[str, str]]:
        return [self._key(name) for name in self.keys]

    def _do_add_sshkey(self, body: dict[str, str]) -> dict[str, str]:
        if body["name"] in self.keys:
            raise Refusal(400, "global/invalid-parameters", f"There is an SSH key {body['name']} already")
        self.keys[body["name"]] = body["public_key"]
        return self._key(body["name"])

    def _do_launch_instance(self, order: dict[str, Any]) -> dict[str, list[str]]:
        for said in _rules.broken(_rules.INVALID, order, self):
            raise Refusal(400, "global/invalid-parameters", said)
        for said in _rules.broken(_rules.MISSING, order, self):
            raise Refusal(400, _UNKNOWN, f"{said} does not exist")
        kind, place = order["instance_type_name"], order["region_name"]
        if place not in _wares.WARES[kind].regions:
            raise Struck(Fault.NO_CAPACITY)
        made = self._next_id()
        self.plane.take(made, type=kind, zone=place, uses={INSTANCES: 1})
        self._make(made, order)
        return {"instance_ids": [made]}

    def _next_id(self) -> str:
        return f"{next(self._numbers):032x}"

    def _make(self, id: str, order: dict[str, Any]) -> None:
        self._instances[id] = Instance(id, order, self.plane.now())
        if self._machines is not None:
            self._machines.start(id, order)

    def _do_terminate_instance(self, body: dict[str, list[str]]) -> dict[str, Any]:
        """All of them or none."""
        asked = body["instance_ids"]
        found = [one for name in asked if (one := self._instances.get(name)) and one.status != "terminated"]
        if len(found) < len(asked):
            raise Refusal(404, _UNKNOWN, "Specified instance does not exist.")
        for one in found:
            if one.status != "terminating":
                self._put(one, "terminating")
                self._switch_off(one)
        return {"terminated_instances": [self._described(one) for one in found]}

    def _switch_off(self, instance: Instance) -> None:
        self.plane.give_back(instance.id)
        if self._machines is not None:
            self._machines.end(instance.id)

    # -- describing --------------------------------------------------------------------------------------------------

    def _key(self, name: str) -> dict[str, str]:
        return {"id": f"{abs(hash(name)):032x}"[:32], "name": name, "public_key": self.keys[name]}

    def _described(self, one: Instance) -> dict[str, Any]:
        kind = one.order["instance_type_name"]
        described: dict[str, Any] = {
            "id": one.id,
            "name": one.order.get("name", ""),
            "status": one.status,
            "ssh_key_names": one.order["ssh_key_names"],
            "file_system_names": [],
            "region": _wares.region(one.order["region_name"]),
            "instance_type": _wares.WARES[kind].described(kind),
            "actions": {action: {"available": one.status == "active"} for action in _ACTIONS},
            "tags": one.order.get("tags", []),
            **self.strange,
        }
        if one.address is not None:
            described |= {"ip": one.address, "private_ip": "10.19.0.1", "hostname": one.order.get("hostname", one.id)}
            described["jupyter_token"] = "not-for-logs"
        return described


def _routed(call: Call) -> tuple[str | None, str]:
    """Which operation, of which instance."""
    path = urlsplit(call.path).path.removeprefix("/api/v1/")
    if path.startswith("instances/") and path.count("/") == 1:
        return _ROUTES.get((call.method, "instances/{id}")), unquote(path.removeprefix("instances/"))
    return _ROUTES.get((call.method, path)), ""


def _struck(fault: Fault, retry_after: float | None) -> Answer:
    """What Lambda says to a fault."""
    status, code, message = _WORDS[fault]
    answer = Refusal(status, code, message, "Contact Support").answer
    seconds = max(1, math.ceil(retry_after or 0))
    return Answer(status, answer.body, {"Retry-After": str(seconds)} if status == 429 else {})


def _server(one: Instance) -> Server:
    tags = one.tags
    return Server(
        id=one.id,
        name=one.order.get("name", ""),
        region=one.order["region_name"],
        labels=tags,
        intent=_uuid(tags.get("intent")),
        owner=_uuid(tags.get("owner")),
        billed=one.status not in _NOT_BILLED,
        born_with=tags,
    )


def _uuid(text: str | None) -> UUID | None:
    try:
        return UUID(text) if text else None
    except ValueError:
        return None
