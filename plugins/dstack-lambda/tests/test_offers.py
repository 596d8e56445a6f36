"""Offers and configuration: what is sold, where it is to be had, and what is wrong with an entry."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable

import pytest
from dstack_lambda import LambdaConfig
from dstack_lambda._backend import LambdaBackend
from dstack_lambda._gpus import gpu, known
from dstack_lambda._offers import offers_of
from pydantic import ValidationError

from dstack_core.plugin import Availability, Offer
from tests.support.lambda_cloud import LambdaCloud

# As Lambda writes them, in `gpu_description`.
SAID = [
    "A10 (24 GB PCIe)",
    "A100 (40 GB PCIe)",
    "A100 (40 GB SXM4)",
    "A100 (80 GB SXM4)",
    "A6000 (48 GB)",
    "B200 (180 GB SXM6)",
    "GH200 (96 GB)",
    "H100 (80 GB PCIe)",
    "H100 (80 GB SXM5)",
    "Quadro RTX 6000 (24 GB)",
    "RTX 6000 (24 GB)",
    "Tesla V100 (16 GB)",
]

Make = Callable[..., LambdaBackend]


def offers_for(backend: LambdaBackend, name: str) -> dict[str, Offer]:
    """Those of one type, by region."""
    found = backend.dstack_list_offers()
    return {offer.region: offer for offer in found if offer.instance_type == name}


def test_importing_the_package_loads_no_http() -> None:
    """Nor does the declaration of the backend."""
    code = "import sys, dstack_lambda; dstack_lambda.dstack_register_backends(); print('\\n'.join(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True)
    assert not {"httpx", "httpcore"} & set(done.stdout.split())


def test_prices_are_cents(backend_of: Make, lambda_cloud: LambdaCloud) -> None:
    """75 cents an hour are 0.75 USD, and the disk is in it."""
    offer = offers_for(backend_of(lambda_cloud), "gpu_1x_a10")["us-east-1"]
    assert (offer.price, offer.spot, offer.zone) == (0.75, False, None)
    assert offer.resources.disk_mib == 1400 * 1024


def test_where_there_is_none_it_says_so(backend_of: Make, lambda_cloud: LambdaCloud) -> None:
    """A type is to be had where Lambda says, and shown as sold out elsewhere, until it comes back."""
    offers = offers_for(backend_of(lambda_cloud), "gpu_1x_gh200")
    assert offers["us-east-1"].availability is Availability.AVAILABLE
    assert offers["us-west-1"].availability is Availability.NO_CAPACITY
    assert offers["us-west-1"].reason == "Lambda has no gpu_1x_gh200 in us-west-1 now"
    lambda_cloud.plane.capacity(0, type="gpu_1x_gh200", zone="us-east-1")
    assert not any(
        offer.availability.worth_trying for offer in offers_for(backend_of(lambda_cloud), "gpu_1x_gh200").values()
    )
    lambda_cloud.plane.capacity(None, type="gpu_1x_gh200", zone="us-east-1")
    assert offers_for(backend_of(lambda_cloud), "gpu_1x_gh200")["us-east-1"].availability.worth_trying


def test_a_configured_region_is_shown_even_with_nothing_in_it(backend_of: Make, lambda_cloud: LambdaCloud) -> None:
    """So that a plan can say what it is that is missing there."""
    offers = backend_of(lambda_cloud, regions=["europe-central-1"]).dstack_list_offers()
    assert {offer.region for offer in offers} == {"europe-central-1"}
    assert not any(offer.availability.worth_trying for offer in offers)


def test_arm_is_arm(backend_of: Make, lambda_cloud: LambdaCloud) -> None:
    """A Grace Hopper has no x86 processor."""
    assert offers_for(backend_of(lambda_cloud), "gpu_1x_gh200")["us-east-1"].resources.arch == "arm"
    assert offers_for(backend_of(lambda_cloud), "gpu_1x_a10")["us-east-1"].resources.arch == "x86"


@pytest.mark.parametrize("said", SAID)
def test_every_gpu_of_lambda_is_known(said: str) -> None:
    """Each has a compute capability, and a name that users write."""
    assert known(said)
    one = gpu(said)
    assert one is not None
    assert one.name == one.name.upper().replace(" ", "")
    assert one.memory_mib % 1024 == 0


@pytest.mark.parametrize(("said", "name", "gib"), [("Quadro RTX 6000 (24 GB)", "RTX6000", 24), ("X1 (1 GB)", "X1", 1)])
def test_a_gpu_is_named_as_users_write_it(said: str, name: str, gib: int) -> None:
    """Without vendor and memory; also one that is new."""
    one = gpu(said)
    assert one is not None
    assert (one.name, one.memory_mib) == (name, gib * 1024)


def test_what_nobody_can_tell_anything_of_is_left_out() -> None:
    """A GPU without memory in its description cannot be chosen by anybody; the rest is offered all the same."""
    specs = {"vcpus": 4, "memory_gib": 16, "storage_gib": 100, "gpus": 1}
    types = {
        name: {
            "instance_type": {"gpu_description": said, "price_cents_per_hour": 100, "specs": specs, "new": "field"},
            "regions_with_capacity_available": [{"name": "us-east-1", "description": ""}],
            "more": 1,
        }
        for name, said in (("good", "A10 (24 GB)"), ("new", "Quantum"))
    }
    assert [offer.instance_type for offer in offers_of(types, ())] == ["good"]


@pytest.mark.parametrize(
    ("entry", "said"),
    [
        ({"api_key": None}, "api_key"),
        ({"api_key": ""}, "api_key"),
        ({"api_key": "secret with\nline ends"}, "Copy the key alone"),
        ({"regions": ["US East"]}, "regions"),
        ({"image": "x", "image_family": "y"}, "exclude each other"),
        ({"ssh_key": ""}, "ssh_key"),
        ({"url": "cloud.lambda.ai"}, "url"),
        ({"request_interval": -1}, "request_interval"),
        ({"region": "us-east-1"}, "region"),
    ],
)
def test_what_is_wrong_with_a_configuration_is_said(entry: dict[str, object], said: str) -> None:
    """Which key it is, and what it should be; never the secret."""
    with pytest.raises(ValidationError, match=said) as caught:
        LambdaConfig.model_validate({"type": "lambda", "api_key": "secret_x", **entry})
    assert "secret" not in str(caught.value)


@pytest.mark.parametrize(
    ("entry", "said"),
    [
        ({"regions": ["us-east-9"]}, "There is no region us-east-9. Leave it out of `regions`, or take one of: asia"),
        ({"image": "no-such"}, "There is no image no-such"),
        ({"image_family": "no-such"}, "Set `image_family` to one of: lambda-stack-22-04, ubuntu-24-04-lts"),
        ({"ssh_key": "mine"}, "There is no SSH key 'mine' in the account. Add it at https://cloud.lambda.ai/ssh-keys"),
    ],
)
def test_the_check_says_what_is_missing(
    backend_of: Make, lambda_cloud: LambdaCloud, entry: dict[str, object], said: str
) -> None:
    """Each problem with its cure, and only that one."""
    (problem,) = backend_of(lambda_cloud, **entry).dstack_check_config()
    assert said in problem
    assert not problem.endswith(("..", " "))
