"""The cloud under test: the front that the SDK speaks to, and what a test may do to it."""

from __future__ import annotations

import json
import re
import threading
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import ExitStack
from typing import Any, Self
from urllib.parse import parse_qsl
from uuid import UUID, uuid4

from werkzeug.serving import WSGIRequestHandler, make_server

from dstack_core.plugin import Offer
from dstack_core.testing import Event, Failure, Fault, FaultPlane, Fleet, Server, Struck, Truth
from dstack_core.testing.nimbus._machines import Machines
from tests.support.azure import _wares
from tests.support.azure._machines import Computers
from tests.support.azure._resources import Resource, Store
from tests.support.azure._rules import check_machine, check_network, check_rules
from tests.support.azure._schema import check
from tests.support.azure._tls import trust
from tests.support.azure._wire import WORDS, Answer, Call, Refused, document, page, read, struck

TENANT, SUBSCRIPTION = "11111111-1111-4111-8111-111111111111", "22222222-2222-4222-8222-222222222222"
CLIENT, SECRET = "33333333-3333-4333-8333-333333333333", "not~a.secret/but+kept+like+one"
GROUP = "dstack"
_FAILURES = {
    **{fault: Failure(message) for fault, (_, _, message) in WORDS.items()},
    Fault.THROTTLE: Failure(WORDS[Fault.THROTTLE][2], retry_after=3),
    Fault.NO_CAPACITY: Failure(WORDS[Fault.NO_CAPACITY][2], scope="zone"),
    Fault.QUOTA: Failure(WORDS[Fault.QUOTA][2], scope="region"),
}
_COMPUTE, _NETWORK, _RESOURCES = "Microsoft.Compute", "Microsoft.Network", "Microsoft.Resources"
_IN_GROUP = r"/subscriptions/[^/]+/resourceGroups/(?P<group>[^/]+)"
_ONE = _IN_GROUP + r"/providers/(?P<space>[^/]+)/(?P<kind>[^/]+)/(?P<name>[^/]+)"
_VERBS = {"GET": "read", "PUT": "write", "DELETE": "delete"}
_LINKED = {
    "networkInterfaceConfigurations": (
        f"{_COMPUTE}/disks/write",
        f"{_NETWORK}/networkInterfaces/write",
        f"{_NETWORK}/networkInterfaces/join/action",
        f"{_NETWORK}/virtualNetworks/subnets/join/action",
    ),
    "publicIPAddressConfiguration": (
        f"{_NETWORK}/publicIPAddresses/write",
        f"{_NETWORK}/publicIPAddresses/join/action",
    ),
}
"""What else has to be allowed, by what the body of a machine has."""


