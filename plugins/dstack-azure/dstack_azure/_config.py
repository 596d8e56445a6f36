"""The configuration: one entry under `backends:` in the server's `config.yml`."""

from __future__ import annotations

import re
from typing import Annotated, Literal, Self, TypeAlias

from pydantic import BaseModel, ConfigDict, Field, SecretStr, field_validator, model_validator

from dstack_core.plugin import BackendConfig

_GUID = r"^[0-9a-fA-F]{8}(-[0-9a-fA-F]{4}){3}-[0-9a-fA-F]{12}$"
_REGION = re.compile(r"^[a-z][a-z0-9]+$")
_IMAGE = re.compile(r"^([\w.-]+:){3}[\w.-]+$|^/(subscriptions|sharedGalleries|communityGalleries)/\S+$", re.IGNORECASE)
_ODD = re.compile(r"[<>%&\\?/]")
_OURS = frozenset({"managed-by", "owner", "intent", "run", "project", "expires-at", "name", "request"})


class _Creds(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, hide_input_in_errors=True)


class DefaultCreds(_Creds):
    """The SDK's own chain: environment, workload identity, managed identity, `az login`."""

    type: Literal["default"] = "default"


class ClientSecret(_Creds):
    """An application (service principal) with its secret.

    Attributes:
        tenant_id: the directory's id.
        client_id: the application's id.
        client_secret: the value of the secret, not its id.
    """

    type: Literal["client"]
    tenant_id: str = Field(pattern=_GUID)
    client_id: str = Field(pattern=_GUID)
    client_secret: SecretStr


Creds: TypeAlias = Annotated[DefaultCreds | ClientSecret, Field(discriminator="type")]


class AzureConfig(BackendConfig):
    """A subscription of Microsoft Azure.

    Attributes:
        subscription_id: the subscription.
        creds: who to be. Default: the SDK's own chain.
        regions: where instances are started, as `eastus`; at least one. The first one also holds the resource group.
        resource_group: where everything is put; made at the first start. Default: `dstack`.
        vnet: the network to use, as `GROUP/NAME`; then `regions` is its region alone. Default: `dstack-REGION`, made at
            the first start, which lets in SSH and nothing else.
        subnet: name of the subnet; needs `vnet`. Default: `default` of a `vnet`.
        image: the image, as `PUBLISHER:OFFER:SKU:VERSION` or the id of an image. It needs cloud-init. Default:
            Canonical's Ubuntu, and for GPUs Microsoft's Ubuntu with their driver.
        public_ips: whether instances are reached by a public address; otherwise by their private one, from within the
            network. Default: yes.
        tags: more tags for everything that is made.
        base_url: where the API is, for other clouds of Azure's and for tests. Default: the public one.
        authority: where one logs in, likewise.
        prices_url: where the list of prices is, likewise.
        ca_bundle: file of the certificates to trust. Default: the usual ones.
        instance_discovery: whether the authority is looked up with Microsoft first. Default: yes.
        polling_interval: seconds between two looks at a network that is being made, once for each region.
    """

    type: Literal["azure"] = "azure"
    subscription_id: str = Field(pattern=_GUID)
    creds: Creds = DefaultCreds()
    regions: tuple[str, ...] = Field(min_length=1)
    resource_group: str = Field(default="dstack", pattern=r"^[\w().-]{0,89}[\w()-]$")
    vnet: str | None = Field(default=None, pattern=r"^[\w().-]+/[\w.-]+$")
    subnet: str | None = Field(default=None, pattern=r"^[\w.-]+$")
    image: str | None = None
    public_ips: bool = True
    tags: dict[str, str] = Field(default_factory=dict)
    base_url: str = Field(default="https://management.azure.com", pattern=r"^https://")
    authority: str = Field(default="https://login.microsoftonline.com", pattern=r"^https://")
    prices_url: str = Field(default="https://prices.azure.com", pattern=r"^https://")
    ca_bundle: str | None = None
    instance_discovery: bool = True
    polling_interval: float = Field(default=1.0, gt=0, le=10)

    @field_validator("base_url", "authority", "prices_url")
    @classmethod
    def _without_slash(cls, url: str) -> str:
        return url.rstrip("/")

    @field_validator("regions")
    @classmethod
    def _named_as_regions(cls, regions: tuple[str, ...]) -> tuple[str, ...]:
        for region in regions:
            if not _REGION.match(region):
                raise ValueError(f"{region!r} is no name of a region. Example: eastus (neither 'East US' nor eastus-1)")
        return tuple(dict.fromkeys(regions))

    @field_validator("image")
    @classmethod
    def _named_as_images(cls, image: str | None) -> str | None:
        if image is not None and not _IMAGE.match(image):
            raise ValueError(
                f"{image!r} is no image. Examples: Canonical:ubuntu-24_04-lts:server:latest, "
                "/subscriptions/.../images/NAME"
            )
        return image

    @field_validator("tags")
    @classmethod
    def _tags_of_their_own(cls, tags: dict[str, str]) -> dict[str, str]:
        for key, value in tags.items():
            if key.lower() in _OURS:
                raise ValueError(f"the tag {key!r} is set by dstack. Choose another key")
            if not 1 <= len(key) <= 512 or len(value) > 256:
                raise ValueError(f"the tag {key!r} is too long: keys have up to 512 characters, values up to 256")
            if _ODD.search(key):
                raise ValueError(f"the tag {key!r} has a character that Azure does not take: one of <>%&\\?/")
        return tags

    @model_validator(mode="after")
    def _network_is_of_one_region(self) -> Self:
        if self.subnet is not None and self.vnet is None:
            raise ValueError("subnet is a part of a network: set `vnet`, as GROUP/NAME")
        if self.vnet is not None and len(self.regions) != 1:
            raise ValueError("vnet exists in one region only: set `regions` to that one, as [eastus]")
        return self
