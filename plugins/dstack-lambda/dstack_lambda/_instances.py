"""From the contract's request to Lambda's, and from Lambda's description of an instance back."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterable, Iterator
from datetime import UTC, datetime
from typing import Any
from uuid import UUID

from dstack_core.plugin import Endpoint, Instance, InstanceRef, InstanceRequest, InstanceState, StateReason
from dstack_lambda._config import LambdaConfig

_STATES = {
    "booting": InstanceState.PENDING,
    "active": InstanceState.RUNNING,
    # Broken or switched off, and billed on: whoever asks has lost touch with it already.
    "unhealthy": InstanceState.STOPPING,
    # Taken away by Lambda. It is told to end it all the same, and asked until it says that it is gone.
    "preempted": InstanceState.STOPPING,
    "terminating": InstanceState.STOPPING,
    "terminated": InstanceState.TERMINATED,
}
_UNKNOWN = InstanceState.RUNNING
"""For a state that is new: it is taken to be billed, and its agent says whether it is any good."""
_ENDING = (InstanceState.STOPPING, InstanceState.TERMINATED)
_REASONS = {"preempted": StateReason.SPOT_INTERRUPTION}

# What Lambda allows: keys are of fewer letters than ours, and shorter.
_KEY = re.compile(r"[a-z][a-z0-9-]{1,54}")
_OURS = "dstack:"
_REQUEST, _CREATED = _OURS + "request", _OURS + "created"


def request_digest(request: InstanceRequest) -> str:
    """Tells whether two requests are the same, byte for byte."""
    return hashlib.sha256(request.model_dump_json().encode()).hexdigest()[:32]


def order(config: LambdaConfig, request: InstanceRequest, ssh_key: str, now: datetime) -> dict[str, Any]:
    """The body of a launch."""
    body: dict[str, Any] = {
        "region_name": request.offer.region,
        "instance_type_name": request.offer.instance_type,
        "ssh_key_names": [ssh_key],
        "name": request.name,
        "hostname": request.name,
        "user_data": request.user_data,
        "tags": list(_to_tags({**_marks(request, now), **request.tags})),
    }
    if config.image:
        body["image"] = {"id": config.image}
    elif config.image_family:
        body["image"] = {"family": config.image_family}
    return body


def accepted(request: InstanceRequest, id: str, now: datetime) -> Instance:
    """The instance that a launch became: of it Lambda says no more than its id."""
    return Instance(
        ref=InstanceRef(backend="lambda", id=id, region=request.offer.region),
        intent=request.intent,
        owner=request.owner,
        state=InstanceState.PENDING,
        created_at=now,
    )


def is_of(described: dict[str, Any], request: InstanceRequest) -> bool:
    """Whether an instance was launched by exactly this request."""
    return tags_of(described).get(_REQUEST) == request_digest(request)


def is_gone(described: dict[str, Any]) -> bool:
    """Whether it is no longer billed."""
    return _STATES.get(str(described.get("status"))) is InstanceState.TERMINATED


def instance(described: dict[str, Any]) -> Instance | None:
    """An instance, from Lambda's description; `None` for one that is not ours."""
    tags = tags_of(described)
    try:
        intent, owner = UUID(tags["intent"]), UUID(tags["owner"])
    except (KeyError, ValueError):
        return None
    status = str(described.get("status"))
    state = _STATES.get(status, _UNKNOWN)
    address = described.get("ip")
    return Instance(
        ref=InstanceRef(backend="lambda", id=described["id"], region=described["region"]["name"]),
        intent=intent,
        owner=owner,
        state=state,
        reason=_REASONS.get(status),
        created_at=_created(tags, intent),
        endpoint=Endpoint(ssh_host=address) if address and state not in _ENDING else None,
    )


# -- tags -------------------------------------------------------------------------------------------------------------


def tags_of(described: dict[str, Any]) -> dict[str, str]:
    """Its tags, as they were asked for."""
    return dict(_from_tags(described.get("tags") or ()))


def _marks(request: InstanceRequest, now: datetime) -> dict[str, str]:
    """What Lambda does not keep of an instance: the request that it came from, and when."""
    return {_REQUEST: request_digest(request), _CREATED: now.isoformat()}


def _created(tags: dict[str, str], intent: UUID) -> datetime:
    """When it was asked for. An intent begins with the time at which it was made."""
    try:
        return datetime.fromisoformat(tags[_CREATED]).astimezone(UTC)
    except (KeyError, ValueError):
        return datetime.fromtimestamp((intent.int >> 80) / 1000, UTC)


def _to_tags(tags: dict[str, str]) -> Iterator[dict[str, str]]:
    """Each as it is, or, where Lambda would not take its key, key and value as the value of a key of ours."""
    for number, (key, value) in enumerate(sorted(tags.items())):
        if _KEY.fullmatch(key) or key in (_REQUEST, _CREATED):
            yield {"key": key, "value": value}
        else:
            yield {"key": f"{_OURS}{number}", "value": f"{key}={value}"}


def _from_tags(tags: Iterable[dict[str, str]]) -> Iterator[tuple[str, str]]:
    for tag in tags:
        key, value = str(tag.get("key", "")), str(tag.get("value", ""))
        if key.startswith(_OURS) and key.removeprefix(_OURS).isdecimal():
            key, _, value = value.partition("=")
        yield key, value