class Azure:
    """Azure and what goes with it, on a port of this computer, over TLS. A context manager.

    Args:
        regions: those of the configuration.
        fleet: its machines are the instances; without it they only seem to run.

    Attributes:
        url: where it is.
        plane: what goes wrong, and what is scarce.
        seen: every permission that was needed so far, and how often.
        denied: permissions that whoever asks does not have.
        unregistered: providers that the subscription is not registered for.
        late: codes with which the next machines fail after they were accepted, one after the other.
        made: names of all machines that ever were.
        slow_networks: how often a new network is looked at before it is ready.
    """

    def __init__(self, regions: Sequence[str] = ("eastus", "westeurope"), *, fleet: Fleet | None = None) -> None:
        self.plane = FaultPlane(_FAILURES)
        self.seen: Counter[str] = Counter()
        self.denied: set[str] = set()
        self.unregistered: set[str] = set()
        self.url = ""
        self.slow_networks = 0
        self._regions = tuple(regions)
        self._machines = Machines(fleet) if fleet is not None else None
        self._store = Store(self.plane.now)
        self._computers = Computers(self._store, self.plane, self._machines)
        self.late = self._computers.late
        self.made = self._computers.made
        self._tokens: set[str] = set()
        self._said: list[Answer] = []
        self._operations: dict[str, str] = {}
        self._lock = threading.RLock()
        self._stack = ExitStack()

    def __enter__(self) -> Self:
        if self._machines is not None:
            self._stack.callback(self._machines.close)
        server = make_server(
            "127.0.0.1", 0, self._wsgi, threaded=True, request_handler=_Quiet, ssl_context=trust().server
        )
        server.daemon_threads = True  # type: ignore[attr-defined]  # of its mixin: a call that hangs holds up no test
        self.url = f"https://127.0.0.1:{server.server_port}"
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
        thread.start()
        self._stack.callback(thread.join, 60)
        self._stack.callback(server.server_close)
        self._stack.callback(server.shutdown)
        self._stack.callback(self.plane.heal)
        for name, limit in _wares.QUOTAS.items():
            for region in _wares.REGIONS:
                self.plane.quota(f"{region} {name}", limit)
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    # -- abilities ---------------------------------------------------------------------------------------------------

    def config(self) -> dict[str, Any]:
        """See `Cloud`."""
        return {
            "subscription_id": SUBSCRIPTION,
            "creds": {"type": "client", "tenant_id": TENANT, "client_id": CLIENT, "client_secret": SECRET},
            "regions": list(self._regions),
            "base_url": self.url,
            "authority": self.url,
            "prices_url": self.url,
            "ca_bundle": trust().bundle,
            "instance_discovery": False,
            "polling_interval": 0.05,
        }

    def truth(self) -> Truth:
        """See `Truthful`."""
        with self._lock:
            self._computers.tick()
            return Truth([_server(one) for one in self._computers.all()], list(self._computers.leftovers()))

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
            self._computers.boot = seconds

    def stock(self, count: int) -> None:
        """See `Stocked`."""
        with self._lock:
            for region in _wares.REGIONS:
                for number in range(count):
                    tags = {"Name": "by-hand"} if number % 2 else {"owner": str(uuid4()), "intent": str(uuid4())}
                    self._by_hand(region, {} if number % 3 == 2 else tags)

    def befall(self, server: str, event: Event) -> None:
        """See `Eventful`."""
        with self._lock:
            self._computers.befall(server, event)

    def unmark(self, server: str) -> None:
        """See `Unmarking`."""
        with self._lock:
            self._computers.one(server).body["tags"] = {}

    def server(self, name: str) -> Any:
        """The description of a machine, with what is not shown to anybody."""
        with self._lock:
            return self._computers.one(name).body

    def resource(self, kind: str, name: str) -> Any:
        """The description of anything, by its kind and name; `None` if it is not there."""
        with self._lock:
            return next((one.body for one in self._store.of(kind) if one.name == name), None)

    def say(self, status: int, code: str, words: str, **headers: str) -> None:
        """What the next call of the SDK is answered, whatever it asks for; without a code there is no body."""
        refused = Refused(status, code, words).answer(**headers)
        self._said.append(refused if code else Answer(status, b"", refused.headers))

    def leave_parts(self, tags: Mapping[str, str], region: str, group: str = GROUP) -> None:
        """A creation stopped half way: an interface with its address and disk, and no machine."""
        with self._lock:
            self._group(group)
            self._computers.leave_parts(group, region, dict(tags))

    # -- answering ---------------------------------------------------------------------------------------------------

    def _wsgi(self, environ: dict[str, Any], start_response: Callable[..., object]) -> Iterable[bytes]:
        body = environ["wsgi.input"].read(int(environ.get("CONTENT_LENGTH") or 0))
        answer = self._answer(read(environ, body))
        headers = [("Content-Type", answer.type), ("Content-Length", str(len(answer.body))), *answer.headers.items()]
        start_response(f"{answer.status} -", headers)
        return [answer.body]

    def _answer(self, call: Call) -> Answer:
        try:
            for pattern, login in _LOGINS:
                if re.fullmatch(pattern, call.path):
                    return login(self, call)
            name, match = _route(call)
            handler = getattr(self, name)
            making = name == "_put_machine"
            what = f"{name[1:]}"
            return self.plane.carry_out(
                what,
                lambda: self._allowed(call, handler, match.groupdict()),
                making=making,
                changing=making or name == "_delete_machine",
            )
        except Refused as refused:
            return refused.answer()
        except Struck as fault:
            if fault.fault is Fault.DROP:
                raise ConnectionAbortedError("by order") from None
            return struck(fault)

    def _allowed(self, call: Call, handler: Callable[..., Answer], parts: dict[str, str]) -> Answer:
        """Only who brings a token, and may, and names a version."""
        with self._lock:
            self._computers.tick()
            if call.path.startswith("/subscriptions/"):
                if call.headers.get("authorization", "").removeprefix("Bearer ") not in self._tokens:
                    raise Refused(*WORDS[Fault.UNAUTHORIZED])
                if not call.path.startswith(f"/subscriptions/{SUBSCRIPTION}"):
                    raise Refused(404, "SubscriptionNotFound", "The subscription could not be found.")
                if not re.fullmatch(r"\d{4}-\d\d-\d\d(-preview)?", call.query.get("api-version", "")):
                    raise Refused(400, "MissingApiVersionParameter", "The api-version query parameter is required.")
                if self._said:
                    return self._said.pop(0)
            try:
                return handler(call, **parts)
            except Struck as fault:
                return struck(fault)

    def _need(self, *actions: str) -> None:
        """Whoever asks may do all of this.

        Raises:
            Refused: or not.
        """
        self.seen.update(actions)
        for action in actions:
            if action in self.denied and action is actions[0]:
                raise Refused(
                    403,
                    "AuthorizationFailed",
                    f"The client 'dstack' with object id 'x' does not have authorization to perform action '{action}' "
                    f"over scope '/subscriptions/{SUBSCRIPTION}' or the scope is invalid.",
                )
            if action in self.denied:
                raise Refused(
                    403,
                    "LinkedAuthorizationFailed",
                    f"The client 'dstack' has permission to perform action '{actions[0]}' on scope 'x'; however, it "
                    f"does not have permission to perform action(s) '{action}' on the linked scope(s) 'y'.",
                )

    # -- logging in --------------------------------------------------------------------------------------------------

    def _discover(self, call: Call) -> Answer:
        base = f"{self.url}/{call.path.split('/')[1]}"
        return document(
            {
                "issuer": f"{base}/v2.0",
                "authorization_endpoint": f"{base}/oauth2/v2.0/authorize",
                "token_endpoint": f"{base}/oauth2/v2.0/token",
                "jwks_uri": f"{base}/discovery/v2.0/keys",
            }
        )

    def _token(self, call: Call) -> Answer:
        form = dict(parse_qsl(call.body.decode()))
        good = (CLIENT, SECRET, f"{self.url}/.default", "client_credentials")
        if tuple(form.get(name) for name in ("client_id", "client_secret", "scope", "grant_type")) != good:
            words = "AADSTS7000215: Invalid client secret provided. Trace ID: 1 Correlation ID: 2 Timestamp: 3"
            return document({"error": "invalid_client", "error_description": words, "error_codes": [7000215]}, 401)
        token = uuid4().hex
        with self._lock:
            self._tokens.add(token)
        return document({"token_type": "Bearer", "expires_in": 3599, "access_token": token})

    # -- what is sold ------------------------------------------------------------------------------------------------

    def _get_skus(self, call: Call) -> Answer:
        self._need(f"{_COMPUTE}/skus/read")
        wanted = re.fullmatch(r"location eq '(\w+)'", call.query.get("$filter", ""))
        regions = [one for one in _wares.REGIONS if wanted is None or one == wanted.group(1)]
        return page(call, self.url, [sku for region in regions for sku in _wares.skus(region)])

    def _get_usages(self, call: Call, region: str) -> Answer:
        self._need(f"{_COMPUTE}/locations/usages/read")
        limits = {name: self.plane.limit(f"{region} {name}") for name in _wares.QUOTAS}
        found = [
            {"unit": "Count", "currentValue": 0, "limit": int(limit), "name": {"value": name, "localizedValue": name}}
            for name, limit in limits.items()
            if limit is not None
        ]
        return page(call, self.url, found)

    def _get_prices(self, call: Call) -> Answer:
        wanted = dict(re.findall(r"(\w+) eq '([^']*)'", call.query.get("$filter", "")))
        kind = wanted.pop("priceType", None)
        found = [
            entry
            for entry in _wares.price_list()
            if (kind is None or entry["type"] == kind) and all(entry.get(name) == want for name, want in wanted.items())
        ]
        return page(call, self.url, found, following="NextPageLink", items="Items")

    # -- the subscription --------------------------------------------------------------------------------------------

    def _get_permissions(self, call: Call) -> Answer:
        self._need("Microsoft.Authorization/permissions/read")
        return document({"value": [{"actions": ["*"], "notActions": sorted(self.denied)}]})

    def _get_provider(self, _: Call, space: str) -> Answer:
        self._need(f"{_RESOURCES}/subscriptions/providers/read")
        state = "NotRegistered" if space in self.unregistered else "Registered"
        return document({"id": space, "namespace": space, "registrationState": state})

    def _get_group(self, _: Call, group: str) -> Answer:
        self._need(f"{_RESOURCES}/subscriptions/resourceGroups/read")
        return document(self._in(group).body)

    def _put_group(self, call: Call, group: str) -> Answer:
        self._need(f"{_RESOURCES}/subscriptions/resourceGroups/write")
        body = call.document()
        known = self._store.find(_group_id(group))
        if known is not None and known.body["location"] != body["location"]:
            raise Refused(
                409, "InvalidResourceGroupLocation", f"The resource group already exists in {known.body['location']}."
            )
        made = self._group(group, body)
        return document(made.body, 201 if known is None else 200)

    def _group(self, group: str, body: Mapping[str, Any] | None = None) -> Resource:
        known = self._store.find(_group_id(group))
        return known or self._store.put(_group_id(group), {"location": "eastus", **(body or {})}, "Succeeded")

    def _in(self, group: str) -> Resource:
        found = self._store.find(_group_id(group))
        if found is None:
            raise Refused(404, "ResourceGroupNotFound", f"Resource group '{group}' could not be found.")
        return found

    def _get_resources(self, call: Call, group: str | None = None) -> Answer:
        inner = "subscriptions/resources" if group is None else "subscriptions/resourceGroups/resources"
        self._need(f"{_RESOURCES}/{inner}/read")
        if group is not None:
            self._in(group)
        wanted = re.fullmatch(r"tagName eq '([^']*)' and tagValue eq '([^']*)'", call.query.get("$filter", ""))
        if "$filter" in call.query and wanted is None:
            raise Refused(400, "InvalidFilterInQueryString", "Invalid $filter.")
        found = [
            one.listed()
            for one in self._store.all()
            if one.kind not in ("resourceGroups", "deployments")
            and self.plane.listed(one.born)
            and (group is None or one.group.lower() == group.lower())
            and (wanted is None or (one.body.get("tags") or {}).get(wanted.group(1)) == wanted.group(2))
        ]
        return page(call, self.url, found)

    # -- networks ----------------------------------------------------------------------------------------------------

    def _get_one(self, call: Call, group: str, space: str, kind: str, name: str) -> Answer:
        more = [f"{_NETWORK}/publicIPAddresses/read"] if "publicIPAddress" in call.query.get("$expand", "") else []
        self._need(f"{space}/{kind}/read", *more)
        one = self._one(call, group, name)
        if kind == "virtualNetworks":
            self._make_ready(one)
        return document(self._expanded(one) if more else one.body)

    def _make_ready(self, vnet: Resource) -> None:
        """A network is ready after it was looked at some times."""
        vnet.looks -= 1
        if vnet.looks < 0:
            vnet.body["properties"]["provisioningState"] = "Succeeded"

    def _expanded(self, card: Resource) -> dict[str, Any]:
        """An interface with its address in it."""
        body: dict[str, Any] = json.loads(json.dumps(card.body))
        for entry in body["properties"]["ipConfigurations"]:
            public = entry["properties"].get("publicIPAddress")
            found = self._store.find(public["id"]) if public else None
            if found is not None:
                entry["properties"]["publicIPAddress"] = found.body
        return body

    def _one(self, call: Call, group: str, name: str) -> Resource:
        self._in(group)
        found = self._store.find(call.path)
        if found is None:
            code = "DeploymentNotFound" if "/deployments/" in call.path else "ResourceNotFound"
            raise Refused(404, code, f"The Resource '{name}' under resource group '{group}' was not found.")
        return found

    def _put_network(self, call: Call, group: str, space: str, kind: str, name: str) -> Answer:
        from azure.mgmt.network import types

        body = call.document()
        linked = [f"{_NETWORK}/networkSecurityGroups/join/action"] if "networkSecurityGroup" in str(body) else []
        self._need(f"{space}/{kind}/write", *linked)
        self._in(group)
        known = self._store.find(call.path)
        if kind == "virtualNetworks":
            check(types.VirtualNetwork, body)
            check_network(name, body, self._body)
        else:
            check(types.NetworkSecurityGroup, body)
            check_rules(name, body, self._body)
        made = self._store.put(call.path, body, "Updating" if self.slow_networks else "Succeeded")
        made.looks = self.slow_networks
        for subnet in body["properties"].get("subnets") or ():
            subnet["id"] = f"{made.id}/subnets/{subnet['name']}"
        return document(made.body, 201 if known is None else 200, **self._operation(body["location"], "Succeeded"))

    def _body(self, id: str) -> dict[str, Any] | None:
        found = self._store.find(id)
        return found.body if found else None

    def _delete_one(self, call: Call, group: str, space: str, kind: str, name: str) -> Answer:
        self._need(f"{space}/{kind}/delete")
        self._in(group)
        found = self._store.find(call.path)
        if found is None:
            return Answer(204)
        self._computers.check_free(found)
        self._store.drop(found)
        return Answer(202, b"", self._operation_headers(found.body["location"], "Succeeded"))

    # -- long-running ------------------------------------------------------------------------------------------------

    def _operation(self, region: str, status: str) -> dict[str, str]:
        key = uuid4().hex
        self._operations[key] = status
        path = f"/subscriptions/{SUBSCRIPTION}/providers/{_COMPUTE}/locations/{region}/operations/{key}"
        return {"Azure_AsyncOperation": f"{self.url}{path}?api-version=2024-07-01", "Retry_After": "1"}

    def _operation_headers(self, region: str, status: str) -> dict[str, str]:
        return {name.replace("_", "-"): value for name, value in self._operation(region, status).items()}

    def _get_operation(self, _: Call, region: str, key: str) -> Answer:
        self._need(f"{_COMPUTE}/locations/operations/read")
        status = self._operations.get(key)
        if status is None:
            raise Refused(404, "NotFound", f"There is no operation {key} in {region}.")
        failed = {"error": {"code": status, "message": f"{status}: by order"}}
        good = status in ("Succeeded", "InProgress")
        return document({"name": key, "status": status if good else "Failed", **({} if good else failed)})

    # -- records -----------------------------------------------------------------------------------------------------

    def _put_deployment(self, call: Call, group: str, space: str, kind: str, name: str) -> Answer:
        self._need(f"{space}/{kind}/write")
        self._in(group)
        body = call.document()
        template = body["properties"]["template"]
        if not re.fullmatch(r"[\w().-]{1,64}", name) or body["properties"]["mode"] not in ("Incremental", "Complete"):
            raise Refused(400, "InvalidDeployment", f"The deployment {name} is invalid.")
        if template["resources"] or "$schema" not in template or "contentVersion" not in template:
            raise Refused(400, "InvalidTemplate", "Deployment template validation failed.")
        known = self._store.find(call.path)
        made = self._store.put(call.path, body, "Succeeded")
        return document(made.body, 201 if known is None else 200, **self._operation("eastus", "Succeeded"))

    # -- machines ----------------------------------------------------------------------------------------------------

    def _put_machine(self, call: Call, group: str, space: str, kind: str, name: str) -> Answer:
        from azure.mgmt.compute import types

        body = call.document()
        text = call.body.decode()
        linked = [action for word, actions in _LINKED.items() if f'"{word}"' in text for action in actions]
        self._need(f"{space}/{kind}/write", *linked)
        self._in(group)
        known = self._store.find(call.path)
        if known is not None:
            if call.headers.get("if-none-match") == "*":
                raise Refused(412, "PreconditionFailed", "The precondition given in the request headers was not met.")
            raise Refused(409, "PropertyChangeNotAllowed", "This Azure changes no machines.")
        check(types.VirtualMachine, body)
        check_machine(name, body, self._body)
        made = self._computers.make(call.path, body)
        return document(made.shown(), 201, **self._operation(body["location"], made.late or "InProgress"))

    def _get_machine(self, call: Call, group: str, space: str, kind: str, name: str) -> Answer:
        self._need(f"{space}/{kind}/read")
        return document(self._one(call, group, name).shown(view=call.query.get("$expand") == "instanceView"))

    def _delete_machine(self, call: Call, group: str, space: str, kind: str, name: str) -> Answer:
        self._need(f"{space}/{kind}/delete")
        self._in(group)
        found = self._store.find(call.path)
        if found is None:
            return Answer(204)
        self._computers.end(found)
        return Answer(202, b"", self._operation_headers(found.body["location"], "Succeeded"))

    def _get_machines(self, call: Call) -> Answer:
        self._need(f"{_COMPUTE}/virtualMachines/read")
        view = call.query.get("statusOnly") == "true"
        found = [one.shown(view=view) for one in self._computers.all() if self.plane.listed(one.born)]
        return page(call, self.url, found)

    def _post_console(self, call: Call, group: str, space: str, kind: str, name: str) -> Answer:
        self._need(f"{space}/{kind}/retrieveBootDiagnosticsData/action")
        path = call.path.rpartition("/")[0]
        if self._store.find(path) is None:
            raise Refused(404, "ResourceNotFound", f"The Resource '{name}' under '{group}' was not found.")
        return document({"serialConsoleLogBlobUri": f"{self.url}/console/{name}?sig=a-key"})

    def _get_console(self, call: Call, name: str) -> Answer:
        if call.query.get("sig") != "a-key":
            raise Refused(403, "AuthenticationFailed", "Server failed to authenticate the request.")
        said = self._machines.console(name) if self._machines is not None else f"{name} login: "
        return Answer(200, said.encode(), {}, "text/plain")

    def _by_hand(self, region: str, tags: dict[str, str]) -> None:
        self._group("others")
        path = f"{_group_id('others')}/providers/{_COMPUTE}/virtualMachines/vm-{uuid4().hex[:12]}"
        body = {"location": region, "tags": tags, "properties": {"hardwareProfile": {"vmSize": "Standard_B1s"}}}
        self._computers.make(path, body)


