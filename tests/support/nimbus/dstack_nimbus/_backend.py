"""The hooks, over the REST API of Nimbus."""

from __future__ import annotations

import ssl
from collections.abc import Iterator
from datetime import datetime
from functools import cache
from typing import Any
from urllib.parse import quote
from uuid import UUID

import httpx

from dstack_core.plugin import (
    AuthenticationError,
    Availability,
    BackendError,
    Endpoint,
    Gpu,
    Instance,
    InstanceRef,
    InstanceRequest,
    InstanceState,
    InvalidRequestError,
    MachineResources,
    NoCapacityError,
    Offer,
    QuotaExceededError,
    RateLimitedError,
    Requirements,
    StateReason,
    UnknownOutcomeError,
    hookimpl,
)
from dstack_nimbus import NimbusConfig

# Shorter than the hook's own time limit, so that it is us who say what is known.
_TIMEOUT = 4.0
_STATES = {
    "starting": InstanceState.PENDING,
    "running": InstanceState.RUNNING,
    "stopped": InstanceState.STOPPING,
    "deleting": InstanceState.STOPPING,
    "deleted": InstanceState.TERMINATED,
    "failed": InstanceState.TERMINATED,
}
_REASONS = {
    "user": StateReason.REQUESTED,
    "spot": StateReason.SPOT_INTERRUPTION,
    "guest": StateReason.SHUTDOWN_FROM_INSIDE,
    "fault": StateReason.FAILURE,
}
_ARCHS = {"x86_64": "x86", "aarch64": "arm"}


class NimbusBackend:
    """One account. Its client may be used by several threads at once."""

    def __init__(self, config: NimbusConfig) -> None:
        self._regions = config.regions
        self._http = httpx.Client(
            base_url=config.url,
            headers={"Authorization": f"Bearer {config.token.get_secret_value()}"},
            timeout=_TIMEOUT,
            verify=_trusted(),
        )

    def close(self) -> None:
        """Closes the connections."""
        self._http.close()

    @hookimpl
    def dstack_list_offers(self, requirements: Requirements) -> list[Offer]:
        """The whole catalogue; the core filters."""
        types = self._call("GET", "/v1/types")["types"]
        return [offer for machine in types for offer in _offers(machine) if self._may_be_in(offer.region)]

    @hookimpl
    def dstack_create_instance(self, request: InstanceRequest) -> Instance:
        """One call, with the key of idempotency and the tags in it."""
        order = {
            "name": request.name,
            "type": request.offer.instance_type,
            "zone": request.offer.zone,
            "spot": request.offer.spot,
            "labels": request.tags,
            "ssh_keys": list(request.ssh_public_keys),
            "user_data": request.user_data,
            "delete_at": request.expires_at.isoformat() if request.expires_at else None,
        }
        return _instance(self._call("POST", "/v1/servers", json=order, headers={"Idempotency-Key": request.token}))

    @hookimpl
    def dstack_get_instance(self, ref: InstanceRef) -> Instance | None:
        """One call."""
        server = self._call("GET", f"/v1/servers/{quote(ref.id, safe='')}", known=False)
        return _instance(server) if server else None

    @hookimpl
    def dstack_list_instances(self, owner: UUID) -> list[Instance]:
        """All pages of all regions, those included that are configured no longer."""
        regions = [region["name"] for region in self._call("GET", "/v1/regions")["regions"]]
        return [_instance(server) for region in regions for server in self._servers(region, f"owner:{owner}")]

    @hookimpl
    def dstack_terminate_instance(self, ref: InstanceRef) -> None:
        """Begins the end of the server and its disk."""
        path = f"/v1/servers/{quote(ref.id, safe='')}"
        self._call("DELETE", path, known=False, params={"delete_disks": "true"})

    @hookimpl
    def dstack_get_console(self, ref: InstanceRef) -> str | None:
        """One call."""
        answer = self._call("GET", f"/v1/servers/{quote(ref.id, safe='')}/console", known=False)
        return answer["console"] if answer else None

    @hookimpl
    def dstack_check_config(self) -> list[str]:
        """Whether the token may do what is needed, and the regions exist."""
        allowed = self._call("GET", "/v1/account")["permissions"]
        there = {region["name"] for region in self._call("GET", "/v1/regions")["regions"]}
        problems = [
            f"The token lacks the permission {needed!r}. Make one that has it."
            for needed in ("servers:read", "servers:write")
            if needed not in allowed
        ]
        return problems + [
            f"There is no region {region!r}. There are: {', '.join(sorted(there))}."
            for region in self._regions
            if region not in there
        ]

    def _may_be_in(self, region: str) -> bool:
        return not self._regions or region in self._regions

    def _servers(self, region: str, label: str) -> Iterator[dict[str, Any]]:
        """Page by page."""
        page, pages = 1, 1
        while page <= pages:
            answer = self._call("GET", "/v1/servers", params={"region": region, "label": label, "page": page})
            yield from answer["servers"]
            page, pages = page + 1, answer["pages"]

    def _call(self, method: str, path: str, *, known: bool = True, **options: Any) -> Any:
        """One call, once. `None` for what the cloud does not know, unless it has to (`known`)."""
        try:
            answer = self._http.request(method, path, **options)
        except httpx.ConnectError as error:
            raise RateLimitedError(f"Nimbus cannot be reached: {error}") from error
        except httpx.HTTPError as error:
            raise UnknownOutcomeError(f"Nimbus did not answer {method} {path}: {error!r}") from error
        if answer.status_code == 404 and not known:
            return None
        if answer.is_success:
            return answer.json()
        raise _error(answer, making=method == "POST")


