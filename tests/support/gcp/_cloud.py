"""The cloud under test: the front that the SDK speaks to, and what a test may do to it."""

from __future__ import annotations

import itertools
import re
import threading
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from datetime import UTC, datetime
from typing import Any, Self
from uuid import UUID, uuid4

from dstack_core.plugin import Offer
from dstack_core.testing import Event, Failure, Fault, FaultPlane, Fleet, Server, Struck, Truth
from dstack_core.testing.nimbus._machines import Machines
from tests.support.gcp import _wares
from tests.support.gcp._discovery import Method, google
from tests.support.gcp._permits import permissions_for
from tests.support.gcp._rules import FIREWALL_RULES, INSTANCE_RULES, Order, image_at, problems
from tests.support.gcp._things import BASE, Op, Vm
from tests.support.gcp._wire import FAILED, WORDS, Answer, Listener, Refusal, error, is_ours, service_account

PROJECT = "a-project-1"
PAGE = 25
"""Entries on a page, whatever is asked for: fewer than Google gives, so that there is more than one."""
_SHUTDOWN = 0.05
_CHANGING = {"compute.instances.insert", "compute.instances.delete"}
_APIS = {"compute": "compute.googleapis.com", "cloudbilling": "cloudbilling.googleapis.com"}
_FAILURES = {
    **{fault: Failure(message) for fault, (_, _, message) in WORDS.items()},
    Fault.NO_CAPACITY: Failure(FAILED[Fault.NO_CAPACITY][1], scope="zone"),
    Fault.QUOTA: Failure(FAILED[Fault.QUOTA][1], scope="region"),
}