_LOGINS: tuple[tuple[str, Callable[[Azure, Call], Answer]], ...] = (
    (rf"/{TENANT}/v2\.0/\.well-known/openid-configuration", Azure._discover),
    (rf"/{TENANT}/oauth2/v2\.0/token", Azure._token),
)
_ROUTES = (
    ("GET", r"/api/retail/prices", "_get_prices"),
    ("GET", r"/console/(?P<name>[^/]+)", "_get_console"),
    ("GET", rf"/subscriptions/[^/]+/providers/{_COMPUTE}/skus", "_get_skus"),
    ("GET", rf"/subscriptions/[^/]+/providers/{_COMPUTE}/virtualMachines", "_get_machines"),
    ("GET", rf"/subscriptions/[^/]+/providers/{_COMPUTE}/locations/(?P<region>\w+)/usages", "_get_usages"),
    (
        "GET",
        rf"/subscriptions/[^/]+/providers/{_COMPUTE}/locations/(?P<region>\w+)/operations/(?P<key>\w+)",
        "_get_operation",
    ),
    ("GET", r"/subscriptions/[^/]+/providers/Microsoft\.Authorization/permissions", "_get_permissions"),
    ("GET", r"/subscriptions/[^/]+/providers/(?P<space>[^/]+)", "_get_provider"),
    ("GET", r"/subscriptions/[^/]+/resources", "_get_resources"),
    ("GET", _IN_GROUP + "/resources", "_get_resources"),
    ("GET", _IN_GROUP, "_get_group"),
    ("PUT", _IN_GROUP, "_put_group"),
    ("PUT", _ONE.replace("[^/]+)/(?P<name>", "virtualMachines)/(?P<name>"), "_put_machine"),
    ("GET", _ONE.replace("[^/]+)/(?P<name>", "virtualMachines)/(?P<name>"), "_get_machine"),
    ("DELETE", _ONE.replace("[^/]+)/(?P<name>", "virtualMachines)/(?P<name>"), "_delete_machine"),
    (
        "POST",
        _ONE.replace("[^/]+)/(?P<name>", "virtualMachines)/(?P<name>") + "/retrieveBootDiagnosticsData",
        "_post_console",
    ),
    ("PUT", _ONE.replace("[^/]+)/(?P<name>", "deployments)/(?P<name>"), "_put_deployment"),
    (
        "PUT",
        _ONE.replace("[^/]+)/(?P<name>", "virtualNetworks|networkSecurityGroups)/(?P<name>"),
        "_put_network",
    ),
    ("GET", _ONE, "_get_one"),
    ("DELETE", _ONE, "_delete_one"),
)
"""The first that matches counts."""