@cache
def _trusted() -> ssl.SSLContext:
    """Who may sign Nimbus' certificate. Read once: that takes longer than a call."""
    return httpx.create_ssl_context()


def _error(answer: httpx.Response, *, making: bool) -> BackendError:
    """The cloud's own words, in the class that says what to do. What cannot be understood is unknown."""
    try:
        error = answer.json()["error"]
        code, message = str(error["code"]), str(error["message"])
    except (ValueError, LookupError, TypeError):
        return UnknownOutcomeError(f"Nimbus answered HTTP {answer.status_code}: {answer.text[:200]}")
    unknown = f"Nimbus answered HTTP {answer.status_code}, {code}: {message}"
    return _classed(code, message, _seconds(answer.headers.get("Retry-After")), making) or UnknownOutcomeError(unknown)


def _classed(code: str, message: str, retry_after: float | None, making: bool) -> BackendError | None:
    match code:
        case "no_capacity":
            return NoCapacityError(message, scope="zone", retry_after=retry_after)
        case "quota_exceeded":
            return QuotaExceededError(f"{message}. Ask Nimbus to raise it.", scope="region")
        case "unauthorized" | "forbidden":
            return AuthenticationError(f"{message}. Set another `token` in the configuration.")
        case "rate_limited":
            return RateLimitedError(message, retry_after=retry_after)
        case "invalid" | "key_reused" if making:
            return InvalidRequestError(message)
    return None


def _seconds(text: str | None) -> float | None:
    return float(text) if text and text.isdecimal() else None


def _offers(machine: dict[str, Any]) -> Iterator[Offer]:
    """One for each zone and way of buying."""
    gpu = machine["gpu"]
    resources = MachineResources(
        cpus=float(machine["vcpus"]),
        memory_mib=machine["memory_gib"] * 1024,
        disk_mib=machine["disk_gib"] * 1024,
        gpus=(_gpu(gpu),) * gpu["count"] if gpu else (),
        arch=_ARCHS[machine["arch"]],
    )
    for price in machine["prices"]:
        yield Offer(
            backend="nimbus",
            instance_type=machine["name"],
            region=price["region"],
            zone=price["zone"],
            resources=resources,
            price=float(price["usd_per_hour"]),
            spot=price["spot"],
            availability=Availability.AVAILABLE if price["available"] else Availability.NO_CAPACITY,
            reason=price["message"],
        )


def _gpu(gpu: dict[str, Any]) -> Gpu:
    """Of `NVIDIA A100 80GB` only the model counts."""
    major, minor = gpu["compute_capability"]
    return Gpu(gpu["model"].split()[1].upper(), gpu["memory_gib"] * 1024, "nvidia", (major, minor))


def _instance(server: dict[str, Any]) -> Instance:
    address, labels = server["address"], server["labels"]
    if not labels.keys() >= {"intent", "owner"}:
        raise UnknownOutcomeError(f"Server {server['id']} lost its labels. End it by hand.")
    return Instance(
        ref=InstanceRef(backend="nimbus", id=server["id"], region=server["region"], zone=server["zone"]),
        intent=UUID(labels["intent"]),
        owner=UUID(labels["owner"]),
        state=_STATES[server["status"]],
        reason=_REASONS.get(server["reason"] or ""),
        created_at=datetime.fromisoformat(server["created_at"]),
        endpoint=Endpoint(ssh_host=address) if address else None,
    )