class Gcp:
    """Compute Engine and what goes with it, on a port of this computer. A context manager.

    Args:
        regions: those of the configuration.
        fleet: its machines are the instances; without it they only seem to run.

    Attributes:
        url: where it is.
        plane: what goes wrong, and what is scarce.
        seen: every call so far, by the id of its method.
        used: every permission that was needed so far.
        denied: permissions that whoever asks does not have.
        disabled: APIs that are not enabled in the project, as `compute.googleapis.com`.
        networks: networks of the project, and of others.
        answers: what is answered instead, by the id of the method; for a test to set.
        breaks: code and message with which the operations of the next creations fail, and after how many seconds.
    """

    def __init__(self, regions: Sequence[str] = ("us-central1", "europe-west4"), *, fleet: Fleet | None = None) -> None:
        self._machines = Machines(fleet) if fleet is not None else None
        self.plane = FaultPlane(_FAILURES)
        self.seen: Counter[str] = Counter()
        self.used: Counter[str] = Counter()
        self.denied: set[str] = set()
        self.disabled: set[str] = set()
        self.networks: list[str] = ["default"]
        self.answers: dict[str, Answer] = {}
        self.breaks: tuple[str, str, float] | None = None
        self.url = ""
        self._regions = tuple(regions)
        self._lock = threading.RLock()
        self._boot = 0.0
        self._numbers = itertools.count(1)
        self._vms: list[Vm] = []
        self._live: dict[str, Vm] = {}
        self._ops: list[Op] = []
        self._tries: dict[tuple[str, str], Op] = {}
        self._firewalls: dict[str, dict[str, Any]] = {}
        self._prices = list(_wares.price_list())
        self._stack = ExitStack()

    def __enter__(self) -> Self:
        if self._machines is not None:
            self._stack.callback(self._machines.close)
        server = Listener(self._answer)
        self.url = f"http://127.0.0.1:{server.server_port}"
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
        thread.start()
        self._stack.callback(thread.join, 60)
        self._stack.callback(server.server_close)
        self._stack.callback(server.shutdown)
        self._stack.callback(self.plane.heal)
        for metric, limit in _wares.QUOTAS.items():
            for region in _wares.REGIONS:
                self.plane.quota(f"{region} {metric}", limit)
        for metric, limit in _wares.PROJECT_QUOTAS.items():
            self.plane.quota(metric, limit)
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    # -- abilities ---------------------------------------------------------------------------------------------------

    def config(self) -> dict[str, Any]:
        """See `Cloud`."""
        creds = {"type": "service_account", "data": service_account(self.url, PROJECT)}
        return {"project": PROJECT, "regions": list(self._regions), "creds": creds, "endpoint_url": self.url}

    def truth(self) -> Truth:
        """See `Truthful`."""
        with self._lock:
            self._tick()
            left = [f"disk of {vm.name} in {vm.zone}" for vm in self._vms if vm.gone and vm.disk_stays]
            return Truth([_server(vm) for vm in self._vms], left)

    def catalogue(self) -> Sequence[Offer]:
        """See `Catalogued`."""
        return [offer for region in self._regions for offer in _wares.offers(region)]

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
        for region in _wares.REGIONS:
            for number in range(count):
                owned = {"managed-by": "dstack", "owner": str(uuid4()), "intent": str(uuid4())}
                labels = [owned, {"team": "web", "intent": "to-stay"}, {}][number % 3]
                with self._lock:
                    self._make(f"by-hand-{uuid4().hex[:12]}", f"{region}-a", _by_hand(labels), boots=False)

    def befall(self, server: str, event: Event) -> None:
        """See `Eventful`."""
        kind = {
            Event.STOPPED: "stop",
            Event.SPOT_INTERRUPTION: "compute.instances.preempted",
            Event.SHUTDOWN_FROM_INSIDE: "compute.instances.guestTerminate",
            Event.FAILURE: "compute.instances.hostError",
        }[event]
        with self._lock:
            vm = self.server(server)
            self._note(kind, vm)
            self._switch_off(vm)
            if event is Event.SPOT_INTERRUPTION:
                vm.asked_to_end = self.plane.now() - _SHUTDOWN
            else:
                vm.off = True
            self._tick()

    def unmark(self, server: str) -> None:
        """See `Unmarking`."""
        self.server(server).body["labels"] = {}

    def server(self, id: str) -> Vm:
        """An instance, with all that was asked for."""
        with self._lock:
            return next(vm for vm in self._vms if vm.name == id)

    def forget_requests(self) -> None:
        """Time passes: neither `requestId`s nor operations are known any more."""
        with self._lock:
            self._tries.clear()
            self._ops.clear()

    # -- answering ---------------------------------------------------------------------------------------------------

    def _answer(self, verb: str, path: str, query: dict[str, str], body: Any, who: str) -> Answer | None:
        found = google().find(verb, path)
        if found is None:
            return error(404, "notFound", f"There is no {verb} {path}")
        method, values = found
        self.seen[method.id] += 1
        refusal = self._refused(method, body, who)
        if refusal is not None:
            return refusal
        made = {"instance": body["name"]} if isinstance(body, dict) and "name" in body else {}
        given = {**query, **values, **made}
        making, changing = method.id == "compute.instances.insert", method.id in _CHANGING

        def do() -> Answer:
            return self._done(method, values, query, body)

        try:
            return self.plane.carry_out(method.id, do, making=making, changing=changing)
        except Struck as struck:
            return self._struck(struck, given, making=making)

    def _refused(self, method: Method, body: Any, who: str) -> Answer | None:
        """Whoever asks is not known, or may not."""
        if not is_ours(who):
            return error(*WORDS[Fault.UNAUTHORIZED])
        api = _APIS.get(method.id.partition(".")[0])
        if api in self.disabled:
            said = f"{api} has not been used in project {PROJECT} before or it is disabled."
            return error(403, "accessNotConfigured", said)
        needed = list(permissions_for(method.id, body))
        for permission in needed:
            if permission in self.denied:
                return error(403, "forbidden", f"Required '{permission}' permission for 'projects/{PROJECT}'")
        self.used.update(needed)
        return None

    def _struck(self, struck: Struck, given: Mapping[str, str], *, making: bool) -> Answer | None:
        if struck.fault is Fault.DROP:
            return None
        if struck.fault in FAILED and making:
            with self._lock:
                return Answer(200, self._failed(FAILED[struck.fault], given))
        return error(*WORDS[struck.fault])

    def _done(self, method: Method, path: dict[str, str], query: dict[str, str], body: Any) -> Answer:
        """Checks the request, does what it asks for, and checks the answer."""
        if method.id in self.answers:
            return self.answers[method.id]
        wrong = next(method.problems_of_request(path, query, body), None)
        if wrong is not None:
            return error(400, "invalid", wrong)
        handler: Callable[..., dict[str, Any]] = getattr(self, "_" + re.sub(r"\W", "_", method.id), _unknown)
        try:
            with self._lock:
                self._tick()
                answer = handler({**query, **path}, body)
        except Refusal as refusal:
            return refusal.answer
        wrong = next(method.problems_of_answer(answer), None)
        return Answer(200, answer) if wrong is None else error(500, "ourFault", f"This answer is wrong: {wrong}")

    def _tick(self) -> None:
        """Time has passed."""
        now = self.plane.now()
        for vm in list(self._live.values()):
            if self._machines is not None and vm.asked_to_end is None and not vm.off:
                vm.address = self._machines.address(vm.name)
                if not self._machines.lives(vm.name):
                    # A machine that shuts down is off, and no more: its disk is billed on.
                    vm.off = True
                    self._note("compute.instances.guestTerminate", vm)
            if vm.doomed is not None and vm.asked_to_end is None and now >= vm.doomed:
                self._doom(vm)
            limit = vm.body.get("scheduling", {}).get("terminationTime")
            if limit and vm.asked_to_end is None and datetime.fromisoformat(limit) <= datetime.now(UTC):
                self._note("compute.instances.scheduledTermination", vm)
                self._begin_end(vm)
            if vm.asked_to_end is not None and now - vm.asked_to_end >= _SHUTDOWN and not self._runs(vm):
                vm.gone = True
                self.plane.give_back(vm.key)
                del self._live[vm.key]

    def _doom(self, vm: Vm) -> None:
        """Its creation fails, after all."""
        vm.asked_to_end = self.plane.now() - _SHUTDOWN
        self._switch_off(vm)
        for op in self._ops:
            if op.vm is vm and op.kind == "insert" and self.breaks is not None:
                op.error = self.breaks[:2]

    def _runs(self, vm: Vm) -> bool:
        return self._machines is not None and self._machines.lives(vm.name)

    def _switch_off(self, vm: Vm) -> None:
        if self._machines is not None:
            self._machines.end(vm.name)

    def _begin_end(self, vm: Vm) -> None:
        vm.asked_to_end = self.plane.now()
        self._switch_off(vm)

    def _note(self, kind: str, vm: Vm) -> Op:
        op = Op(next(self._numbers), kind, vm.zone, vm.name, datetime.now(UTC), self.plane.now(), vm)
        self._ops.append(op)
        return op

    def _make(self, name: str, zone: str, body: dict[str, Any], *, boots: bool = True) -> Vm:
        number = next(self._numbers)
        vm = Vm(number + 10**18, name, zone, body, self.plane.now(), datetime.now(UTC), number)
        self._vms.append(vm)
        self._live[vm.key] = vm
        if self._machines is not None and boots:
            items = {one["key"]: one.get("value", "") for one in body.get("metadata", {}).get("items", ())}
            self._machines.start(name, {"user_data": items.get("user-data", "")})
        return vm

    # -- instances ---------------------------------------------------------------------------------------------------

    def _compute_instances_insert(self, given: dict[str, str], body: dict[str, Any]) -> dict[str, Any]:
        zone = _known_zone(given["zone"])
        order = Order(body, zone, given.get("requestId"), tuple(self.networks))
        _expect_right(problems(INSTANCE_RULES, order))
        known = self._tries.get((zone, given.get("requestId", "")))
        if known is not None:
            return self._shown(known)
        if f"{zone}/{body['name']}" in self._live:
            said = f"The resource 'projects/{PROJECT}/zones/{zone}/instances/{body['name']}' already exists"
            raise Refusal(409, "alreadyExists", said)
        try:
            self._take(order)
        except Struck as struck:
            return self._failed(FAILED[struck.fault], {**given, "instance": body["name"]})
        if self.breaks is not None and not self.breaks[2]:
            self.plane.give_back(f"{zone}/{body['name']}")
            return self._failed(self.breaks[:2], {**given, "instance": body["name"]})
        op = self._note("insert", self._make(body["name"], zone, body))
        if self.breaks is not None and op.vm is not None:
            op.vm.doomed = self.plane.now() + self.breaks[2]
        self._tries[zone, given.get("requestId", op.name)] = op
        return {**self._shown(op), "status": "RUNNING", "progress": 0}

    def _take(self, order: Order) -> None:
        """Takes from what there is.

        Raises:
            Struck: there is none, or the project may not have it.
        """
        needed = _wares.needs(order.machine, order.cards, spot=order.spot)
        uses = {
            name if name in _wares.PROJECT_QUOTAS else f"{order.region} {name}": amount
            for name, amount in needed.items()
        }
        self.plane.take(f"{order.zone}/{order.body['name']}", type=order.machine, zone=order.zone, uses=uses)

    def _failed(self, words: tuple[str, str], given: Mapping[str, str]) -> dict[str, Any]:
        """An operation that was accepted, and is going to fail."""
        key = (given["zone"], given.get("requestId", ""))
        if key in self._tries:
            return self._shown(self._tries[key])
        number, now = next(self._numbers), self.plane.now()
        op = Op(number, "insert", given["zone"], given["instance"], datetime.now(UTC), now, error=words)
        self._ops.append(op)
        self._tries[key] = op
        return op.shown(PROJECT, over=False)

    def _compute_instances_get(self, given: dict[str, str], _: Any) -> dict[str, Any]:
        return self._vm_shown(self._vm(given))

    def _compute_instances_delete(self, given: dict[str, str], _: Any) -> dict[str, Any]:
        vm = self._vm(given)
        if vm.asked_to_end is not None:
            said = f"The resource 'projects/{PROJECT}/zones/{vm.zone}/instances/{vm.name}' is not ready"
            raise Refusal(400, "resourceNotReady", said)
        op = self._note("delete", vm)
        self._begin_end(vm)
        return self._shown(op)

    def _compute_instances_getSerialPortOutput(self, given: dict[str, str], _: Any) -> dict[str, Any]:  # noqa: N802  # Google's name
        vm = self._vm(given)
        text = self._machines.console(vm.name) if self._machines is not None else ""
        return {"kind": "compute#serialPortOutput", "contents": text, "start": "0", "next": str(len(text.encode()))}

    def _compute_instances_aggregatedList(self, given: dict[str, str], _: Any) -> dict[str, Any]:  # noqa: N802  # Google's name
        """The instances of all zones, by zone; zones without any say so."""
        matches = _filter(given.get("filter"))
        found = sorted((vm for vm in self._live.values() if self.plane.listed(vm.born)), key=lambda vm: vm.key)
        page, more = _page([vm for vm in found if matches(vm.body.get("labels", {}))], given)
        items: dict[str, Any] = {}
        for zone in _zones():
            here = [self._vm_shown(vm) for vm in page if vm.zone == zone]
            said = {"code": "NO_RESULTS_ON_PAGE", "message": f"There are no results for scope 'zones/{zone}'."}
            items[f"zones/{zone}"] = {"instances": here} if here else {"warning": said}
        return {"kind": "compute#instanceAggregatedList", "id": "aggregated", "items": items, **more}

    def _vm(self, given: dict[str, str]) -> Vm:
        vm = self._live.get(f"{given['zone']}/{given['instance']}")
        if vm is None:
            said = (
                f"The resource 'projects/{PROJECT}/zones/{given['zone']}/instances/{given['instance']}' was not found"
            )
            raise Refusal(404, "notFound", said)
        return vm

    def _vm_shown(self, vm: Vm) -> dict[str, Any]:
        return vm.shown(PROJECT, vm.status(self.plane.now(), self._boot))

    # -- operations --------------------------------------------------------------------------------------------------

    def _compute_zoneOperations_get(self, given: dict[str, str], _: Any) -> dict[str, Any]:  # noqa: N802  # Google's name
        for op in self._ops:
            if (op.zone, op.name) == (given["zone"], given["operation"]):
                return self._shown(op)
        raise Refusal(404, "notFound", f"The resource '{given['operation']}' was not found")

    def _compute_zoneOperations_list(self, given: dict[str, str], _: Any) -> dict[str, Any]:  # noqa: N802  # Google's name
        """Only the filter by the target is understood."""
        wanted = re.fullmatch(r'targetLink eq "(.+)"', given.get("filter", ""))
        if wanted is None:
            raise Refusal(400, "invalid", f"Invalid list filter expression: {given.get('filter')}")
        link = re.compile(wanted[1])
        shown = [self._shown(op) for op in self._ops if op.zone == given["zone"] and self.plane.listed(op.born)]
        page, more = _page([one for one in shown if link.fullmatch(one["targetLink"])], given)
        return {"kind": "compute#operationList", "id": "operations", "items": page, **more}

    def _shown(self, op: Op) -> dict[str, Any]:
        return op.shown(PROJECT, over=op.over(self.plane.now(), self._boot))

    # -- what there is -----------------------------------------------------------------------------------------------

    def _compute_projects_get(self, _: dict[str, str], __: Any) -> dict[str, Any]:
        quotas = [self._quota(metric, metric) for metric in _wares.PROJECT_QUOTAS]
        return {"kind": "compute#project", "name": PROJECT, "quotas": quotas}

    def _compute_regions_list(self, given: dict[str, str], _: Any) -> dict[str, Any]:
        page, more = _page([self._region(name) for name in _wares.REGIONS], given)
        return {"kind": "compute#regionList", "id": "regions", "items": page, **more}

    def _region(self, name: str) -> dict[str, Any]:
        zones = [f"{BASE}/projects/{PROJECT}/zones/{name}-{letter}" for letter in _wares.ZONES]
        quotas = [self._quota(metric, f"{name} {metric}") for metric in _wares.QUOTAS]
        return {"kind": "compute#region", "name": name, "status": "UP", "zones": zones, "quotas": quotas}

    def _quota(self, metric: str, name: str) -> dict[str, Any]:
        limit = self.plane.limit(name)
        return {"metric": metric, "limit": 1e6 if limit is None else limit, "usage": 0.0}

    def _compute_machineTypes_list(self, given: dict[str, str], _: Any) -> dict[str, Any]:  # noqa: N802  # Google's name
        zone = _known_zone(given["zone"])
        found = [_machine(name, ware, zone) for name, ware in _wares.WARES.items() if zone[-1] in ware.zones]
        page, more = _page(found, given, 8)
        return {"kind": "compute#machineTypeList", "id": "types", "items": page, **more}

    def _compute_acceleratorTypes_list(self, given: dict[str, str], _: Any) -> dict[str, Any]:  # noqa: N802  # Google's name
        zone = _known_zone(given["zone"])
        found = [
            {"kind": "compute#acceleratorType", "name": name, "maximumCardsPerInstance": most}
            for name, (zones, most) in (*_wares.CARDS.items(), ("nvidia-tesla-t4-vws", ("ab", 4)), ("ct5lp", ("a", 8)))
            if zone[-1] in zones
        ]
        page, more = _page(found, given, 2)
        return {"kind": "compute#acceleratorTypeList", "id": "cards", "items": page, **more}

    def _compute_images_getFromFamily(self, given: dict[str, str], _: Any) -> dict[str, Any]:  # noqa: N802  # Google's name
        return _image(f"projects/{given['project']}/global/images/family/{given['family']}")

    def _compute_images_get(self, given: dict[str, str], _: Any) -> dict[str, Any]:
        return _image(f"projects/{given['project']}/global/images/{given['image']}")

    def _compute_networks_get(self, given: dict[str, str], _: Any) -> dict[str, Any]:
        if given["network"] not in self.networks:
            said = f"The resource 'projects/{given['project']}/global/networks/{given['network']}' was not found"
            raise Refusal(404, "notFound", said)
        return {"kind": "compute#network", "name": given["network"], "autoCreateSubnetworks": True}

    def _compute_subnetworks_get(self, given: dict[str, str], _: Any) -> dict[str, Any]:
        if given["subnetwork"] not in self.networks:
            said = f"The resource 'projects/{given['project']}/.../{given['subnetwork']}' was not found"
            raise Refusal(404, "notFound", said)
        return {"kind": "compute#subnetwork", "name": given["subnetwork"]}

    def _compute_firewalls_get(self, given: dict[str, str], _: Any) -> dict[str, Any]:
        rule = self._firewalls.get(given["firewall"])
        if rule is None:
            said = f"The resource 'projects/{given['project']}/global/firewalls/{given['firewall']}' was not found"
            raise Refusal(404, "notFound", said)
        return {"kind": "compute#firewall", **rule}

    def _compute_firewalls_insert(self, _: dict[str, str], body: dict[str, Any]) -> dict[str, Any]:
        _expect_right(problems(FIREWALL_RULES, Order(body, networks=tuple(self.networks))))
        if body["name"] in self._firewalls:
            raise Refusal(409, "alreadyExists", f"The resource '{body['name']}' already exists")
        self._firewalls[body["name"]] = body
        return {"kind": "compute#operation", "name": "operation-rule", "operationType": "insert", "status": "RUNNING"}

    @property
    def rules(self) -> list[dict[str, Any]]:
        """The rules of the firewall."""
        return list(self._firewalls.values())

    # -- the other APIs ----------------------------------------------------------------------------------------------

    def _cloudbilling_services_skus_list(self, given: dict[str, str], _: Any) -> dict[str, Any]:
        page, more = _page(self._prices, given, 200)
        return {"skus": page, **more}

    def _cloudresourcemanager_projects_testIamPermissions(self, _: dict[str, str], body: Any) -> dict[str, Any]:  # noqa: N802  # Google's name
        return {"permissions": [one for one in body["permissions"] if one not in self.denied]}