def _route(call: Call) -> tuple[str, re.Match[str]]:
    for method, pattern, name in _ROUTES:
        match = re.fullmatch(pattern, call.path, re.IGNORECASE) if method == call.method else None
        if match is not None:
            return name, match
    raise Refused(404, "NotFound", f"This Azure knows no {call.method} {call.path}.")


class _Quiet(WSGIRequestHandler):
    """Says nothing, and answers at once."""

    disable_nagle_algorithm = True

    def log(self, *_: object) -> None:
        """Nothing."""

    def connection_dropped(self, *_: object) -> None:
        """Hangs up, instead of waiting for the next request."""
        self.close_connection = True


def _group_id(group: str) -> str:
    return f"/subscriptions/{SUBSCRIPTION}/resourceGroups/{group}"


def _server(machine: Resource) -> Server:
    tags = dict(machine.body.get("tags") or {})
    return Server(
        id=machine.name,
        name=machine.name,
        region=machine.body["location"],
        labels=tags,
        intent=UUID(tags["intent"]) if "intent" in tags else None,
        owner=UUID(tags["owner"]) if "owner" in tags else None,
        billed=True,
        born_with=machine.born_with,
    )


__all__ = ["CLIENT", "GROUP", "SECRET", "SUBSCRIPTION", "TENANT", "Azure"]
