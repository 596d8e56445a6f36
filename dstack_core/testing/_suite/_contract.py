"""The sentences of the contract that the cases ask for, word for word. A test compares them with the docstrings."""

from __future__ import annotations

_CREATE, _GET, _LIST = "dstack_create_instance", "dstack_get_instance", "dstack_list_instances"
_END, _OFFERS, _CHECK = "dstack_terminate_instance", "dstack_list_offers", "dstack_check_config"
_REGISTER, _CONNECT = "dstack_register_backends", "dstack_connect"

CONTRACT: dict[str, tuple[str, str]] = {
    # -- registration -----------------------------------------------------------------------------------------------
    "register": (_REGISTER, "Says which backends a package brings."),
    "sdk-free": (_REGISTER, "Must not import the cloud's SDK, touch the network or block."),
    "name": ("BackendInfo", "what users write. `config`'s `type` has the same value."),
    "title": ("BackendInfo", 'the name for people, for example `"Amazon EC2"`.'),
    "factory": (
        "BackendInfo",
        (
            "imported when the backend is first used; called with the validated config, returns the object that "
            "implements the hooks."
        ),
    ),
    "plugin-api": ("BackendInfo", "the version of the hook specification that the package was written for."),
    "facts": ("BackendInfo", "What a package declares about a backend, without importing the cloud's SDK."),
    "default-config": (
        "BackendInfo",
        "given only by backends that need no configuration; they are then always configured.",
    ),
    "config": (
        "BackendConfig",
        'Subclass it with `type: Literal["yourname"] = "yourname"` and your own fields.',
    ),
    "secret": ("BackendConfig", "Secrets are `pydantic.SecretStr`."),
    "unknown-key": ("BackendConfig", "Unknown keys are refused."),
    "no-secret": ("BackendError", "Never a secret."),
    "words": ("BackendError", "the cloud's own words, followed by the cure if there is one."),
    # -- offers -----------------------------------------------------------------------------------------------------
    "offers": (_OFFERS, "Lists what could be bought in the configured regions to satisfy the requirements."),
    "offers-any": (_OFFERS, 'with everything "any", all offers are wanted.'),
    "offers-filter": (_OFFERS, "returning too much is allowed and returning too little hides offers."),
    "offers-unavailable": (_OFFERS, "Include what cannot be had now, marked with `availability` and `reason`"),
    "offers-empty": (_OFFERS, "Offers in any order; empty when there is nothing."),
    "offers-read": (_OFFERS, "Reads only; safe to call at any time."),
    "offer-backend": ("Offer", "name of the backend; equals the registered name."),
    "offer-price": ("Offer", "USD per hour, all in; `0.0` is free."),
    "offer-spot": ("Offer", "may be interrupted by the cloud."),
    "offer-zone": ("Offer", "the zone, or `None` when the backend chooses one or has none."),
    "offer-one": ("Offer", "One thing that can be bought: an instance type in a place, at a price."),
    "offer-reason": ("Offer", "for an offer that is not available, why, in words for a person; else `None`."),
    "machine-memory": ("MachineResources", "memory, in MiB."),
    "machine-disk": ("MachineResources", "disk, in MiB."),
    "machine-shared": (
        "MachineResources",
        "Share one object among the offers of one instance type: it is hashable and immutable.",
    ),
    "machine-arch": ("MachineResources", '`"x86"` or `"arm"`.'),
    "machine": ("MachineResources", "What a machine has."),
    "gpu-name": ("Gpu", "upper-case, without vendor and memory (`A100`, `L4`, `RTX4090`)."),
    "gpu-memory": ("Gpu", "memory of this GPU, in MiB."),
    "gpu-vendor": ("Gpu", '`"nvidia"`, `"amd"`, `"google"`, `"intel"` or `"tenstorrent"`.'),
    "gpu-capability": ("Gpu", "`(major, minor)` for NVIDIA, else `None`."),
    # -- creating ---------------------------------------------------------------------------------------------------
    "create": (_CREATE, "Starts exactly one instance, and returns as soon as the cloud has accepted it."),
    "create-once": (
        _CREATE,
        (
            "called again with the same request, after any outcome and from any process, it returns the instance "
            "of the first call, even if that one has terminated since, and never makes a second one."
        ),
    ),
    "create-body": (_CREATE, "the same intent with another body is an `InvalidRequestError`."),
    "create-boot": (_CREATE, "Does not wait for the machine to boot."),
    "create-tags": (
        _CREATE,
        "Everything in `request.tags`, and the intent and the owner, goes *into* the create call.",
    ),
    "create-capacity": (_CREATE, "NoCapacityError: definitely not created; the engine takes the next offer."),
    "create-quota": (_CREATE, "QuotaExceededError: definitely not created; the engine skips the family and region."),
    "create-auth": (
        _CREATE,
        "AuthenticationError: definitely not created; the run fails with this message unless another backend fits.",
    ),
    "create-invalid": (_CREATE, "InvalidRequestError: definitely not created; likewise."),
    "create-limited": (_CREATE, "RateLimitedError: definitely not created; the same call is made again later."),
    "create-unknown": (
        _CREATE,
        (
            "UnknownOutcomeError: it may exist. The engine looks for it, and repeats the call if it is certain that "
            "there is none."
        ),
    ),
    "capacity-scope": (
        "NoCapacityError",
        "how far the shortage reaches; offers inside it are passed over for a while.",
    ),
    "capacity-after": ("NoCapacityError", "seconds after which trying again makes sense, if the cloud says so."),
    "quota-scope": ("QuotaExceededError", "how far the quota reaches."),
    "limited-after": ("RateLimitedError", "seconds to wait; `None` lets the engine choose."),
    "intent": ("InstanceRequest", "the key of idempotency. One intent, at most one instance, for ever."),
    "request-name": ("InstanceRequest", "deterministic, at most 40 characters, a valid RFC 1035 label."),
    "request-tags": (
        "InstanceRequest",
        "must be on the instance, its volumes and interfaces from the create call on.",
    ),
    "request-offer": ("InstanceRequest", "what to buy."),
    # -- looking ----------------------------------------------------------------------------------------------------
    "get": (_GET, "Says how one instance is now."),
    "get-none": (_GET, "The instance, or `None` when the cloud does not know it (any more)."),
    "get-unmarked": (_GET, "An instance that has lost its tags is still there, and billed"),
    "get-errors": (
        _GET,
        (
            "AuthenticationError, RateLimitedError, UnknownOutcomeError: asked again later; nothing is concluded about "
            "the instance."
        ),
    ),
    "list": (
        _LIST,
        "Lists all instances that carry this owner, in every region that was ever used, all pages.",
    ),
    "list-others": (_LIST, "Instances of other owners are left out."),
    "list-partial": (_LIST, "A partial listing must raise, never be returned: `UnknownOutcomeError`."),
    "list-errors": (_LIST, "AuthenticationError, RateLimitedError: asked again later."),
    "visible": (
        "BackendInfo",
        "seconds within which a new instance is certain to appear in `dstack_list_instances`.",
    ),
    "instance-intent": ("Instance", "the intent it was created for, read back from its tags or its name."),
    "instance-owner": ("Instance", "the owner it was created for, read back from its tags or its name."),
    "instance-state": ("Instance", "what the cloud says."),
    "instance-reason": ("Instance", "why it is stopping or gone; `None` if unknown."),
    "instance-created": ("Instance", "when the cloud accepted it (aware, UTC)."),
    "instance-endpoint": ("Instance", "how to reach its agent; `None` until there is an address."),
    "ref": (
        "InstanceRef",
        "All that a backend needs to find one instance again; stored by the core, never interpreted.",
    ),
    "ref-region": ("InstanceRef", "where it is."),
    "stopped": ("InstanceState", "A machine that is merely stopped or deallocated is `STOPPING`."),
    "pending": ("InstanceState", "accepted, and not yet started."),
    "running": ("InstanceState", "started; its agent may still be starting."),
    "stopping": ("InstanceState", "on its way to the end, or stopped in a way that is still billed."),
    "terminated": ("InstanceState", "gone for good, and no longer billed."),
    # -- ending -----------------------------------------------------------------------------------------------------
    "end": (
        _END,
        "Asks for the end of an instance and of everything that was made for it (disks, interfaces, addresses).",
    ),
    "end-again": (_END, "Idempotent; unknown or gone already is success."),
    "end-waits": (_END, "Does not wait"),
    "end-errors": (
        _END,
        "AuthenticationError, RateLimitedError, UnknownOutcomeError: tried again, for ever, with growing pauses.",
    ),
    # -- optional ---------------------------------------------------------------------------------------------------
    "check": (_CHECK, "Finds out whether the configuration can work: credentials, permissions, quotas, network."),
    "check-answer": (_CHECK, "One sentence for each problem, with its cure; empty when all is well."),
    "check-read": (_CHECK, "Reads only; may block up to `hook_timeout`."),
    "connect": (_CONNECT, "Makes an instance reachable that has no SSH address, and says how its agent is reached."),
    "connect-again": (_CONNECT, "Idempotent by the instance's id."),
    # -- conventions ------------------------------------------------------------------------------------------------
    "in-time": (
        "Conventions",
        "A hook that runs longer is abandoned: its result is dropped, and the outcome counts as unknown.",
    ),
    "raises": (
        "Conventions",
        "A hook may raise the subclasses of `BackendError` that its docstring names. Anything else is a `PluginBug`",
    ),
    "once": ("Conventions", "a backend does each thing once and says what happened."),
    "threads": ("Conventions", "The core calls each one in a worker thread"),
}
