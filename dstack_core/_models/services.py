"""Services and dev environments, and the parts that only they have.

Apart from `configurations`, which loads this module when one of its names is asked for: most programs run tasks.
"""

import re
from collections.abc import Mapping
from typing import Annotated, Any, Literal, Self

from pydantic import AfterValidator, BeforeValidator, Field, model_validator

from dstack_core._models._base import Accepts, TaggedModel, ValueModel, default
from dstack_core._models.configurations import (
    BaseConfiguration,
    Lines,
    NodeGroup,
    PortJson,
    PortMapping,
    Ports,
    Task,
    is_short,
    need_commands,
    port_number,
    read_port,
)
from dstack_core._models.profiles import Duration, IdleDuration, OptionalDuration
from dstack_core._models.resources import Range
from dstack_core.errors import ConfigurationError

__all__ = [
    "AnyConfiguration",
    "DevEnvironment",
    "HeaderPartitioningKey",
    "HttpHeader",
    "IPAddressPartitioningKey",
    "OpenAIChatModel",
    "ProbeConfig",
    "RateLimit",
    "Scaling",
    "Service",
    "TGIChatModel",
]

# ---------------------------------------------------------------------------------------------------------------------
# Parts of a service
# ---------------------------------------------------------------------------------------------------------------------


class OpenAIChatModel(TaggedModel):
    """A model that the service offers in OpenAI's protocol.

    Attributes:
        type: always `"chat"`.
        name: name of the model.
        format: always `"openai"`.
        prefix: path under which the service speaks that protocol.
    """

    type: Literal["chat"] = "chat"
    name: str
    format: Literal["openai"]
    prefix: str = "/v1"


class TGIChatModel(TaggedModel):
    """A model that the service offers in the protocol of Text Generation Inference.

    Attributes:
        type: always `"chat"`.
        name: name of the model.
        format: always `"tgi"`.
        chat_template: Jinja template of a conversation; the model's own if not set.
        eos_token: the token that ends an answer; the model's own if not set.
    """

    type: Literal["chat"] = "chat"
    name: str
    format: Literal["tgi"]
    chat_template: str | None = None
    eos_token: str | None = None


def _read_model(value: Any) -> Any:
    return {"type": "chat", "name": value, "format": "openai"} if isinstance(value, str) else value


class Scaling(ValueModel):
    """How the number of replicas follows the load.

    Attributes:
        metric: `"rps"`: requests per second.
        target: the metric per replica that is aimed at.
        window: over which the metric is averaged, in seconds or as `"1m"`.
        scale_up_delay: the least time between a change and more replicas, in seconds or as `"5m"`.
        scale_down_delay: the least time between a change and fewer replicas, in seconds or as `"10m"`.
    """

    metric: Literal["rps"]
    target: Annotated[float, Field(gt=0, allow_inf_nan=False)]
    window: OptionalDuration = default(None)
    scale_up_delay: Duration = default(300)
    scale_down_delay: Duration = default(600)


class IPAddressPartitioningKey(TaggedModel):
    """Counts requests per client address.

    Attributes:
        type: always `"ip_address"`.
    """

    type: Literal["ip_address"] = "ip_address"


class HeaderPartitioningKey(TaggedModel):
    """Counts requests per value of a header.

    Attributes:
        type: always `"header"`.
        header: name of the header.
    """

    type: Literal["header"] = "header"
    header: str


class RateLimit(ValueModel):
    """The most requests that a part of a service takes.

    Attributes:
        prefix: path prefix that the limit is for.
        key: what requests are counted by.
        rps: requests per second.
        burst: requests above that which are still taken at once.
    """

    prefix: Annotated[str, Field(pattern="^/")] = "/"
    key: Annotated[IPAddressPartitioningKey | HeaderPartitioningKey, Field(discriminator="type")] = default(
        IPAddressPartitioningKey.model_construct({"type"})
    )
    rps: Annotated[float, Field(gt=0, allow_inf_nan=False)]
    burst: Annotated[int, Field(ge=0)] = 0


class HttpHeader(ValueModel):
    """A header of a probe's request.

    Attributes:
        name: name of the header.
        value: its value. Shown in no message and no log.
    """

    name: str
    value: str = Field(repr=False)


class ProbeConfig(ValueModel):
    """A request that finds out whether a replica is ready.

    Attributes:
        type: `"http"`.
        url: path of the request.
        method: HTTP method.
        headers: headers of the request.
        body: body of the request.
        timeout: how long an answer may take, in seconds or as `"10s"`.
        interval: time between two requests, in seconds or as `"15s"`.
        ready_after: so many good answers in a row make a replica ready.
    """

    type: Literal["http"]
    url: Annotated[str, Field(pattern="^/")] = "/"
    method: Literal["get", "post", "put", "delete", "patch", "head"] = "get"
    headers: tuple[HttpHeader, ...] = ()
    body: str | None = None
    timeout: Duration = default(10)
    interval: Duration = default(15)
    ready_after: Annotated[int, Field(ge=1)] = 1


