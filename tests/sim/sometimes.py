"""What every long enough row of seeds must have reached: each kind of fault, and each way out of it."""

from __future__ import annotations

from collections import Counter

from tests.sim.plan import HOOK_FAULTS, POINTS, STORE_FAULTS, TROUBLES

FAULTS = (
    *TROUBLES.values(),
    *(f"cloud: {hook}: {kind}" for hook, kind in HOOK_FAULTS),
    *(f"killed {point}" for point in POINTS),
    *(f"the connection to the database was lost {point}" for point in STORE_FAULTS),
    *(f"cloud: create: drought of the {scope}" for scope in ("zone", "region", "type", "account")),
    "agent: a request arrived twice",
    "agent: an answer was lost",
    "agent: another machine has the address",
    "agent: the server was cut off",
    "a hook was slow",
    "a machine hung and was not listed any more",
    "a request that arrived twice made an instance",
    "a request to the cloud arrived twice",
    "a server stood still right after a transaction",
    "an old copy of the database was restored",
    "cloud: an address was used again",
    "cloud: create: quota of the region",
    "cloud: rate limit",
)
"""All that goes wrong."""

WAYS_OUT = (
    # What came of a create call is not known: found, repeated, looked for in vain, used up.
    "instance: unknown -> starting",
    "cloud: create: known already",
    "instance: unknown -> intent",
    "instance: unknown -> failed",
    "instance: unknown -> terminated",
    "instance: intent -> terminated",
    # Refused for certain, and remembered.
    "job: provisioning -> submitted",
    "a shortage was remembered",
    "an offer was passed over for a remembered shortage",
    # Two servers.
    "a lease that had run out was taken over",
    "a result was turned away, since its lease was lost",
    "the place of a sweeper was taken over",
    # Ends.
    "a termination was asked for again",
    "a termination took so long that a person was alarmed",
    "what was neither listed nor answered was ended",
    "swept: over",
    "swept: unknown",
    "cloud: a machine powered itself off",
    # A database that went back in time.
    "the database was found to be a copy",
    "a restored database was confirmed",
    # What users see of it.
    "user: an accepted run was submitted again",
    "run: aborted, aborted_by_user",
    "run: done",
    "run: failed, agent_lost",
    "run: failed, container_exited_with_error",
    "run: failed, failed_to_start_due_to_no_capacity",
    "run: failed, interrupted_by_no_capacity",
    "run: terminated, max_duration_exceeded",
    "run: terminated, terminated_by_user",
)
"""All that is done about it, and what comes of it."""

SOMETIMES = FAULTS + WAYS_OUT


def missing(seen: Counter[str]) -> list[str]:
    """What was not reached."""
    return [name for name in SOMETIMES if not seen[name]]