def _unknown(*_: object) -> dict[str, Any]:
    raise Refusal(501, "notImplemented", "This method is not emulated")


def _expect_right(found: Iterator[str]) -> None:
    wrong = next(found, None)
    if wrong is not None:
        raise Refusal(400, "invalid", wrong)


def _zones() -> Iterator[str]:
    for region in _wares.REGIONS:
        yield from (f"{region}-{letter}" for letter in _wares.ZONES)


def _known_zone(zone: str) -> str:
    if zone not in _zones():
        raise Refusal(400, "invalid", f"Invalid value for field 'zone': '{zone}'. Unknown zone.")
    return zone


def _filter(text: str | None) -> Callable[[Mapping[str, str]], bool]:
    """Only the filter by one label is understood."""
    if text is None:
        return lambda _: True
    found = re.fullmatch(r'labels\.([a-z0-9_-]+)="?([^"]*)"?', text)
    if found is None:
        raise Refusal(400, "invalid", f"Invalid list filter expression: {text}")
    return lambda labels: labels.get(found[1]) == found[2]


def _page(entries: list[Any], given: Mapping[str, str], size: int = PAGE) -> tuple[list[Any], dict[str, str]]:
    most = int(given.get("maxResults", given.get("pageSize", size)))
    if not 0 <= most <= 5000:
        raise Refusal(400, "invalid", f"Invalid value for field 'maxResults': '{most}'.")
    start = int(given.get("pageToken", 0))
    end = start + min(size, most or size)
    return entries[start:end], {"nextPageToken": str(end)} if end < len(entries) else {}


