"""The configuration: one entry under `backends:` in the server's `config.yml`."""

from __future__ import annotations

import re
from typing import Annotated, Literal, Self, TypeAlias

from pydantic import BaseModel, ConfigDict, Field, SecretStr, field_validator, model_validator

from dstack_core.plugin import BackendConfig

_REGION = re.compile(r"^[a-z]+-[a-z]+\d+$")
_LABEL_KEY = re.compile(r"^[a-z][a-z0-9_-]{0,62}$")
_LABEL_VALUE = re.compile(r"^[a-z0-9_-]{0,63}$")
_OURS = frozenset({"managed-by", "owner", "intent", "run", "project", "expires-at", "request"})
_NAME = r"[a-z]([a-z0-9-]{0,61}[a-z0-9])?"


class _Creds(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, hide_input_in_errors=True)


class DefaultCreds(_Creds):
    """The SDK's own chain: `GOOGLE_APPLICATION_CREDENTIALS`, what `gcloud` keeps, the machine's service account."""

    type: Literal["default"] = "default"


class ServiceAccount(_Creds):
    """A key of a service account; exactly one of `filename` and `data`.

    Attributes:
        filename: path of the JSON file.
        data: what is in the file.
    """

    type: Literal["service_account"]
    filename: str | None = None
    data: SecretStr | None = None

    @model_validator(mode="after")
    def _one_of_both(self) -> Self:
        if (self.filename is None) == (self.data is None):
            raise ValueError("set exactly one of `filename` (a path) and `data` (what is in the file)")
        return self


Creds: TypeAlias = Annotated[DefaultCreds | ServiceAccount, Field(discriminator="type")]


class GcpConfig(BackendConfig):
    """A project of Google Cloud.

    Attributes:
        project: its id, as `my-project-123`.
        creds: who to be. Default: the SDK's own chain.
        regions: where instances are started, as `us-central1`. Default: every region of the project.
        network: the network, by its name or as `projects/P/global/networks/N` where it is another project's.
            Default: `default`.
        subnetwork: name of the subnetwork in each of the regions, for a network that does not make its own. Default:
            the region's own.
        firewall: whether a rule that lets SSH in is made at the first start, for the instances of this backend alone.
            Default: yes.
        image: the image, as `projects/P/global/images/NAME` or `.../images/family/FAMILY`. It needs cloud-init.
            Default: Canonical's Ubuntu, and for GPUs Google's Deep Learning image.
        vm_service_account: e-mail address of the service account of the instances. Default: none.
        public_ips: whether instances are reached by a public address; otherwise by their private one, from within the
            network. Default: yes.
        labels: more labels for everything that is made.
        endpoint_url: where the APIs are, for private endpoints and for tests. Default: Google's.
    """

    type: Literal["gcp"] = "gcp"
    project: str = Field(pattern=r"^([a-z0-9.-]+:)?[a-z][a-z0-9-]{4,28}[a-z0-9]$")
    creds: Creds = DefaultCreds()
    regions: tuple[str, ...] = ()
    network: str = Field(default="default", pattern=rf"^(projects/[a-z0-9:.-]+/global/networks/)?{_NAME}$")
    subnetwork: str | None = Field(default=None, pattern=rf"^{_NAME}$")
    firewall: bool = True
    image: str | None = Field(default=None, pattern=rf"^projects/[a-z0-9:.-]+/global/images/(family/)?{_NAME}$")
    vm_service_account: str | None = Field(default=None, pattern=r"^[^@\s]+@[a-z0-9.-]+$")
    public_ips: bool = True
    labels: dict[str, str] = Field(default_factory=dict)
    endpoint_url: str | None = Field(default=None, pattern=r"^https?://")

    @field_validator("regions")
    @classmethod
    def _named_as_regions(cls, regions: tuple[str, ...]) -> tuple[str, ...]:
        for region in regions:
            if not _REGION.match(region):
                raise ValueError(
                    f"{region!r} is no name of a region. Example: us-central1 (a zone, us-central1-a, is not)"
                )
        return tuple(dict.fromkeys(regions))

    @field_validator("labels")
    @classmethod
    def _labels_of_their_own(cls, labels: dict[str, str]) -> dict[str, str]:
        for key, value in labels.items():
            if key in _OURS:
                raise ValueError(f"the label {key!r} is set by dstack. Choose another key")
            if not _LABEL_KEY.match(key) or not _LABEL_VALUE.match(value):
                raise ValueError(
                    f"the label {key!r}: keys begin with a-z, keys and values have up to 63 of these: a-z, 0-9, - and _"
                )
        return labels

    @property
    def network_path(self) -> str:
        """The network as Compute Engine names it."""
        return self.network if "/" in self.network else f"projects/{self.project}/global/networks/{self.network}"

    @property
    def network_project(self) -> str:
        """Whose network it is."""
        return self.network_path.split("/")[1]

    @property
    def network_name(self) -> str:
        """Its name alone."""
        return self.network_path.rpartition("/")[2]
