"""A backend and a wrapping plugin, as their authors write them."""

from collections.abc import Generator, Sequence
from datetime import UTC, datetime
from typing import Literal, assert_type
from uuid import UUID

from pydantic import SecretStr

from dstack_core.plugin import (
    Availability,
    BackendConfig,
    BackendInfo,
    Endpoint,
    Gpu,
    GpuRequirements,
    Instance,
    InstanceRef,
    InstanceRequest,
    InstanceState,
    MachineResources,
    NoCapacityError,
    Offer,
    QuotaExceededError,
    RateLimitedError,
    Requirements,
    SpotPolicy,
    StateReason,
    fitting_gpus,
    hookimpl,
)


class CloudConfig(BackendConfig):
    """A configuration with a secret."""

    type: Literal["cloud"] = "cloud"
    regions: tuple[str, ...] = ()
    token: SecretStr


@hookimpl
def dstack_register_backends() -> list[BackendInfo]:
    """The entry point's hook."""
    return [
        BackendInfo(
            name="cloud",
            title="Cloud",
            config=CloudConfig,
            factory="dstack_cloud:Cloud",
            ownership="tags",
            terminates_itself="cloud",
            visibility_window=30,
        )
    ]


MACHINE = MachineResources(cpus=8, memory_mib=65536, disk_mib=102400, gpus=(Gpu(name="A100", memory_mib=81920),))


class Cloud:
    """The five hooks, and the optional ones."""

    def __init__(self, config: CloudConfig) -> None:
        self._token = config.token.get_secret_value()

    @hookimpl
    def dstack_list_offers(self, requirements: Requirements) -> list[Offer]:
        """Offers."""
        assert_type(requirements.gpu, GpuRequirements | None)
        assert_type(requirements.spot_policy, SpotPolicy)
        assert_type(requirements.regions, tuple[str, ...])
        spot = requirements.spot_policy is not SpotPolicy.ONDEMAND
        return [Offer("cloud", "a8", "eu", MACHINE, 3.5, spot=spot, availability=Availability.AVAILABLE, data="{}")]

    @hookimpl
    def dstack_create_instance(self, request: InstanceRequest, backend: str) -> Instance:
        """An instance, or why there is none."""
        if request.offer.spot:
            raise NoCapacityError("none left", scope="zone", retry_after=30)
        if request.offer.price > 100:
            raise QuotaExceededError("too many", scope="account")
        ref = InstanceRef(backend=backend, id=request.name, region=request.offer.region)
        return Instance(
            ref=ref,
            intent=request.intent,
            owner=request.owner,
            state=InstanceState.PENDING,
            created_at=datetime.now(UTC),
            endpoint=Endpoint(ssh_host="203.0.113.1", ssh_user="ubuntu"),
        )

    @hookimpl
    def dstack_get_instance(self, ref: InstanceRef) -> Instance | None:
        """Nothing is left of it."""
        assert_type(ref.zone, str | None)
        return None

    @hookimpl
    def dstack_list_instances(self, owner: UUID) -> list[Instance]:
        """Never a part of the list."""
        raise RateLimitedError(f"ask later about {owner}", retry_after=1.5)

    @hookimpl
    def dstack_terminate_instance(self, ref: InstanceRef) -> None:
        """Gone already is success."""

    @hookimpl
    def dstack_check_config(self) -> Sequence[str]:
        """Problems, each with its cure."""
        return []

    @hookimpl
    def dstack_connect(self, instance: Instance) -> Endpoint | None:
        """How an instance without an address is reached."""
        assert_type(instance.reason, StateReason | None)
        return instance.endpoint


@hookimpl(wrapper=True)
def dstack_list_offers(backend: str) -> Generator[None, list[Offer], list[Offer]]:
    """A wrapper around every backend."""
    offers = yield
    assert_type(offers, list[Offer])
    return [offer for offer in offers if offer.price < 1 or backend == "cloud"]


def helpers(requirements: GpuRequirements) -> None:
    """What a backend may use to match GPUs."""
    print(fitting_gpus(requirements, MACHINE.gpus))
