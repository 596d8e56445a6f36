"""Whether the configuration can work. Reads only."""

from __future__ import annotations

from collections.abc import Iterator

from dstack_lambda._api import Api
from dstack_lambda._config import LambdaConfig
from dstack_lambda._offers import regions_of


def problems(api: Api, config: LambdaConfig) -> Iterator[str]:
    """One sentence for each problem.

    Quotas cannot be read: Lambda says them when they are met.

    Raises:
        BackendError: nothing can be said, as with a wrong key.
    """
    images = api.images()
    there = regions_of(api.instance_types()) | {image["region"]["name"] for image in images}
    for region in config.regions:
        if region not in there:
            yield f"There is no region {region}. Leave it out of `regions`, or take one of: {', '.join(sorted(there))}."
    if config.image and config.image not in {image["id"] for image in images}:
        yield f"There is no image {config.image}. Leave `image` out, or take the id of one that `GET /images` lists."
    families = sorted({image["family"] for image in images})
    if config.image_family and config.image_family not in families:
        yield f"There is no image family {config.image_family}. Set `image_family` to one of: {', '.join(families)}."
    yield from _of_keys(api, config)


def _of_keys(api: Api, config: LambdaConfig) -> Iterator[str]:
    names = sorted(str(key["name"]) for key in api.ssh_keys())
    if config.ssh_key and config.ssh_key not in names:
        yield (
            f"There is no SSH key '{config.ssh_key}' in the account. Add it at https://cloud.lambda.ai/ssh-keys, or "
            "leave `ssh_key` out: then one is added for this server."
        )