def _machine(name: str, ware: _wares.Ware, zone: str) -> dict[str, Any]:
    values: dict[str, Any] = {
        "kind": "compute#machineType",
        "name": name,
        "guestCpus": ware.cpus,
        "memoryMb": ware.memory_mib,
        "isSharedCpu": ware.shared,
        "architecture": ware.arch,
        "zone": zone,
    }
    if ware.gpus:
        values["accelerators"] = [
            {"guestAcceleratorType": card, "guestAcceleratorCount": count} for card, count in ware.gpus
        ]
    if ware.scratch:
        values["bundledLocalSsds"] = {"defaultInterface": "NVME", "partitionCount": ware.scratch}
    return values


def _image(path: str) -> dict[str, Any]:
    found = image_at(path)
    if found is None:
        raise Refusal(404, "notFound", f"The resource '{path}' was not found")
    name, size, arch = found
    return {"kind": "compute#image", "name": name, "diskSizeGb": str(size), "architecture": arch, "status": "READY"}


def _by_hand(labels: dict[str, str]) -> dict[str, Any]:
    interface = {"network": f"projects/{PROJECT}/global/networks/default"}
    return {
        "machineType": "zones/us-central1-a/machineTypes/e2-micro",
        "disks": [{"boot": True, "autoDelete": True}],
        "networkInterfaces": [interface],
        "labels": labels,
    }


def _server(vm: Vm) -> Server:
    labels = vm.body.get("labels", {})
    return Server(
        id=vm.name,
        name=vm.name,
        region=vm.zone.rpartition("-")[0],
        labels=labels,
        intent=_uuid(labels.get("intent")),
        owner=_uuid(labels.get("owner")),
        billed=not vm.gone,
        born_with=labels,
    )


def _uuid(text: str | None) -> UUID | None:
    try:
        return UUID(text) if text else None
    except ValueError:
        return None


__all__ = ["PROJECT", "Gcp"]
