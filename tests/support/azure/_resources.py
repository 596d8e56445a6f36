"""What there is in the subscription: resources by their ids, which know no capital letters."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any


@dataclass
class Resource:
    """One resource.

    Attributes:
        id: its id.
        body: as it is shown, without what a view adds.
        born: when it was made, on the clock of the faults.
        born_with: its tags in the call that made it.
        statuses: of a machine, for its instance view.
        late: with which code a machine fails after it was accepted.
        parent: id of the machine that it came with.
        stays: it outlives that machine.
        ends: a machine is gone at this time.
        looks: how often it is looked at before it is ready.
    """

    id: str
    body: dict[str, Any]
    born: float
    born_with: dict[str, str] = field(default_factory=dict)
    statuses: list[dict[str, Any]] = field(default_factory=list)
    late: str | None = None
    parent: str | None = None
    stays: bool = False
    ends: float | None = None
    looks: int = 0

    @property
    def name(self) -> str:
        """Its name."""
        return self.id.rpartition("/")[2]

    @property
    def group(self) -> str:
        """Its resource group."""
        return self.id.split("/")[4]

    @property
    def kind(self) -> str:
        """As `virtualMachines`."""
        return self.id.split("/")[-2]

    @property
    def type(self) -> str:
        """As `Microsoft.Compute/virtualMachines`."""
        parts = self.id.split("/")
        return f"{parts[-3]}/{parts[-2]}"

    def shown(self, *, view: bool = False) -> dict[str, Any]:
        """As Azure shows it, without what it never gives away."""
        body: dict[str, Any] = json.loads(json.dumps(self.body))
        body["properties"].get("osProfile", {}).pop("customData", None)
        if view:
            body["properties"]["instanceView"] = {"statuses": self.statuses}
        return body

    def listed(self) -> dict[str, Any]:
        """As the listing of resources shows it."""
        kept: dict[str, Any] = {name: self.body[name] for name in ("location", "tags") if name in self.body}
        return {"id": self.id, "name": self.name, "type": self.type, **kept, "createdTime": self.body["made"]}


class Store:
    """All resources.

    Args:
        clock: when something is made.
    """

    def __init__(self, clock: Callable[[], float]) -> None:
        self._clock = clock
        self._all: dict[str, Resource] = {}

    def find(self, id: str) -> Resource | None:
        """A resource by its id."""
        return self._all.get(id.lower())

    def all(self) -> list[Resource]:
        """Everything, in the order in which it was made."""
        return list(self._all.values())

    def of(self, kind: str) -> Iterator[Resource]:
        """Everything of a kind, as `networkInterfaces`."""
        return (one for one in self.all() if one.kind == kind)

    def put(self, id: str, body: Mapping[str, Any], state: str, parent: str | None = None) -> Resource:
        """Makes a resource, or writes over it."""
        made = datetime.now(UTC).isoformat().replace("+00:00", "Z")
        resource = Resource(id, {}, self._clock(), dict(body.get("tags") or {}), parent=parent)
        properties = {**(body.get("properties") or {}), "provisioningState": state}
        known = {"id": id, "name": resource.name, "type": resource.type, "made": made}
        resource.body = {**body, **known, "properties": properties}
        self._all[id.lower()] = resource
        return resource

    def drop(self, resource: Resource) -> None:
        """It is gone."""
        self._all.pop(resource.id.lower(), None)
