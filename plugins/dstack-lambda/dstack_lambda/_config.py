"""The configuration: one entry under `backends:` in the server's `config.yml`."""

from __future__ import annotations

from typing import Annotated, Literal, Self

from pydantic import Field, SecretStr, field_validator, model_validator

from dstack_core.plugin import BackendConfig


class LambdaConfig(BackendConfig):
    """An account of Lambda.

    Attributes:
        api_key: a key of https://cloud.lambda.ai/api-keys. It may do everything in the account: Lambda has no lesser
            ones.
        regions: where instances are started, as `us-east-1`. Default: everywhere.
        image: id of the image. It needs cloud-init. Default: Lambda Stack, by Lambda's own choice.
        image_family: the newest image of a family, as `lambda-stack-22-04`, instead.
        ssh_key: name of an SSH key of the account, for the launch; Lambda wants exactly one. Default: one for this
            server, added at the first launch.
        url: where the API is, for tests and for Lambda's second address. Default: Lambda's.
        request_interval: seconds between two requests of this account, by all processes of this user. Default: Lambda's
            limit.
        launch_interval: seconds between two launches, likewise.
    """

    type: Literal["lambda"] = "lambda"
    api_key: SecretStr = Field(min_length=1)
    regions: tuple[Annotated[str, Field(pattern=r"^[a-z0-9-]+$")], ...] = ()
    image: str | None = Field(default=None, min_length=1)
    image_family: str | None = Field(default=None, min_length=1)
    ssh_key: str | None = Field(default=None, min_length=1, max_length=64)
    url: str = Field(default="https://cloud.lambda.ai", pattern=r"^https?://")
    request_interval: float = Field(default=1.0, ge=0, le=60)
    launch_interval: float = Field(default=12.0, ge=0, le=600)

    @field_validator("regions")
    @classmethod
    def _each_once(cls, regions: tuple[str, ...]) -> tuple[str, ...]:
        return tuple(dict.fromkeys(regions))

    @field_validator("api_key")
    @classmethod
    def _fit_for_a_header(cls, key: SecretStr) -> SecretStr:
        if not all("!" <= letter <= "~" for letter in key.get_secret_value()):
            raise ValueError("has spaces or line ends in it. Copy the key alone, as https://cloud.lambda.ai shows it")
        return key

    @model_validator(mode="after")
    def _one_image(self) -> Self:
        if self.image and self.image_family:
            raise ValueError("`image` and `image_family` exclude each other: leave one out")
        return self
