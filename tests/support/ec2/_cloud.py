"""The cloud under test: the front that the SDK speaks to, and what a test may do to it."""

from __future__ import annotations

import base64
import io
import re
import threading
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import ExitStack
from typing import Any, Self
from uuid import UUID, uuid4

from werkzeug.serving import WSGIRequestHandler, make_server
from werkzeug.test import run_wsgi_app

from dstack_core.plugin import Offer
from dstack_core.testing import Event, Failure, Fault, FaultPlane, Fleet, Server, Struck, Truth
from dstack_core.testing.nimbus._machines import Machines
from tests.support.ec2 import _wares
from tests.support.ec2._moto import ACCOUNT, DEEP_LEARNING, UBUNTU, Moto, app
from tests.support.ec2._wire import WORDS, Answer, BadSignature, Call, document, error, items, read, struck, with_form

KEY, SECRET = "AKIATESTTESTTESTTEST", "not-a-secret/but+kept+like+one"
PAGE = 25
"""Entries on a page, whatever is asked for: fewer than Amazon gives, so that there is more than one."""
_CHANGING = {"RunInstances", "TerminateInstances"}
_STATES = {"running": 16, "stopped": 80, "terminated": 48}
_FAILURES = {
    **{fault: Failure(message.split(" Encoded")[0]) for fault, (_, _, message) in WORDS.items()},
    Fault.NO_CAPACITY: Failure(WORDS[Fault.NO_CAPACITY][2], scope="zone"),
    Fault.QUOTA: Failure(WORDS[Fault.QUOTA][2], scope="region"),
}


