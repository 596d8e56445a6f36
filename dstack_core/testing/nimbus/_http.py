"""The way in: HTTP/1.1 with kept connections, one thread for each."""

from __future__ import annotations

import contextlib
import hmac
import json
import socket
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

from dstack_core.testing._clouds import Fault
from dstack_core.testing.nimbus._catalogue import REGIONS, TYPES
from dstack_core.testing.nimbus._cloud import Cloud, Refusal
from dstack_core.testing.nimbus._faults import ANSWERS, RETRY_AFTER, Faults

_LARGEST = 1 << 20


class Listener(ThreadingHTTPServer):
    """Listens on a port of this computer, until it is closed; then it closes what is still open."""

    daemon_threads = True
    block_on_close = False
    request_queue_size = 128

    def __init__(self, cloud: Cloud, faults: Faults, token: str, port: int) -> None:
        self.cloud = cloud
        self.faults = faults
        self.token = token
        self.calls = 0
        self.counting = threading.Lock()
        self._open: set[socket.socket] = set()
        super().__init__(("127.0.0.1", port), _Handler)

    def process_request(self, request: Any, client_address: Any) -> None:
        """Remembers the connection."""
        with self.counting:
            self._open.add(request)
        super().process_request(request, client_address)

    def shutdown_request(self, request: Any) -> None:
        """Forgets it."""
        with self.counting:
            self._open.discard(request)
        super().shutdown_request(request)

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A client that hung up is no error of the cloud's."""

    def close(self) -> None:
        """Stops listening, and hangs up."""
        self.shutdown()
        self.server_close()
        with self.counting:
            left = list(self._open)
        for connection in left:
            with contextlib.suppress(OSError):
                connection.shutdown(socket.SHUT_RDWR)


class _Handler(BaseHTTPRequestHandler):
    server: Listener
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True
    wbufsize = -1

    def do_GET(self) -> None:
        """Reads."""
        self._answer("GET")

    def do_POST(self) -> None:
        """Makes."""
        self._answer("POST")

    def do_PUT(self) -> None:
        """Changes."""
        self._answer("PUT")

    def do_DELETE(self) -> None:
        """Ends."""
        self._answer("DELETE")

    def log_message(self, format: str, *args: Any) -> None:
        """Nothing is printed."""

    def _answer(self, method: str) -> None:
        body = self.rfile.read(min(int(self.headers.get("Content-Length") or 0), _LARGEST))
        with self.server.counting:
            self.server.calls += 1
        faults = self.server.faults
        fault, after = faults.next(making=method == "POST", changing=method != "GET")
        if fault is not None and not after:
            self._fail(fault)
            if fault is not Fault.HANG:
                return
        answer = self._carry_out(method, body)
        if fault is not None and after:
            self._fail(fault)
            if fault is not Fault.HANG:
                return
        self._send(*answer)

    def _fail(self, fault: Fault) -> None:
        """Answers with the fault, or does not answer; one that hangs is answered in the end."""
        if fault is Fault.HANG:
            self.server.faults.wait()
        elif fault is Fault.DROP:
            self.close_connection = True
            with contextlib.suppress(OSError):
                self.connection.shutdown(socket.SHUT_RDWR)
        else:
            status, code, message = ANSWERS[fault]
            self._send(status, {"error": {"code": code, "message": message}})

    def _carry_out(self, method: str, body: bytes) -> tuple[int, dict[str, Any]]:
        try:
            self._authorize()
            return self._routed(method, body)
        except Refusal as refusal:
            return refusal.status, {"error": {"code": refusal.code, "message": str(refusal)}}

    def _authorize(self) -> None:
        given = (self.headers.get("Authorization") or "").removeprefix("Bearer ")
        if not hmac.compare_digest(given.encode(), self.server.token.encode()):
            raise Refusal(401, "unauthorized", ANSWERS[Fault.UNAUTHORIZED][2])

    def _routed(self, method: str, body: bytes) -> tuple[int, dict[str, Any]]:
        address = urlsplit(self.path)
        query = parse_qs(address.query)
        parts = [unquote(part) for part in address.path.strip("/").split("/")]
        answer = self._read(parts, query) if method == "GET" else self._change(method, parts, query, body)
        if answer is None:
            raise Refusal(404, "not_found", f"There is no {method} {address.path}")
        return answer

    def _read(self, parts: list[str], query: dict[str, list[str]]) -> tuple[int, dict[str, Any]] | None:
        match parts:
            case ["v1", "account"]:
                return 200, {"account": "nimbus-test", "permissions": ["servers:read", "servers:write"]}
            case ["v1", "regions"]:
                return 200, {"regions": [{"name": name, "zones": list(zones)} for name, zones in REGIONS.items()]}
            case ["v1", "types"]:
                return 200, {"types": [machine.described() for machine in TYPES.values()]}
            case ["v1", "servers"]:
                region, page = query.get("region", [""])[0], _number(query.get("page", ["1"])[0])
                return 200, self.server.cloud.page(region, query.get("label", []), page)
            case ["v1", "servers", server, *what] if what in ([], ["console"]):
                return 200, (self.server.cloud.console if what else self.server.cloud.get)(server)
        return None

    def _change(
        self, method: str, parts: list[str], query: dict[str, list[str]], body: bytes
    ) -> tuple[int, dict[str, Any]] | None:
        cloud = self.server.cloud
        match [method, *parts]:
            case ["POST", "v1", "servers"]:
                return 201, cloud.create(_parsed(body), self.headers.get("Idempotency-Key"))
            case ["PUT", "v1", "servers", server, "labels"]:
                return 200, cloud.label(server, _parsed(body))
            case ["DELETE", "v1", "servers", server]:
                return 202, cloud.delete(server, disks=query.get("delete_disks") == ["true"])
        return None

    def _send(self, status: int, answer: dict[str, Any]) -> None:
        content = json.dumps(answer).encode()
        with contextlib.suppress(OSError):
            self.send_response(status)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(content)))
            if status in (429, 503):
                self.send_header("Retry-After", str(RETRY_AFTER))
            self.end_headers()
            self.wfile.write(content)
            self.wfile.flush()


def _parsed(body: bytes) -> Any:
    try:
        return json.loads(body)
    except ValueError:
        raise Refusal(400, "invalid", "The body is not JSON") from None


def _number(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise Refusal(422, "invalid", f"'{text}' is no page; pages are counted from 1")
    return int(text)
