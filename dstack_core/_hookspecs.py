"""The hook specification: everything a backend or a wrapping plugin can implement.

Conventions
    Hooks are plain, blocking functions. The core calls each one in a worker thread, for one backend at a time, at
    most `BackendInfo.max_concurrency` at once, and waits at most the time its docstring names.
    A hook that runs longer is abandoned: its result is dropped, and the outcome counts as unknown. It goes on occupying
    one of the places of its backend until it returns.
    A hook may raise the subclasses of `BackendError` that its docstring names. Anything else is a `PluginBug`: it
    is shown with the plugin's name and version and touches no other backend.
    Retries, logging, caching and redaction are the core's: a backend does each thing once and says what happened.

Wrapping
    The five hooks of a backend are called through pluggy, so any plugin may wrap them for all backends at once
    with `@hookimpl(wrapper=True)`. A wrapper takes the arguments of the hook by name, any subset of them, and may
    add `backend`, the name of the backend that is being called. It is a plain plugin of the same entry-point group: a
    module or object with wrappers, whether or not it registers backends as well. Where several wrap the same hook, the
    one whose entry point comes last in the alphabet is outermost. What a wrapper raises counts as the backend's answer,
    so a wrapper that is broken stops what it guards; the message names the wrapper. `DSTACK_DISABLE_PLUGINS=name,name`
    leaves out the entry points of these names.

Plugin API
    `PLUGIN_API` is the version of this file. Adding an argument, an optional hook or something that a backend may say
    raises the second number; anything that could break a plugin raises the first, and a plugin for another first number
    is refused with a reason. A backend says in `BackendInfo.plugin_api` what it was written for; a plugin that only
    wraps may say so in a module variable `DSTACK_PLUGIN_API = (1, 0)`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal
from uuid import UUID

import pluggy
from pydantic import BaseModel, ConfigDict

from dstack_core._models.instances import Endpoint, Instance, InstanceRef, InstanceRequest
from dstack_core._models.offers import Offer, Requirements

__all__ = [
    "ENTRY_POINT_GROUP",
    "PLUGIN_API",
    "BackendConfig",
    "BackendInfo",
    "dstack_check_config",
    "dstack_connect",
    "dstack_create_instance",
    "dstack_get_console",
    "dstack_get_instance",
    "dstack_list_all_instances",
    "dstack_list_instances",
    "dstack_list_offers",
    "dstack_register_backends",
    "dstack_terminate_instance",
    "hookimpl",
]

PROJECT = "dstack"
ENTRY_POINT_GROUP = "dstack.backends"
PLUGIN_API = (1, 3)
BACKEND_NAME = r"[a-z][a-z0-9-]*"
BACKEND_NAME_LENGTH = 64

hookspec = pluggy.HookspecMarker(PROJECT)
hookimpl = pluggy.HookimplMarker(PROJECT)


class BackendConfig(BaseModel):
    """Base of a backend's configuration: one entry under `backends:` in `server/config.yml`.

    Subclass it with `type: Literal["yourname"] = "yourname"` and your own fields. Secrets are `pydantic.SecretStr`.
    Unknown keys are refused.

    Attributes:
        type: the backend's name.
    """

    model_config = ConfigDict(extra="forbid", frozen=True, hide_input_in_errors=True)

    if TYPE_CHECKING:
        # Each subclass narrows it. Type checkers, which do not see that it is frozen, allow that for `Any` alone.
        type: Any
    else:
        type: str


@dataclass(frozen=True, kw_only=True)
class BackendInfo:
    """What a package declares about a backend, without importing the cloud's SDK.

    Attributes:
        name: unique, at most 64 lower-case letters, digits and dashes; what users write. `config`'s `type` has the
            same value.
        title: the name for people, for example `"Amazon EC2"`.
        config: the pydantic model of the configuration.
        factory: `"module:callable"`, imported when the backend is first used; called with the validated
            config, returns the object that implements the hooks.
        default_config: given only by backends that need no configuration; they are then always configured.
        plugin_api: the version of the hook specification that the package was written for.
        ownership: how an instance is marked as ours: `"tags"`, `"name"`, or `"none"` (the core then refuses
            unattended runs unless the user opts in).
        native_idempotency: creating again with the same token returns the same instance by the cloud's own guarantee.
        visibility_window: seconds within which a new instance is certain to appear in `dstack_list_instances`.
        provisioning_timeout: seconds after which an instance whose agent was never reached is given up.
        offers_ttl: seconds for which a listing of offers may be used again; `0` for a backend whose offers
            change with each run.
        existing_machines: offers are machines that exist already, not sizes made to order, so sizes that
            the user did not set ask for nothing.
        boots_machines: instances are machines that boot with cloud-init and an SSH server, and get `user_data`. The
            core reaches them over SSH, where their `Endpoint` says, and brings the agent itself.
        terminates_itself: what ends an instance if every server dies: `"agent"`, `"cloud"`, or `"nobody"`. Shown in
            the plan.
        max_concurrency: how many hooks of this backend may run at once.
        hook_timeout: seconds a single call may take.
    """

    name: str
    title: str
    config: type[BackendConfig]
    factory: str
    default_config: BackendConfig | None = None
    plugin_api: tuple[int, int] = (1, 0)
    ownership: Literal["tags", "name", "none"] = "tags"
    native_idempotency: bool = False
    visibility_window: float = 60.0
    provisioning_timeout: float = 600.0
    offers_ttl: float = 60.0
    existing_machines: bool = False
    boots_machines: bool = False
    terminates_itself: Literal["agent", "cloud", "nobody"] = "agent"
    max_concurrency: int = 8
    hook_timeout: float = 60.0


# ---------------------------------------------------------------------------------------------------------------------
# Discovery: implemented by the module that the entry point names
# ---------------------------------------------------------------------------------------------------------------------


@hookspec
def dstack_register_backends() -> list[BackendInfo]:  # type: ignore[empty-body]
    """Says which backends a package brings.

    Called once, when the server discovers plugins. Must not import the cloud's SDK, touch the network or block.
    Whatever it raises makes this one package "failed to load", with the reason shown by `dstack backends`.

    Since 1.0.
    """


# ---------------------------------------------------------------------------------------------------------------------
# The five hooks of a backend: implemented by the object that the factory returns
# ---------------------------------------------------------------------------------------------------------------------


@hookspec(firstresult=True)
def dstack_list_offers(requirements: Requirements, backend: str) -> list[Offer]:  # type: ignore[empty-body]
    """Lists what could be bought in the configured regions to satisfy the requirements.

    Called for every plan and placement, unless a listing younger than `BackendInfo.offers_ttl` is at hand. The core
    filters again, ranks and caches, so returning too much is allowed and returning too little hides offers. Include
    what cannot be had now, marked with `availability` and `reason`: that is what a user is shown when nothing fits.
    Reads only; safe to call at any time. May block up to `hook_timeout`; a plan waits less and names the backend
    that was late.

    Args:
        requirements: what the job needs; with everything "any", all offers are wanted.

    Returns:
        Offers in any order; empty when there is nothing.

    Raises:
        AuthenticationError: the backend is left out of the plan, with this message.
        RateLimitedError: an older listing is used, if there is one.
        InvalidRequestError: a requirement cannot be understood; shown in the plan.
        UnknownOutcomeError: the cloud could not be read; the backend is left out of the plan, with this message.

    Since 1.0.
    """


@hookspec(firstresult=True)
def dstack_create_instance(request: InstanceRequest, backend: str) -> Instance:  # type: ignore[empty-body]
    """Starts exactly one instance, and returns as soon as the cloud has accepted it.

    Idempotent by `request.intent`: called again with the same request, after any outcome and from any process, it
    returns the instance of the first call, even if that one has terminated since, and never makes a second one. The
    request is replayed byte for byte; the same intent with another body is an `InvalidRequestError`.
    Does not wait for the machine to boot. Everything in `request.tags`, and the intent and the owner, goes *into*
    the create call. A shortage that shows only after the cloud has accepted is not waited for: the instance is then
    `STOPPING` or `TERMINATED`, with `StateReason.NO_CAPACITY`.

    Raises:
        NoCapacityError: definitely not created; the engine takes the next offer.
        QuotaExceededError: definitely not created; the engine skips the family and region.
        AuthenticationError: definitely not created; the run fails with this message unless another backend fits.
        InvalidRequestError: definitely not created; likewise.
        RateLimitedError: definitely not created; the same call is made again later.
        UnknownOutcomeError: it may exist. The engine looks for it, and repeats the call if it is certain that there
            is none.

    Anything else, and a call that does not return in time, counts as an unknown outcome.

    Since 1.0.
    """


@hookspec(firstresult=True)
def dstack_get_instance(ref: InstanceRef, backend: str) -> Instance | None:
    """Says how one instance is now.

    Called every few seconds while an instance starts or stops, and when its agent falls silent. Reads only.

    Returns:
        The instance, or `None` when the cloud does not know it (any more). `None` soon after creation is not taken
        for an end: the engine waits for `BackendInfo.visibility_window`. An instance that has lost its tags is still
        there, and billed: that is an `UnknownOutcomeError`, and no `None`. One that was accepted and could not be made
        for want of capacity has `StateReason.NO_CAPACITY` (since 1.3): the engine remembers that as it does a
        `NoCapacityError` of the zone, and takes the next offer.

    Raises:
        AuthenticationError, RateLimitedError, UnknownOutcomeError: asked again later; nothing is concluded about the
            instance.

    Since 1.0.
    """


@hookspec(firstresult=True)
def dstack_list_instances(owner: UUID, backend: str) -> list[Instance]:  # type: ignore[empty-body]
    """Lists all instances that carry this owner, in every region that was ever used, all pages.

    Called to find out whether an intent of unknown outcome became an instance, and by the sweeper. Instances of
    other owners are left out. Terminated ones may be included or not. Reads only.

    Raises:
        AuthenticationError, RateLimitedError: asked again later. A partial listing must raise, never be returned:
            `UnknownOutcomeError`.

    Since 1.0.
    """


@hookspec(firstresult=True)
def dstack_terminate_instance(ref: InstanceRef, backend: str) -> bool | None:
    """Asks for the end of an instance and of everything that was made for it (disks, interfaces, addresses).

    Idempotent; unknown or gone already is success. Does not wait: the engine asks `dstack_get_instance` until the
    instance is gone, and calls this again for as long as it is not.

    Returns:
        Nothing of meaning; the return value is ignored.

    Raises:
        AuthenticationError, RateLimitedError, UnknownOutcomeError: tried again, for ever, with growing pauses.

    Since 1.0.
    """


# ---------------------------------------------------------------------------------------------------------------------
# Optional: a backend has the capability by implementing the hook
# ---------------------------------------------------------------------------------------------------------------------


@hookspec(firstresult=True)
def dstack_check_config(backend: str) -> Sequence[str]:  # type: ignore[empty-body]
    """Finds out whether the configuration can work: credentials, permissions, quotas, network.

    Called by `dstack backends --check`, never on the way of a run. Reads only; may block up to `hook_timeout`.

    Returns:
        One sentence for each problem, with its cure; empty when all is well.

    Raises:
        AuthenticationError, InvalidRequestError, RateLimitedError, UnknownOutcomeError: shown as a problem.

    Since 1.0.
    """


@hookspec(firstresult=True)
def dstack_connect(instance: Instance, backend: str) -> Endpoint | None:
    """Makes an instance reachable that has no SSH address, and says how its agent is reached.

    Called each time the server needs a connection to the agent and `instance.endpoint` is `None` although it runs.
    Idempotent by the instance's id.

    Raises:
        AuthenticationError, RateLimitedError, UnknownOutcomeError: tried again until
            `BackendInfo.provisioning_timeout`.

    Since 1.0.
    """


@hookspec(firstresult=True)
def dstack_get_console(ref: InstanceRef, backend: str) -> str | None:
    """Says what appeared on the console of a machine: while it booted, and last.

    Called once when a machine that boots comes to nothing, so that a person reads why in `run.logs(diagnose=True)`. The
    end is what counts; some tens of kilobytes are enough. Reads only.

    Returns:
        The text, line ends and control characters as they are; `None` when there is nothing (any more).

    Raises:
        AuthenticationError, RateLimitedError, UnknownOutcomeError: shown in its place.

    Since 1.2.
    """


@hookspec(firstresult=True)
def dstack_list_all_instances(backend: str) -> list[Instance]:  # type: ignore[empty-body]
    """Lists all instances that carry `managed-by: dstack`, of whatever owner, in every region that was ever used.

    Called by `dstack doctor` alone, so that a person sees what other servers left in the same account; those are shown
    and never touched. Terminated ones may be included or not. Reads only.

    Raises:
        AuthenticationError, RateLimitedError, UnknownOutcomeError: shown as a problem.

    Since 1.1.
    """
