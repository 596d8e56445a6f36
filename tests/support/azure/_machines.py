"""Virtual machines: what is made with them, how they start, and what goes with them."""

from __future__ import annotations

import base64
from collections.abc import Iterator
from typing import Any
from uuid import uuid4

from dstack_core.testing import Event, FaultPlane
from dstack_core.testing.nimbus._machines import Machines
from tests.support.azure import _wares
from tests.support.azure._resources import Resource, Store
from tests.support.azure._wire import Refused

_PARTS = ("networkInterfaces", "publicIPAddresses", "disks")
_NETWORK, _COMPUTE = "Microsoft.Network", "Microsoft.Compute"


class Computers:
    """The machines of the subscription.

    Args:
        store: where everything is.
        plane: what is scarce, and the clock.
        machines: what they really are, if anything.

    Attributes:
        boot: seconds from being accepted to running.
        late: codes with which the next ones fail after they were accepted.
        made: names of all that ever were.
    """

    def __init__(self, store: Store, plane: FaultPlane, machines: Machines | None) -> None:
        self._store = store
        self._plane = plane
        self._machines = machines
        self._addresses = 0
        self.boot = 0.0
        self.late: list[str] = []
        self.made: list[str] = []

    def all(self) -> list[Resource]:
        """Every machine that is there."""
        return list(self._store.of("virtualMachines"))

    def one(self, name: str) -> Resource:
        """A machine by its name."""
        return next(one for one in self.all() if one.name == name)

    def leftovers(self) -> Iterator[str]:
        """Interfaces, addresses and disks without a machine."""
        for kind in _PARTS:
            for one in self._store.of(kind):
                if one.parent is None or self._store.find(one.parent) is None:
                    yield f"{kind} {one.name}"

    # -- beginning ---------------------------------------------------------------------------------------------------

    def make(self, id: str, body: dict[str, Any]) -> Resource:
        """Accepts a machine, with all that belongs to it.

        Raises:
            Struck: there is none, or the subscription may not have it.
        """
        self._take(id, body)
        machine = self._store.put(id, body, "Creating")
        machine.body["properties"] |= {"vmId": str(uuid4()), "timeCreated": machine.body["made"]}
        self.made.append(machine.name)
        machine.late = self.late.pop(0) if self.late else None
        machine.statuses = [_status("ProvisioningState/creating")]
        self._make_disk(machine)
        self._make_interfaces(machine)
        if self._machines is not None and machine.late is None:
            text = (body["properties"].get("osProfile") or {}).get("customData", "")
            self._machines.start(machine.name, {"user_data": base64.b64decode(text).decode()})
        return machine

    def _take(self, id: str, body: dict[str, Any]) -> None:
        size, region = body["properties"]["hardwareProfile"]["vmSize"], body["location"]
        ware = _wares.WARES[size]
        if region in ware.closed:
            raise Refused(409, "SkuNotAvailable", f"The requested size {size} is not available for this subscription.")
        zone = "-".join([region, *(body.get("zones") or [])])
        quotas = _wares.quotas_of(size, is_spot=body["properties"].get("priority") == "Spot")
        uses = {f"{region} {quota}": float(ware.machine[0]) for quota in quotas}
        self._plane.take(id.lower(), type=size, zone=zone, uses=uses)

    def _make_disk(self, machine: Resource) -> None:
        disk = machine.body["properties"].get("storageProfile", {}).get("osDisk")
        if disk is None:
            return
        size = {"diskSizeGB": disk.get("diskSizeGB", 30)}
        made = self._part(machine, _COMPUTE, "disks", disk["name"], size, machine.body.get("tags") or {})
        made.stays = disk.get("deleteOption") != "Delete"
        disk["managedDisk"] = {**disk["managedDisk"], "id": made.id}

    def _make_interfaces(self, machine: Resource) -> None:
        profile = machine.body["properties"].get("networkProfile") or {}
        made = [self._make_interface(machine, one) for one in profile.pop("networkInterfaceConfigurations", ())]
        profile.pop("networkApiVersion", None)
        if made:
            profile["networkInterfaces"] = [{"id": card.id, "properties": {"primary": True}} for card in made]

    def _make_interface(self, machine: Resource, wanted: dict[str, Any]) -> Resource:
        self._addresses += 1
        entries = []
        for entry in wanted["properties"]["ipConfigurations"]:
            inner = {"privateIPAddress": f"10.0.{self._addresses // 250}.{4 + self._addresses % 250}"}
            public = entry["properties"].get("publicIPAddressConfiguration")
            if public is not None:
                inner |= {"publicIPAddress": {"id": self._make_address(machine, public).id}}  # type: ignore[dict-item]  # JSON
            entries.append({"name": entry["name"], "properties": inner})
        # Azure adds letters of its own to the name.
        name = f"{wanted['name']}-{uuid4().hex[:8]}"
        values = {"ipConfigurations": entries, "virtualMachine": {"id": machine.id}}
        made = self._part(machine, _NETWORK, "networkInterfaces", name, values, wanted.get("tags") or {})
        made.stays = wanted["properties"].get("deleteOption") != "Delete"
        return made

    def _make_address(self, machine: Resource, wanted: dict[str, Any]) -> Resource:
        name = f"{wanted['name']}-{uuid4().hex[:8]}"
        number = self._addresses
        address = {"ipAddress": f"20.{number // 62500}.{number // 250 % 250}.{1 + number % 250}"}
        made = self._part(machine, _NETWORK, "publicIPAddresses", name, address, wanted.get("tags") or {})
        made.stays = wanted["properties"].get("deleteOption") != "Delete"
        return made

    def _part(
        self, machine: Resource, space: str, kind: str, name: str, values: dict[str, Any], tags: dict[str, str]
    ) -> Resource:
        path = f"{machine.id.partition('/providers/')[0]}/providers/{space}/{kind}/{name}"
        body = {"location": machine.body["location"], "tags": dict(tags), "properties": values}
        return self._store.put(path, body, "Succeeded", machine.id)

    def leave_parts(self, group: str, region: str, tags: dict[str, str]) -> None:
        """All parts of a machine that never was."""
        root = next(one.id for one in self._store.all() if one.kind == "resourceGroups" and one.name == group)
        ghost = Resource(f"{root}/providers/{_COMPUTE}/virtualMachines/ghost", {"location": region}, 0.0)
        address = self._part(
            ghost, _NETWORK, "publicIPAddresses", f"{tags['name']}-ip", {"ipAddress": "20.9.9.9"}, tags
        )
        entry = {"name": "main", "properties": {"publicIPAddress": {"id": address.id}}}
        self._part(ghost, _NETWORK, "networkInterfaces", f"{tags['name']}-nic", {"ipConfigurations": [entry]}, tags)
        self._part(ghost, _COMPUTE, "disks", f"{tags['name']}-disk", {}, tags)

    # -- passing -----------------------------------------------------------------------------------------------------

    def tick(self) -> None:
        """Time has passed."""
        for machine in self.all():
            properties, age = machine.body["properties"], self._plane.now() - machine.born
            if machine.ends is not None and self._plane.now() >= machine.ends:
                self._gone(machine)
            elif properties["provisioningState"] == "Creating" and age >= self.boot:
                self._settle(machine)
            elif self._machines is not None and _power(machine) == "running":
                self._look_at(machine, self._machines)

    def _settle(self, machine: Resource) -> None:
        """It runs, or it has failed."""
        if machine.late is not None:
            machine.body["properties"]["provisioningState"] = "Failed"
            code = f"ProvisioningState/failed/{machine.late}"
            machine.statuses = [{**_status(code), "message": f"{machine.late}: we do not have sufficient capacity."}]
            self._plane.give_back(machine.id.lower())
            return
        machine.body["properties"]["provisioningState"] = "Succeeded"
        machine.statuses = [_status("ProvisioningState/succeeded"), _status("PowerState/running")]

    def _look_at(self, machine: Resource, machines: Machines) -> None:
        """A machine that shut itself down is stopped, and billed on."""
        for one in self._store.of("publicIPAddresses"):
            if one.parent == machine.id:
                one.body["properties"]["ipAddress"] = machines.address(machine.name)
        if not machines.lives(machine.name):
            _switch(machine, "stopped")

    # -- ending ------------------------------------------------------------------------------------------------------

    def end(self, machine: Resource) -> None:
        """Begins to delete it."""
        if machine.ends is None:
            machine.ends = self._plane.now() + 0.02
            machine.body["properties"]["provisioningState"] = "Deleting"
            if self._machines is not None:
                self._machines.end(machine.name)

    def _gone(self, machine: Resource) -> None:
        """It is gone, and with it what was made to go with it."""
        self._plane.give_back(machine.id.lower())
        self._store.drop(machine)
        for kind in _PARTS:
            for one in list(self._store.of(kind)):
                if one.parent == machine.id and not one.stays:
                    self._store.drop(one)

    def check_free(self, resource: Resource) -> None:
        """Refuses to delete what something else holds.

        Raises:
            Refused: it is held.
        """
        if resource.parent is not None and self._store.find(resource.parent) is not None:
            raise Refused(409, "OperationNotAllowed", f"{resource.name} is attached to {resource.parent}.")
        if resource.kind == "publicIPAddresses" and any(
            resource.id in str(card.body) for card in self._store.of("networkInterfaces")
        ):
            raise Refused(400, "PublicIPAddressCannotBeDeleted", f"{resource.name} is in use by an interface.")

    def befall(self, name: str, event: Event) -> None:
        """Something happens to it."""
        machine = self.one(name)
        if self._machines is not None:
            self._machines.end(name)
        if event is Event.FAILURE:
            self._gone(machine)
        elif event is Event.SHUTDOWN_FROM_INSIDE:
            _switch(machine, "stopped")
        elif event is Event.SPOT_INTERRUPTION and machine.body["properties"].get("evictionPolicy") == "Delete":
            self._gone(machine)
        else:
            _switch(machine, "deallocated")


def _status(code: str) -> dict[str, Any]:
    return {"code": code, "level": "Info", "displayStatus": code.partition("/")[2]}


def _power(machine: Resource) -> str:
    codes = [one["code"] for one in machine.statuses if one["code"].startswith("PowerState/")]
    return str(codes[0]).partition("/")[2] if codes else ""


def _switch(machine: Resource, power: str) -> None:
    machine.body["properties"]["provisioningState"] = "Succeeded"
    machine.statuses = [_status("ProvisioningState/succeeded"), _status(f"PowerState/{power}")]
