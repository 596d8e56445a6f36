"""The hooks, over the SDK."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from functools import wraps
from typing import Any, ParamSpec, TypeVar
from uuid import UUID

import httpx
from azure.core import MatchConditions

from dstack_azure._account import Account
from dstack_azure._calls import action_of
from dstack_azure._catalogue import Catalogue, cache_folder
from dstack_azure._checks import Checks
from dstack_azure._config import AzureConfig
from dstack_azure._errors import EXISTS, SDK_ERRORS, code_of, is_gone, of_status, of_web, status_of, translated
from dstack_azure._instances import (
    NAME_TAG,
    address_in,
    ended,
    group_of,
    half_made,
    instance,
    interface_of,
    is_of,
    launch,
    marked,
    statuses_of,
)
from dstack_azure._network import Networks
from dstack_azure._records import Records
from dstack_core.plugin import (
    BackendError,
    Instance,
    InstanceRef,
    InstanceRequest,
    InstanceState,
    InvalidRequestError,
    NoCapacityError,
    Offer,
    QuotaExceededError,
    Requirements,
    UnknownOutcomeError,
    hookimpl,
)

T = TypeVar("T")
P = ParamSpec("P")

_NAME = re.compile(r"[a-z][a-z0-9-]{0,62}")
_GET, _PUT, _DELETE = (f"compute.virtual_machines.{name}" for name in ("get", "begin_create_or_update", "begin_delete"))
_LIST = "compute.virtual_machines.list_all"
_CONSOLE = "compute.virtual_machines.retrieve_boot_diagnostics_data"
_NIC = "network.network_interfaces.get"
_PARTS = {
    # In this order: what holds another one goes first.
    "microsoft.network/networkinterfaces": "network.network_interfaces.begin_delete",
    "microsoft.network/publicipaddresses": "network.public_ip_addresses.begin_delete",
    "microsoft.compute/disks": "compute.disks.begin_delete",
}
"""What an instance consists of besides its machine, and how that is deleted."""


def _only_looks(hook: Callable[P, T]) -> Callable[P, T]:
    """For hooks that conclude nothing from a refusal: whatever Azure refuses, they are asked again later."""

    @wraps(hook)
    def wrapped(*args: P.args, **kwargs: P.kwargs) -> T:
        try:
            return hook(*args, **kwargs)
        except (InvalidRequestError, NoCapacityError, QuotaExceededError) as error:
            raise UnknownOutcomeError(str(error)) from error

    return wrapped


class AzureBackend:
    """One subscription. Safe to use from several threads."""

    def __init__(self, config: AzureConfig) -> None:
        self._config = config
        self._account = Account(config)
        self._catalogue = Catalogue(self._account, config, cache_folder())
        self._networks = Networks(self._account, config)
        self._records = Records(self._account, config)

    def close(self) -> None:
        """Closes the connections."""
        self._account.close()

    # -- hooks -------------------------------------------------------------------------------------------------------

    @hookimpl
    def dstack_list_offers(self, requirements: Requirements) -> list[Offer]:
        """From memory or a file where possible; what is old is read anew in the background."""
        return self._catalogue.offers(requirements, self._config.regions)

    @hookimpl
    def dstack_create_instance(self, request: InstanceRequest) -> Instance:
        """One PUT of the machine with all that belongs to it, which Azure refuses if there is one of its name."""
        region, group = request.offer.region, self._config.resource_group
        subnet = self._networks.subnet(region)
        record = self._records.find(group, request.name, region)
        if record is not None:
            return _long_gone(request, group, record)
        body = launch(self._config, request, subnet)
        try:
            made = self._account.plain_call(_PUT, group, request.name, body, match_condition=MatchConditions.IfMissing)
        except SDK_ERRORS as error:
            return self._not_started(request, error)
        return _ours(made)

    @hookimpl
    @_only_looks
    def dstack_get_instance(self, ref: InstanceRef) -> Instance | None:
        """The machine, and its address once it runs; without a machine, what is left of it."""
        if not _NAME.fullmatch(ref.id):
            return None
        machine = self._machine(ref)
        if machine is None:
            parts = self._parts(ref)
            return next((one for one in map(half_made, parts) if one is not None), None)
        found = _ours(machine, statuses_of(machine))
        if found.state is not InstanceState.RUNNING:
            return found
        return instance(machine, statuses_of(machine), self._address(machine))

    @hookimpl
    @_only_looks
    def dstack_list_instances(self, owner: UUID) -> list[Instance]:
        """All pages of the whole subscription, whatever group and region."""
        return self._tagged("owner", str(owner))

    @hookimpl
    @_only_looks
    def dstack_list_all_instances(self) -> list[Instance]:
        """The same for every owner."""
        return self._tagged("managed-by", "dstack")

    @hookimpl
    @_only_looks
    def dstack_terminate_instance(self, ref: InstanceRef) -> None:
        """Begins the end of the machine, with which its parts go; what is left of one that is gone goes by itself."""
        if not _NAME.fullmatch(ref.id):
            return
        machine = self._machine(ref)
        if machine is None:
            self._clear_away(ref)
        elif machine["properties"].get("provisioningState") != "Deleting":
            # The record comes first: from now on nobody makes it again.
            self._records.write(self._group(ref), machine)
            self._delete(_DELETE, self._group(ref), ref.id, ref.region)

    @hookimpl
    @_only_looks
    def dstack_get_console(self, ref: InstanceRef) -> str | None:
        """Why Azure could not make it, if it could not; and what its serial console has."""
        machine = self._machine(ref) if _NAME.fullmatch(ref.id) else None
        if machine is None:
            return None
        said = [f"{one['code']}: {one['message']}" for one in statuses_of(machine) if one.get("message")]
        try:
            console = self._console(ref)
        except BackendError:
            if not said:
                raise
            console = None
        return "\n".join([*said, *([console] if console else [])]) or None

    @hookimpl
    def dstack_check_config(self) -> list[str]:
        """Whether everything that a run needs may be done, and is there."""
        return Checks(self._account, self._config, self._networks).problems()

    # -- creating ----------------------------------------------------------------------------------------------------

    def _not_started(self, request: InstanceRequest, error: Exception) -> Instance:
        """What became of a call that Azure refused: perhaps the machine is there already."""
        there = status_of(error) == 412 or code_of(error) in EXISTS
        ref = InstanceRef(backend="azure", id=request.name, region=request.offer.region)
        machine = self._machine(ref) if there else None
        if machine is None:
            failure = translated(error, action_of(_PUT), ref.region)
            if isinstance(failure, InvalidRequestError):
                # Perhaps the network was removed that we remember.
                self._networks.forget(ref.region)
            raise failure from error
        if marked(machine) != (request.intent, request.owner) or not is_of(machine.get("tags") or {}, request):
            raise _asked_otherwise(request) from error
        found = instance(machine, statuses_of(machine))
        assert found is not None  # noqa: S101  # it is marked
        return found

    # -- looking -----------------------------------------------------------------------------------------------------

    def _group(self, ref: InstanceRef) -> str:
        return ref.data or self._config.resource_group

    def _machine(self, ref: InstanceRef) -> dict[str, Any] | None:
        try:
            return self._account.plain_call(_GET, self._group(ref), ref.id, expand="instanceView")
        except SDK_ERRORS as error:
            if is_gone(error):
                return None
            raise translated(error, action_of(_GET), ref.region) from error

    def _address(self, machine: dict[str, Any]) -> str | None:
        """Where it is reached; its interface knows."""
        interface = interface_of(machine)
        if interface is None:
            return None
        name, group = interface.rpartition("/")[2], group_of({"id": interface})
        try:
            found = self._account.plain_call(_NIC, group, name, expand="ipConfigurations/publicIPAddress")
        except SDK_ERRORS as error:
            if is_gone(error):
                return None
            raise translated(error, action_of(_NIC), machine["location"]) from error
        return address_in(found, public=self._config.public_ips)

    def _tagged(self, key: str, value: str) -> list[Instance]:
        """The machines with a tag; and what is left of those that never came to be."""
        # Parts first: a machine is there before its parts are, so whoever has parts here is among the machines, too.
        wanted = f"tagName eq '{key}' and tagValue eq '{value}'"
        parts = self._account.every("resource.resources.list", filter=wanted, expand="createdTime")
        machines = [one for one in self._account.every(_LIST) if (one.get("tags") or {}).get(key) == value]
        views = {one["id"].lower(): statuses_of(one) for one in self._account.every(_LIST, status_only="true")}
        found = [one for one in (instance(vm, views.get(vm["id"].lower(), ())) for vm in machines) if one is not None]
        return [*found, *self._without_machine(parts, {one.ref.id for one in found})]

    def _without_machine(self, parts: list[dict[str, Any]], listed: set[str]) -> list[Instance]:
        """Those whose parts are there and whose machine is not listed. Listings lag: each one is asked for."""
        loose = {one.ref.id: one for one in map(half_made, filter(_is_part, parts)) if one is not None}
        found = (self.dstack_get_instance(one.ref) for name, one in loose.items() if name not in listed)
        return [one for one in found if one is not None]

    def _parts(self, ref: InstanceRef) -> list[dict[str, Any]]:
        """What is left of an instance without a machine."""
        wanted = f"tagName eq '{NAME_TAG}' and tagValue eq '{ref.id}'"
        operation = "resource.resources.list_by_resource_group"
        try:
            found = self._account.every(operation, self._group(ref), filter=wanted, expand="createdTime", at=ref.region)
        except InvalidRequestError as error:
            if error.__cause__ is not None and isinstance(error.__cause__, SDK_ERRORS) and is_gone(error.__cause__):
                return []
            raise
        return [part for part in found if _is_part(part)]

    # -- ending ------------------------------------------------------------------------------------------------------

    def _clear_away(self, ref: InstanceRef) -> None:
        """What is left without a machine. Each part is tried; what another one still holds is for the next time."""
        problems: list[BackendError] = []
        order = list(_PARTS)
        for part in sorted(self._parts(ref), key=lambda one: order.index(one["type"].lower())):
            try:
                self._delete(_PARTS[part["type"].lower()], group_of(part), part["name"], ref.region)
            except BackendError as error:
                problems.append(error)
        if problems:
            raise problems[0]

    def _delete(self, operation: str, group: str, name: str, region: str) -> None:
        try:
            self._account.plain_call(operation, group, name)
        except SDK_ERRORS as error:
            if not is_gone(error):
                raise translated(error, action_of(operation), region) from error

    def _console(self, ref: InstanceRef) -> str | None:
        try:
            answer = self._account.plain_call(_CONSOLE, self._group(ref), ref.id)
        except SDK_ERRORS as error:
            if is_gone(error):
                return None
            raise translated(error, action_of(_CONSOLE), ref.region) from error
        # The address holds the key to it, so it is named nowhere.
        url = answer.get("serialConsoleLogBlobUri")
        if not url:
            return None
        try:
            response = self._account.fetch(url)
        except httpx.HTTPError as error:
            raise of_web(error, "the serial console") from None
        if response.status_code == 404:
            return None
        if response.status_code != 200:
            raise of_status(response, "the serial console")
        return response.content.decode(errors="replace") or None


def _is_part(resource: dict[str, Any]) -> bool:
    return str(resource["type"]).lower() in _PARTS


def _asked_otherwise(request: InstanceRequest) -> InvalidRequestError:
    return InvalidRequestError(
        f"The intent {request.intent} is {request.name} already, which was asked for otherwise. "
        "Another request needs another intent."
    )


def _long_gone(request: InstanceRequest, group: str, record: dict[str, Any]) -> Instance:
    """The instance of an intent that has ended."""
    tags = record.get("tags") or {}
    if not is_of(tags, request):
        raise _asked_otherwise(request)
    return ended(request, group, tags.get("created") or None)


def _ours(machine: dict[str, Any], statuses: Iterable[dict[str, Any]] = ()) -> Instance:
    """A machine that must have our tags: without them it is billed all the same, and nobody may take it for gone."""
    found = instance(machine, statuses)
    if found is None:
        raise UnknownOutcomeError(
            f"Azure describes {machine.get('id')} without our tags 'owner' and 'intent' "
            f"({machine.get('tags') or 'none'}). Put them back, or end it by hand."
        )
    return found
