"""The hooks, over the SDK."""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime
from functools import wraps
from typing import Any, ParamSpec, TypeVar
from uuid import UUID

from botocore.exceptions import ClientError

from dstack_aws._account import Account
from dstack_aws._calls import action_of
from dstack_aws._catalogue import Catalogue, cache_folder
from dstack_aws._checks import Checks
from dstack_aws._config import AwsConfig
from dstack_aws._errors import ENDED_TOKEN, MISMATCH, NO_INSTANCE, SDK_ERRORS, code_of, translated, words_of
from dstack_aws._images import Images
from dstack_aws._instances import instance, instances_in, is_of, launch
from dstack_aws._network import Networks
from dstack_core.plugin import (
    Instance,
    InstanceRef,
    InstanceRequest,
    InstanceState,
    InvalidRequestError,
    NoCapacityError,
    Offer,
    QuotaExceededError,
    Requirements,
    StateReason,
    UnknownOutcomeError,
    hookimpl,
)

T = TypeVar("T")
P = ParamSpec("P")

_AT_ONCE = 8
_REGIONS_GOOD_FOR = 3600.0


def _only_looks(hook: Callable[P, T]) -> Callable[P, T]:
    """For hooks that conclude nothing from a refusal: whatever Amazon refuses, they are asked again later."""

    @wraps(hook)
    def wrapped(*args: P.args, **kwargs: P.kwargs) -> T:
        try:
            return hook(*args, **kwargs)
        except (InvalidRequestError, NoCapacityError, QuotaExceededError) as error:
            raise UnknownOutcomeError(str(error)) from error

    return wrapped


