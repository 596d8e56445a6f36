"""Instances and operations, and how Compute Engine shows them."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

BASE = "https://www.googleapis.com/compute/v1"


@dataclass
class Vm:
    """One instance.

    Attributes:
        body: what was asked for.
        born: by the plane's clock.
        made: by the wall's.
        off: why it is switched off, if it is.
        asked_to_end: when, by the plane's clock.
        gone: it exists no more.
        doomed: until when its creation is under way, to fail then.
    """

    id: int
    name: str
    zone: str
    body: dict[str, Any]
    born: float
    made: datetime
    number: int
    off: bool = False
    asked_to_end: float | None = None
    gone: bool = False
    address: str | None = None
    doomed: float | None = None

    @property
    def key(self) -> str:
        """Where names are unique."""
        return f"{self.zone}/{self.name}"

    @property
    def disk_stays(self) -> bool:
        """Whether its disk outlives it."""
        return any(not disk.get("autoDelete") for disk in self.body["disks"])

    @property
    def spot(self) -> bool:
        """Whether it may be taken away."""
        return bool(self.body.get("scheduling", {}).get("provisioningModel") == "SPOT")

    def status(self, now: float, boot: float) -> str:
        """In Google's words."""
        if self.asked_to_end is not None:
            return "STOPPING"
        if self.off:
            return "TERMINATED"
        if self.doomed is not None:
            return "PROVISIONING"
        return "RUNNING" if now - self.born >= boot else "STAGING"

    def shown(self, project: str, status: str) -> dict[str, Any]:
        """As the API has it."""
        path = f"{BASE}/projects/{project}/zones/{self.zone}"
        return {
            "kind": "compute#instance",
            "id": str(self.id),
            "creationTimestamp": stamp(self.made),
            "name": self.name,
            "tags": self.body.get("tags", {}),
            "machineType": f"{BASE}/projects/{project}/{self.body['machineType']}",
            "status": status,
            "zone": path,
            "networkInterfaces": [self._interface(one) for one in self.body["networkInterfaces"]],
            "disks": [{"boot": True, "autoDelete": disk.get("autoDelete", False)} for disk in self.body["disks"]],
            "metadata": {"kind": "compute#metadata", "items": self.body.get("metadata", {}).get("items", [])},
            "scheduling": self.body.get("scheduling", {}),
            "labels": self.body.get("labels", {}),
            "selfLink": f"{path}/instances/{self.name}",
        }

    def _interface(self, wanted: dict[str, Any]) -> dict[str, Any]:
        inside = f"10.{128 + self.number // 62500 % 64}.{self.number // 250 % 250}.{self.number % 250 + 2}"
        outside = self.address or f"203.0.113.{self.number % 250 + 2}"
        configs = [{**one, "natIP": outside} for one in wanted.get("accessConfigs", ())]
        return {**wanted, "networkIP": self.address or inside, "accessConfigs": configs, "name": "nic0"}


@dataclass
class Op:
    """One operation.

    Attributes:
        kind: `insert`.
        vm: what it is about, if there is anything.
        error: code and message, if it fails.
        born: by the plane's clock.
    """

    id: int
    kind: str
    zone: str
    target: str
    at: datetime
    born: float
    vm: Vm | None = None
    error: tuple[str, str] | None = None

    @property
    def name(self) -> str:
        """Its own."""
        return f"operation-{self.id}"

    def over(self, now: float, boot: float) -> bool:
        """Whether it has ended."""
        if self.error is not None or self.vm is None:
            return True
        if self.kind == "insert" and self.vm.doomed is not None:
            return False
        if self.kind == "insert":
            return self.vm.gone or self.vm.off or now - self.born >= boot
        return self.vm.gone if self.kind == "delete" else True

    def shown(self, project: str, *, over: bool) -> dict[str, Any]:
        """As the API has it."""
        path = f"{BASE}/projects/{project}/zones/{self.zone}"
        values: dict[str, Any] = {
            "kind": "compute#operation",
            "id": str(self.id),
            "name": self.name,
            "zone": path,
            "operationType": self.kind,
            "targetLink": f"{path}/instances/{self.target}",
            "status": "DONE" if over else "RUNNING",
            "progress": 100 if over else 0,
            "insertTime": stamp(self.at),
            "startTime": stamp(self.at),
            "selfLink": f"{path}/operations/{self.name}",
        }
        if self.vm is not None:
            values["targetId"] = str(self.vm.id)
        if over and self.error is not None:
            code, message = self.error
            values["error"] = {"errors": [{"code": code, "message": message}]}
            values |= {"httpErrorStatusCode": 503, "httpErrorMessage": "SERVICE UNAVAILABLE"}
        return values


def stamp(time: datetime) -> str:
    """A time as Google writes it, with an offset."""
    return time.astimezone(UTC).isoformat(timespec="milliseconds").replace("+00:00", "-00:00")