class Ec2:
    """EC2 and what goes with it, on a port of this computer. A context manager.

    Args:
        regions: those of the configuration.
        fleet: its machines are the instances; without it they only seem to run.

    Attributes:
        url: where it is.
        plane: what goes wrong, and what is scarce.
        seen: every call so far, by the name of its permission.
        denied: permissions that whoever asks does not have.
    """

    def __init__(self, regions: Sequence[str] = ("us-east-1", "eu-west-1"), *, fleet: Fleet | None = None) -> None:
        self._machines = Machines(fleet) if fleet is not None else None
        self.plane = FaultPlane(_FAILURES)
        self.seen: Counter[str] = Counter()
        self.denied: set[str] = set()
        self.url = ""
        self._regions = tuple(regions)
        self._keys = {KEY: SECRET}
        self._moto = Moto(self.plane.now)
        self._app = app()
        self._lock = threading.Lock()
        self._boot = 0.0
        self._tokens: dict[tuple[str, str], tuple[dict[str, str], str, Answer]] = {}
        self._stack = ExitStack()

    def __enter__(self) -> Self:
        self._stack.enter_context(self._moto.running())
        if self._machines is not None:
            self._stack.callback(self._machines.close)
        server = make_server("127.0.0.1", 0, self._wsgi, threaded=True, request_handler=_Quiet)
        server.daemon_threads = True  # type: ignore[attr-defined]  # of its mixin: a call that hangs holds up no test
        self.url = f"http://127.0.0.1:{server.server_port}"
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
        thread.start()
        self._stack.callback(thread.join, 60)
        self._stack.callback(server.server_close)
        self._stack.callback(server.shutdown)
        self._stack.callback(self.plane.heal)
        for code, limit in _wares.QUOTAS.items():
            for region in _wares.REGIONS:
                self.plane.quota(f"{region} {code}", limit)
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    # -- abilities ---------------------------------------------------------------------------------------------------

    def config(self) -> dict[str, Any]:
        """See `Cloud`."""
        creds = {"type": "access_key", "access_key": KEY, "secret_key": SECRET}
        return {"regions": list(self._regions), "creds": creds, "endpoint_url": self.url}

    def truth(self) -> Truth:
        """See `Truthful`."""
        with self._lock:
            self._tick()
            servers = [_server(region, one) for region, one in self._moto.instances()]
            return Truth(servers, list(self._moto.leftovers()))

    def catalogue(self) -> Sequence[Offer]:
        """See `Catalogued`."""
        return [offer for region in self._regions for offer in _wares.offers(region)]

    def fail(self, kind: Fault, times: int = 1, *, after: bool = False, skip: int = 0) -> Failure:
        """See `Faulty`."""
        return self.plane.fail(kind, times, after=after, skip=skip)

    def heal(self) -> None:
        """See `Faulty`."""
        self.plane.heal()

    def lag(self, seconds: float) -> None:
        """See `Lagging`."""
        self.plane.lag(seconds)

    def calls(self) -> int:
        """See `Counting`."""
        return self.plane.calls()

    def boot(self, seconds: float) -> None:
        """See `Booting`."""
        with self._lock:
            self._boot = seconds

    def stock(self, count: int) -> None:
        """See `Stocked`."""
        for region in _wares.REGIONS:
            for number in range(count):
                tags = {"Name": "by-hand"} if number % 2 else {"owner": str(uuid4()), "intent": str(uuid4())}
                self._by_hand(region, {} if number % 3 == 2 else tags)

    def befall(self, server: str, event: Event) -> None:
        """See `Eventful`."""
        state, code = {
            Event.STOPPED: ("stopped", "Client.UserInitiatedShutdown"),
            Event.SPOT_INTERRUPTION: ("terminated", "Server.SpotInstanceTermination"),
            Event.SHUTDOWN_FROM_INSIDE: ("terminated", "Client.InstanceInitiatedShutdown"),
            Event.FAILURE: ("terminated", "Server.InternalError"),
        }[event]
        with self._lock:
            instance = next(one for _, one in self._moto.instances() if one.id == server)
            if state == "terminated":
                self._end(instance)
            _put(instance, state)
            instance.state_reason.code = code
            instance.state_reason.message = f"{code}: {event.value}"

    def unmark(self, server: str) -> None:
        """See `Unmarking`."""
        with self._lock:
            instance = next(one for _, one in self._moto.instances() if one.id == server)
            instance.ec2_backend.tags.pop(server, None)

    def server(self, id: str) -> Any:
        """An instance, with all that moto knows of it."""
        with self._lock:
            return next(one for _, one in self._moto.instances() if one.id == id)

    # -- answering ---------------------------------------------------------------------------------------------------

    def _wsgi(self, environ: dict[str, Any], start_response: Callable[..., object]) -> Iterable[bytes]:
        body = environ["wsgi.input"].read(int(environ.get("CONTENT_LENGTH") or 0))
        answer = self._answer(environ, body)
        length = str(len(answer.body))
        start_response(f"{answer.status} -", [("Content-Type", answer.type), ("Content-Length", length)])
        return [answer.body]

    def _answer(self, environ: dict[str, Any], body: bytes) -> Answer:
        try:
            call = read(environ, body, self._keys)
        except BadSignature:
            form = {} if environ.get("HTTP_X_AMZ_TARGET") else {"Action": "?"}
            nobody = Call("ec2", "", "", form, {}, body)
            return struck(nobody, Fault.UNAUTHORIZED)
        self.seen[call.name] += 1
        if call.name in self.denied:
            return struck(call, Fault.FORBIDDEN)
        making = call.action == "RunInstances" and not call.dry
        changing = call.action in _CHANGING and not call.dry
        try:
            return self.plane.carry_out(call.name, lambda: self._do(call, environ), making=making, changing=changing)
        except Struck as fault:
            if fault.fault is Fault.DROP:
                raise ConnectionAbortedError("by order") from None
            return struck(call, fault.fault)

    def _do(self, call: Call, environ: dict[str, Any]) -> Answer:
        with self._lock:
            self._tick()
            action = re.sub(r"(?<=[a-z])(?=[A-Z])", "_", call.action).lower()
            handler = getattr(self, f"_{call.service.replace('-', '')}_{action}", None)
            return handler(call, environ) if handler else self._pass_on(call, environ)

    def _pass_on(self, call: Call, environ: dict[str, Any], **changes: str) -> Answer:
        """Lets moto answer."""
        pages = {"MaxResults": str(min(PAGE, int(call.form["MaxResults"])))} if "MaxResults" in call.form else {}
        body = with_form(call, **pages, **changes) if pages or changes else call.body
        given = {**environ, "wsgi.input": io.BytesIO(body), "CONTENT_LENGTH": str(len(body))}
        chunks, status, headers = run_wsgi_app(self._app, given)
        return Answer(int(status.split()[0]), b"".join(chunks), headers.get("Content-Type", "text/xml"))

    def _tick(self) -> None:
        """Time has passed."""
        for _, instance in self._moto.instances():
            if instance.state == "pending" and self.plane.now() - instance.born >= self._boot:
                _put(instance, "running")
            if self._machines is not None and instance.state == "running":
                self._look_at(instance, self._machines)
            if instance.state == "terminated":
                self.plane.give_back(instance.client_token)

    def _look_at(self, instance: Any, machines: Machines) -> None:
        """A machine that shut itself down is terminated, as was asked for when it was ordered."""
        instance.address = machines.address(instance.id)
        if not machines.lives(instance.id):
            instance.terminate()
            instance.state_reason.code = "Client.InstanceInitiatedShutdown"
            instance.state_reason.message = "Client.InstanceInitiatedShutdown: Instance initiated shutdown"

    def _by_hand(self, region: str, tags: dict[str, str]) -> None:
        with self._lock:
            backend = self._moto.region(region)
            image = self._moto.image(region, UBUNTU, "x86_64")
            kwargs = {"instance_type": "t3.micro", "is_instance_type_default": False, "region_name": region}
            backend.run_instances(image, 1, None, [], tags={"instance": tags}, client_token=uuid4().hex, **kwargs)

    # -- what moto leaves out ----------------------------------------------------------------------------------------

    def _ec2_run_instances(self, call: Call, environ: dict[str, Any]) -> Answer:
        if call.dry:
            return self._pass_on(call, environ)
        token = call.form["ClientToken"]
        asked = {name: value for name, value in call.form.items() if name not in ("Version", "Action")}
        known = self._tokens.get((call.region, token))
        if known is not None:
            return self._again(call, asked, known)
        refusal = self._reserve(call, token)
        if refusal is not None:
            return refusal
        answer = self._pass_on(call, environ)
        made = re.search(rb"<instanceId>(i-\w+)</instanceId>", answer.body)
        if made is None:
            self.plane.give_back(token)
        else:
            self._tokens[call.region, token] = (asked, made.group(1).decode(), answer)
            self._switch_on(made.group(1).decode(), call)
        return answer

    def _switch_on(self, made: str, call: Call) -> None:
        """A machine boots with the user-data."""
        if self._machines is not None:
            user_data = base64.b64decode(call.form.get("UserData", "")).decode()
            self._machines.start(made, {"user_data": user_data})

    def _end(self, instance: Any) -> None:
        """The instance, and its machine."""
        instance.terminate()
        if self._machines is not None:
            self._machines.end(instance.id)

    def _ec2_terminate_instances(self, call: Call, environ: dict[str, Any]) -> Answer:
        answer = self._pass_on(call, environ)
        for _, instance in self._moto.instances():
            if instance.state == "terminated" and self._machines is not None and self._machines.lives(instance.id):
                self._machines.end(instance.id)
        return answer

    def _ec2_get_console_output(self, call: Call, environ: dict[str, Any]) -> Answer:
        if self._machines is None:
            return self._pass_on(call, environ)
        said = base64.b64encode(self._machines.console(call.form["InstanceId"]).encode()).decode()
        text = f"<GetConsoleOutputResponse><output>{said}</output></GetConsoleOutputResponse>"
        return Answer(200, text.encode())

    def _again(self, call: Call, asked: dict[str, str], known: tuple[dict[str, str], str, Answer]) -> Answer:
        """The same token: the same instance, if the same was asked for and it is still there."""
        before, made, answer = known
        if asked != before:
            said = "Arguments on this idempotent request are inconsistent with arguments used in previous request(s)."
            return error(call, 400, "IdempotentParameterMismatch", said)
        if any(one.id == made and one.state == "terminated" for _, one in self._moto.instances()):
            return error(call, 400, "IdempotentInstanceTerminated", f"The instance {made} of this token is terminated.")
        return answer

    def _reserve(self, call: Call, token: str) -> Answer | None:
        """Takes from what there is.

        Raises:
            Struck: there is none, or the account may not have it.
        """
        kind = call.form["InstanceType"]
        ware = _wares.WARES.get(kind)
        subnet = call.form.get("NetworkInterface.1.SubnetId", "")
        zones = [zone for zone, found in self._moto.region(call.region).subnets.items() if subnet in found]
        if ware is None:
            return error(call, 400, "InvalidParameterValue", f"Invalid value '{kind}' for InstanceType.")
        if not zones:
            return None
        if zones[0][-1] not in ware.zones:
            said = f"Your requested instance type ({kind}) is not supported in your requested Availability Zone."
            return error(call, 400, "Unsupported", said)
        code = ware.quota[call.form.get("InstanceMarketOptions.MarketType") == "spot"]
        uses = {f"{call.region} {code}": float(ware.machine[0])}
        self.plane.take(token, type=kind, zone=zones[0], uses=uses)
        return None

    def _ec2_describe_instances(self, call: Call, environ: dict[str, Any]) -> Answer:
        """What is too young is missing in listings, and known by its id."""
        if any(name.startswith("InstanceId.") for name in call.form):
            return self._pass_on(call, environ)
        backend = self._moto.region(call.region)
        every = backend.reservations
        shown = {key: one for key, one in every.items() if all(self.plane.listed(i.born) for i in one.instances)}
        backend.reservations = type(every)(shown)
        try:
            return self._pass_on(call, environ)
        finally:
            backend.reservations = every

    def _ec2_describe_regions(self, call: Call, _: dict[str, Any]) -> Answer:
        return items(call, "regionInfo", [{"regionName": name} for name in _wares.REGIONS])

    def _ec2_describe_spot_price_history(self, call: Call, _: dict[str, Any]) -> Answer:
        """Two prices for each place, the older one of which counts no more."""
        found = [
            {
                "instanceType": name,
                "productDescription": "Linux/UNIX",
                "spotPrice": f"{_wares.spot(name, call.region, zone) * factor:.6f}",
                "timestamp": when,
                "availabilityZone": zone,
            }
            for name, zone in _wares.places(call.region)
            for when, factor in (("2026-11-02T00:00:00.000Z", 1), ("2026-11-01T00:00:00.000Z", 3))
        ]
        page, token = _page(found, call.form.get("NextToken"))
        return items(call, "spotPriceHistorySet", page, token)

    def _pricing_get_products(self, call: Call, _: dict[str, Any]) -> Answer:
        wanted = {one["Field"]: one["Value"] for one in call.json.get("Filters", ())}
        page, token = _page(_wares.price_list(wanted), call.json.get("NextToken"))
        return document({"FormatVersion": "aws_v1", "PriceList": page, **({"NextToken": token} if token else {})})

    def _servicequotas_list_service_quotas(self, call: Call, _: dict[str, Any]) -> Answer:
        limits = {code: self.plane.limit(f"{call.region} {code}") for code in _wares.QUOTAS}
        found = [{"QuotaCode": code, "Value": limit} for code, limit in limits.items() if limit is not None]
        return document({"Quotas": found})

    def _ssm_get_parameter(self, call: Call, _: dict[str, Any]) -> Answer:
        arch = "arm64" if "/arm64/" in call.json["Name"] else "x86_64"
        value = self._moto.image(call.region, UBUNTU, arch)
        return document({"Parameter": {"Name": call.json["Name"], "Type": "String", "Value": value}})

    def _sts_assume_role(self, call: Call, environ: dict[str, Any]) -> Answer:
        """The keys of the role are good from now on."""
        answer = self._pass_on(call, environ)
        key, secret = (
            re.search(rf"<{name}>([^<]+)<".encode(), answer.body) for name in ("AccessKeyId", "SecretAccessKey")
        )
        if key is not None and secret is not None:
            self._keys[key.group(1).decode()] = secret.group(1).decode()
        return answer


