"""Instances: how one is asked for, named, described and reached."""

from __future__ import annotations

from datetime import datetime
from enum import Enum
from pathlib import Path
from uuid import UUID

from pydantic import BaseModel, ConfigDict, Field

from dstack_core._models.offers import Offer


class InstanceState(str, Enum):
    """What the cloud says about an instance.

    A machine that is merely stopped or deallocated is `STOPPING`.

    Attributes:
        PENDING: accepted, and not yet started.
        RUNNING: started; its agent may still be starting.
        STOPPING: on its way to the end, or stopped in a way that is still billed.
        TERMINATED: gone for good, and no longer billed.
    """

    PENDING = "pending"
    RUNNING = "running"
    STOPPING = "stopping"
    TERMINATED = "terminated"


class StateReason(str, Enum):
    """Why an instance is stopping or gone, where the cloud tells.

    Attributes:
        REQUESTED: somebody asked for it.
        SPOT_INTERRUPTION: the cloud took it away.
        SHUTDOWN_FROM_INSIDE: the machine shut itself down.
        FAILURE: it broke.
        NO_CAPACITY: it was accepted and could not be made for want of capacity. Since plugin API 1.3.
    """

    REQUESTED = "requested"
    SPOT_INTERRUPTION = "spot_interruption"
    SHUTDOWN_FROM_INSIDE = "shutdown_from_inside"
    FAILURE = "failure"
    NO_CAPACITY = "no_capacity"


class _Frozen(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", defer_build=True)


class Endpoint(_Frozen):
    """How the agent of an instance is reached: a unix socket on this computer, or SSH.

    Exactly one of `unix_socket` and `ssh_host` is set.

    Attributes:
        unix_socket: path of the agent's socket on this computer.
        ssh_host: name or address of the machine.
        ssh_port: port of its SSH server.
        ssh_user: who to log in as.
    """

    unix_socket: Path | None = None
    ssh_host: str | None = None
    ssh_port: int = 22
    ssh_user: str = "root"


class Way(Endpoint):
    """An endpoint together with what its machine proves itself with: how the core reaches it, where SSH does.

    Attributes:
        host_keys: `ssh-ed25519 AAAA...`: whoever shows another key is somebody else. None: nobody is let pass.
    """

    host_keys: tuple[str, ...] = ()

    @classmethod
    def to(cls, endpoint: Endpoint, *host_keys: str) -> Way:
        """The way to an endpoint whose machine has one of these keys."""
        return cls(**endpoint.model_dump(include=set(Endpoint.model_fields)), host_keys=host_keys)


class InstanceRef(_Frozen):
    """All that a backend needs to find one instance again; stored by the core, never interpreted.

    Attributes:
        backend: the backend's name.
        id: the cloud's own id.
        region: where it is.
        zone: the zone, or `None`.
        data: opaque text that only this backend reads.
    """

    backend: str
    id: str
    region: str
    zone: str | None = None
    data: str = ""


class Instance(_Frozen):
    """One instance as the cloud describes it now.

    Attributes:
        ref: how to find it again.
        intent: the intent it was created for, read back from its tags or its name.
        owner: the owner it was created for, read back from its tags or its name.
        state: what the cloud says.
        reason: why it is stopping or gone; `None` if unknown.
        created_at: when the cloud accepted it (aware, UTC).
        endpoint: how to reach its agent; `None` until there is an address.
    """

    ref: InstanceRef
    intent: UUID
    owner: UUID
    state: InstanceState
    reason: StateReason | None = None
    created_at: datetime
    endpoint: Endpoint | None = None


class InstanceRequest(_Frozen):
    """A request for exactly one instance, rendered once, stored before the first call and replayed byte for byte.

    Attributes:
        intent: the key of idempotency. One intent, at most one instance, for ever.
        owner: whose instances these are: the id of the control plane's database.
        name: deterministic, at most 40 characters, a valid RFC 1035 label.
        token: deterministic, 64 hexadecimal characters, for clouds with an idempotency token.
        request_id: deterministic UUID, for clouds that want one.
        offer: what to buy.
        tags: must be on the instance, its volumes and interfaces from the create call on. Keys and values are
            `[a-z0-9_-]`, at most 63 characters, so that they are valid on every cloud.
        expires_at: when the machine must be gone at the latest; `None` for no limit.
        ssh_public_keys: OpenSSH public keys that may log in.
        user_data: cloud-init text for machines that boot; empty for a backend without `boots_machines`. Holds nothing
            of the job's. The key in it is the one with which the machine proves itself when it is first spoken to, and
            no other time.
        agent_command: argv that starts the agent on the machine where it is run, for backends that start
            processes, pods or batch jobs. The agent keeps its state and its socket `agent.sock` in
            its working directory. Holds no secret.
    """

    intent: UUID
    owner: UUID
    name: str = Field(max_length=40, pattern=r"^[a-z]([a-z0-9-]*[a-z0-9])?$")
    token: str = Field(pattern=r"^[0-9a-f]{64}$")
    request_id: UUID
    offer: Offer
    tags: dict[str, str]
    expires_at: datetime | None = None
    ssh_public_keys: tuple[str, ...] = ()
    user_data: str = ""
    agent_command: tuple[str, ...] = ()