def _read_service_port(value: Any) -> Any:
    # A bare port is offered on the usual port of the web.
    fields = {"local_port": 80, "container_port": port_number(str(value))} if _is_bare_port(value) else read_port(value)
    if isinstance(fields, Mapping) and not fields.keys() <= PortMapping.model_fields.keys():
        # A key that there is not is the first thing to say.
        return fields
    local = fields.get("local_port") if isinstance(fields, Mapping) else getattr(fields, "local_port", 80)
    if local is None:
        raise ConfigurationError("a service needs a fixed port: write 8080 or '80:8080', not '*:8080'")
    return fields


def _is_bare_port(value: Any) -> bool:
    return is_short(value) and re.fullmatch("[0-9]{1,6}", str(value)) is not None


def _read_replicas(value: Any) -> Any:
    if isinstance(value, str) and value.strip().startswith(".."):
        return f"0{value.strip()}"
    # Unlike a resource, a single number of replicas is exact.
    return (
        {"min": value, "max": value}
        if isinstance(value, int) or (isinstance(value, str) and ".." not in value)
        else value
    )


ServicePort = Annotated[
    Accepts[PortMapping, int | str],
    BeforeValidator(_read_service_port, json_schema_input_type=PortMapping | PortJson),
]
Replicas = Annotated[Accepts[Range[int], int | str], BeforeValidator(_read_replicas, json_schema_input_type=Range[int])]


class Service(BaseConfiguration):
    """A job that serves a port until it is stopped.

    Attributes:
        type: always `"service"`.
        port: the port it listens on. `8080` appears on the usual port of the web, 80; `"8000:8080"` says which one.
            Processes that share a machine listen where the variable `PORT` says, which they are given unless `env`
            sets it. A single replica gets the port itself if that is free; in a container it is the port always.
        commands: what runs. Needed unless there is an `image`, whose own command runs then.
        gateway: name of a gateway; `True` for the default one, `False` for none.
        strip_prefix: take the path under which the service is published off each request.
        model: name of a model that the service offers in OpenAI's protocol, or the details.
        https: publish over HTTPS; `"auto"` where there is a certificate.
        auth: ask for a token.
        scaling: how the number of replicas follows the load.
        rate_limits: the most requests that are taken.
        probes: requests that find out whether a replica is ready: all of them must be answered with a status from 200
            to 299. If not set: `GET /`, and any status below 500 will do.
        replicas: how many are kept running, as `2`; a range as `"1..4"` needs `scaling`.
        groups: the same, for replicas that differ.

    Raises:
        ConfigurationError: a field is unknown, or a value does not fit; one line per problem.
    """

    type: Literal["service"] = "service"
    port: ServicePort
    commands: Lines = default([])
    gateway: bool | str | None = None
    strip_prefix: bool = True
    model: Annotated[
        Accepts[Annotated[OpenAIChatModel | TGIChatModel, Field(discriminator="format")] | None, str],
        BeforeValidator(_read_model, json_schema_input_type=OpenAIChatModel | TGIChatModel | str | None),
    ] = default(None)
    https: bool | Literal["auto"] | None = None
    auth: bool = True
    scaling: Scaling | None = None
    rate_limits: list[RateLimit] = default([])
    probes: list[ProbeConfig] | None = None
    replicas: Replicas = default(Range(min=1, max=1))
    groups: list[NodeGroup] | None = None

    @model_validator(mode="after")
    def _scales_if_it_can(self) -> Self:
        need_commands(self.commands, self.image)
        if (self.replicas.min != self.replicas.max) and self.scaling is None:
            raise ConfigurationError(
                f"replicas={str(self.replicas)!r} needs 'scaling', which says when there are how many"
            )
        return self


def _some_time(value: int | str | None) -> int | str | None:
    if value == 0:
        raise ConfigurationError("0 would end it at once: write 'off' for never")
    return value


class DevEnvironment(BaseConfiguration):
    """A machine to work on, reached from an IDE or over SSH.

    Attributes:
        type: always `"dev-environment"`.
        ide: `"vscode"`, `"cursor"`, `"windsurf"`, `"zed"`, or `None` for SSH alone.
        version: version of the IDE.
        init: commands that run when it starts.
        inactivity_duration: after which it is stopped if nobody is at work in it, as `"2h"`; `"off"` or not set for
            never. Somebody is at work while a client is attached, a session is open in its container, a terminal or an
            editor is open in its folder, or files there change. Programs that run do not count.
        ports: ports to forward while attached, as for a `Task`.

    Raises:
        ConfigurationError: a field is unknown, or a value does not fit; one line per problem.
    """

    type: Literal["dev-environment"] = "dev-environment"
    ide: Literal["vscode", "cursor", "windsurf", "zed"] | None = None
    version: str | None = None
    init: Lines = default([])
    inactivity_duration: Annotated[IdleDuration, AfterValidator(_some_time)] = default(None)
    ports: Ports = default([])


AnyConfiguration = Task | Service | DevEnvironment
