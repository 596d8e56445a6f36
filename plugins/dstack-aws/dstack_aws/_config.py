"""The configuration: one entry under `backends:` in the server's `config.yml`."""

from __future__ import annotations

import re
from typing import Annotated, Literal, Self, TypeAlias

from pydantic import BaseModel, ConfigDict, Field, SecretStr, field_validator, model_validator

from dstack_core.plugin import BackendConfig

_REGION = re.compile(r"^[a-z]{2}(-[a-z]+)+-\d+$")
_OURS = frozenset({"managed-by", "owner", "intent", "run", "project", "expires-at", "name"})


class _Creds(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, hide_input_in_errors=True)


class DefaultCreds(_Creds):
    """The SDK's own chain: environment, `~/.aws`, single sign-on, the role of the machine."""

    type: Literal["default"] = "default"


class AccessKey(_Creds):
    """A pair of keys.

    Attributes:
        access_key: the id of the key (`AKIA...`).
        secret_key: the secret.
        session_token: for temporary keys.
    """

    type: Literal["access_key"]
    access_key: SecretStr
    secret_key: SecretStr
    session_token: SecretStr | None = None


class NamedProfile(_Creds):
    """A profile of `~/.aws/config`.

    Attributes:
        name: the profile's name.
    """

    type: Literal["profile"]
    name: str


class AssumedRole(_Creds):
    """A role to take on, by way of the SDK's own chain or a profile. Renewed before it runs out.

    Attributes:
        role_arn: the role.
        external_id: what the role's trust policy asks for, if anything.
        profile: the profile to take it on from; the SDK's own chain if not set.
    """

    type: Literal["role"]
    role_arn: str = Field(pattern=r"^arn:aws[a-z-]*:iam::\d{12}:role/.+$")
    external_id: SecretStr | None = None
    profile: str | None = None


Creds: TypeAlias = Annotated[DefaultCreds | AccessKey | NamedProfile | AssumedRole, Field(discriminator="type")]


class AwsConfig(BackendConfig):
    """An account of Amazon EC2.

    Attributes:
        creds: who to be. Default: the SDK's own chain.
        regions: where instances are started, as `us-east-1`. Default: each region that is enabled in the account.
        vpc: the network, as `vpc-0abc`; then `regions` is its region alone. Default: the region's default network.
        subnets: of these subnets only, as `subnet-0abc`; likewise. Default: all of the network.
        security_group: for the instances, as `sg-0abc`; likewise. Default: one that lets in SSH alone, made at the
            first start.
        ami: the image, as `ami-0abc` (likewise) or by region. It needs cloud-init. Default: Canonical's Ubuntu, and for
            GPUs Amazon's Deep Learning Base image.
        instance_profile: name of the IAM instance profile of the instances. Default: none.
        public_ips: whether instances are reached by a public address; otherwise by their private one, from within the
            network. Default: yes.
        tags: more tags for everything that is made.
        endpoint_url: where the API is, for private endpoints and for tests. Default: Amazon's.
    """

    type: Literal["aws"] = "aws"
    creds: Creds = DefaultCreds()
    regions: tuple[str, ...] = ()
    vpc: str | None = Field(default=None, pattern=r"^vpc-[0-9a-f]+$")
    subnets: tuple[Annotated[str, Field(pattern=r"^subnet-[0-9a-f]+$")], ...] = ()
    security_group: str | None = Field(default=None, pattern=r"^sg-[0-9a-f]+$")
    ami: str | dict[str, str] | None = None
    instance_profile: str | None = None
    public_ips: bool = True
    tags: dict[str, str] = Field(default_factory=dict)
    endpoint_url: str | None = Field(default=None, pattern=r"^https?://")

    @field_validator("regions")
    @classmethod
    def _named_as_regions(cls, regions: tuple[str, ...]) -> tuple[str, ...]:
        for region in regions:
            if not _REGION.match(region):
                raise ValueError(f"{region!r} is no name of a region. Example: us-east-1 (a zone, us-east-1a, is not)")
        return tuple(dict.fromkeys(regions))

    @model_validator(mode="after")
    def _ids_are_of_one_region(self) -> Self:
        ids = {"vpc": self.vpc, "subnets": self.subnets, "security_group": self.security_group}
        given = [name for name, value in ids.items() if value] + (["ami"] if isinstance(self.ami, str) else [])
        if given and len(self.regions) != 1:
            raise ValueError(f"{', '.join(given)} exist in one region only: set `regions` to that one, as [us-east-1]")
        return self

    @field_validator("ami")
    @classmethod
    def _named_as_images(cls, ami: str | dict[str, str] | None) -> str | dict[str, str] | None:
        for image in ami.values() if isinstance(ami, dict) else [ami] if ami else []:
            if not re.match(r"^ami-[0-9a-f]+$", image):
                raise ValueError(f"{image!r} is no id of an image. Example: ami-0123456789abcdef0")
        return ami

    @field_validator("tags")
    @classmethod
    def _tags_of_their_own(cls, tags: dict[str, str]) -> dict[str, str]:
        for key, value in tags.items():
            if key.lower() in _OURS or key.lower().startswith("aws:"):
                raise ValueError(f"the tag {key!r} is set by dstack or by Amazon itself. Choose another key")
            if not 1 <= len(key) <= 128 or len(value) > 256:
                raise ValueError(f"the tag {key!r} is too long: keys have up to 128 characters, values up to 256")
        return tags

    def image_in(self, region: str) -> str | None:
        """The configured image for a region, if any."""
        return self.ami.get(region) if isinstance(self.ami, dict) else self.ami