class _Quiet(WSGIRequestHandler):
    """Says nothing, and answers at once."""

    disable_nagle_algorithm = True

    def log(self, *_: object) -> None:
        """Nothing."""

    def connection_dropped(self, *_: object) -> None:
        """Hangs up, instead of waiting for the next request."""
        self.close_connection = True


def _page(entries: list[Any], token: str | None) -> tuple[list[Any], str | None]:
    start = int(token or 0)
    end = start + PAGE
    return entries[start:end], str(end) if end < len(entries) else None


def _put(instance: Any, state: str) -> None:
    instance._state.name, instance._state.code = state, _STATES[state]


def _server(region: str, instance: Any) -> Server:
    labels = {tag["key"]: tag["value"] for tag in instance.get_tags()}
    return Server(
        id=instance.id,
        name=labels.get("Name", ""),
        region=region,
        labels=labels,
        intent=_uuid(labels, "intent"),
        owner=_uuid(labels, "owner"),
        billed=instance.state != "terminated",
        born_with=instance.born_with,
    )


def _uuid(labels: Mapping[str, str], key: str) -> UUID | None:
    return UUID(labels[key]) if key in labels else None


__all__ = ["ACCOUNT", "DEEP_LEARNING", "KEY", "SECRET", "UBUNTU", "Ec2"]