class AwsBackend:
    """One account. Safe to use from several threads."""

    def __init__(self, config: AwsConfig) -> None:
        self._config = config
        self._account = Account(config)
        self._catalogue = Catalogue(self._account, config, cache_folder())
        self._networks = Networks(self._account, config)
        self._images = Images(self._account, config)
        self._regions: tuple[float, tuple[str, ...]] = (float("-inf"), ())

    def close(self) -> None:
        """Closes the connections."""
        self._account.close()

    # -- hooks -------------------------------------------------------------------------------------------------------

    @hookimpl
    def dstack_list_offers(self, requirements: Requirements) -> list[Offer]:
        """From memory or a file where possible; what is old is read anew in the background."""
        return self._catalogue.offers(requirements, self._config.regions or self._enabled())

    @hookimpl
    def dstack_create_instance(self, request: InstanceRequest) -> Instance:
        """One RunInstances, with our token and the tags in it."""
        offer = request.offer
        image = self._images.of(offer.region, offer.resources)
        subnet = self._networks.of(offer.region).subnet_in(offer.zone)
        params = launch(self._config, request, image, subnet, self._networks.group(offer.region))
        try:
            answer = self._account.plain_call("ec2", "run_instances", offer.region, **params)
        except SDK_ERRORS as error:
            return self._not_started(request, error)
        return _ours(answer["Instances"][0], offer.region)

    @hookimpl
    @_only_looks
    def dstack_get_instance(self, ref: InstanceRef) -> Instance | None:
        """One call."""
        try:
            answer = self._account.plain_call("ec2", "describe_instances", ref.region, InstanceIds=[ref.id])
        except SDK_ERRORS as error:
            if isinstance(error, ClientError) and code_of(error) in NO_INSTANCE:
                return None
            raise translated(error, action_of("ec2", "describe_instances"), ref.region) from error
        return next((instance(one, ref.region) or _unless_over(one, ref.region) for one in instances_in(answer)), None)

    @hookimpl
    @_only_looks
    def dstack_list_instances(self, owner: UUID) -> list[Instance]:
        """All pages of all regions of the account, those included that are configured no longer."""
        return self._tagged("owner", str(owner))

    @hookimpl
    @_only_looks
    def dstack_list_all_instances(self) -> list[Instance]:
        """The same for every owner."""
        return self._tagged("managed-by", "dstack")

    @hookimpl
    @_only_looks
    def dstack_terminate_instance(self, ref: InstanceRef) -> None:
        """Begins the end of the instance; its disk and interface go with it."""
        try:
            self._account.plain_call("ec2", "terminate_instances", ref.region, InstanceIds=[ref.id])
        except SDK_ERRORS as error:
            if isinstance(error, ClientError) and code_of(error) in NO_INSTANCE:
                return
            raise translated(error, action_of("ec2", "terminate_instances"), ref.region) from error

    @hookimpl
    @_only_looks
    def dstack_get_console(self, ref: InstanceRef) -> str | None:
        """The newest there is, where the machine is of a kind that has it; some minutes old otherwise."""
        try:
            answer = self._account.plain_call("ec2", "get_console_output", ref.region, InstanceId=ref.id)
        except SDK_ERRORS as error:
            if isinstance(error, ClientError) and code_of(error) in NO_INSTANCE:
                return None
            raise translated(error, action_of("ec2", "get_console_output"), ref.region) from error
        return answer.get("Output") or None

    @hookimpl
    def dstack_check_config(self) -> list[str]:
        """Whether everything that a run needs may be done, and is there."""
        checks = Checks(self._account, self._config, self._networks, self._images)
        return checks.problems(self._enabled(), _at_once)

    # -- creating ----------------------------------------------------------------------------------------------------

    def _not_started(self, request: InstanceRequest, error: Exception) -> Instance:
        """What became of a call that EC2 refused: perhaps the token was used before."""
        code = code_of(error) if isinstance(error, ClientError) else ""
        region = request.offer.region
        if code not in (MISMATCH, ENDED_TOKEN):
            failure = translated(error, action_of("ec2", "run_instances"), region)
            if isinstance(failure, InvalidRequestError):
                # Perhaps a subnet or a group was removed that we remember.
                self._networks.forget(region)
            raise failure from error
        found = self._by_token(request, region)
        if found is not None:
            return found
        said = words_of(error) if isinstance(error, ClientError) else str(error)
        if code == ENDED_TOKEN:
            return _long_gone(request, said)
        raise UnknownOutcomeError(f"{said} ({code}): there is an instance of this intent, and it cannot be seen yet")

    def _by_token(self, request: InstanceRequest, region: str) -> Instance | None:
        """The instance that this intent has already become.

        The newest image may be another one than at the first call, so that EC2 takes the call for another one, too.
        What was asked of us is on the instance.

        Raises:
            InvalidRequestError: something else was asked for.
        """
        filters = [{"Name": "client-token", "Values": [request.token]}]
        for page in self._account.pages("ec2", "describe_instances", region, Filters=filters):
            for described in instances_in(page):
                if not is_of(described, request):
                    raise InvalidRequestError(
                        f"The intent {request.intent} is {described['InstanceId']} already, which was asked for "
                        "otherwise. Another request needs another intent."
                    )
                return _ours(described, region)
        return None

    # -- looking -----------------------------------------------------------------------------------------------------

    def _tagged(self, key: str, value: str) -> list[Instance]:
        def in_region(region: str) -> list[Instance]:
            return list(self._listed(region, key, value))

        return [one for found in _at_once(in_region, self._enabled()) for one in found]

    def _listed(self, region: str, key: str, value: str) -> Iterator[Instance]:
        filters = [{"Name": f"tag:{key}", "Values": [value]}]
        for page in self._account.pages("ec2", "describe_instances", region, Filters=filters, MaxResults=1000):
            for described in instances_in(page):
                found = instance(described, region)
                if found is not None:
                    yield found

    def _enabled(self) -> tuple[str, ...]:
        """The regions of the account. They change when a person enables one."""
        since, regions = self._regions
        if time.monotonic() - since > _REGIONS_GOOD_FOR:
            home = self._config.regions[0] if self._config.regions else "us-east-1"
            answer = self._account.call("ec2", "describe_regions", home)
            regions = tuple(sorted(region["RegionName"] for region in answer["Regions"]))
            self._regions = (time.monotonic(), regions)
        return regions


def _at_once(work: Callable[[str], T], regions: Iterable[str]) -> list[T]:
    """Does it for each region, side by side. The first that fails fails all."""
    with ThreadPoolExecutor(_AT_ONCE, thread_name_prefix="dstack-aws") as pool:
        return list(pool.map(work, regions))


def _ours(described: dict[str, Any], region: str) -> Instance:
    """An instance that must have our tags: without them it is billed all the same, and nobody may take it for gone."""
    found = instance(described, region)
    if found is None:
        raise UnknownOutcomeError(
            f"EC2 describes {described.get('InstanceId')} without our tags 'owner' and 'intent' "
            f"({described.get('Tags') or 'none'}). Put them back, or end it by hand."
        )
    return found


def _unless_over(described: dict[str, Any], region: str) -> Instance | None:
    """The same for what may be over: that may have lost its tags."""
    return None if described["State"]["Name"] == "terminated" else _ours(described, region)


def _long_gone(request: InstanceRequest, said: str) -> Instance:
    """The instance of an intent that has ended, and of which EC2 shows no more than its token, and perhaps its id."""
    offer, named = request.offer, re.search(r"\bi-[0-9a-f]{8,17}\b", said)
    return Instance(
        ref=InstanceRef(
            backend="aws", id=named.group() if named else f"ended-{request.name}", region=offer.region, zone=offer.zone
        ),
        intent=request.intent,
        owner=request.owner,
        state=InstanceState.TERMINATED,
        reason=StateReason.REQUESTED,
        created_at=datetime.now(UTC),
    )
