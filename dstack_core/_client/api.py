"""The low-level client: one method per route of the HTTP API (`_models/wire.py`), with its retries and its errors."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar, cast

from dstack_core._client.connection import ANSWER_TIMEOUT, CONNECT_TIMEOUT, Connection, Failures, RemoteConnection
from dstack_core.errors import ClientError, DstackError, ServerClientError, ServerUnavailableError

if TYPE_CHECKING:
    from uuid import UUID

    import httpx
    from pydantic import BaseModel, TypeAdapter

    from dstack_core._models.repos import AnyRunRepoData
    from dstack_core._models.runs import Run, RunPlan, RunSpec
    from dstack_core._models.wire import (
        BackendStatus,
        DoctorReport,
        FixReport,
        InstanceId,
        JobMetrics,
        LogQuery,
        RepoCredentials,
        RepoInfo,
        ServerInfo,
    )

M = TypeVar("M", bound="BaseModel")

LONGEST_WAIT = 30.0
"""Seconds that one long-poll takes at most."""
_ASKING_ALL = 180.0
"""Seconds for a server that asks every cloud."""


class BrokenStreamError(Exception):
    """The connection ended in the middle of an answer that can be asked for again from there."""


class LogAnswer(NamedTuple):
    """A piece of a run's output: where it starts, whether all has been said, and the bytes as they come."""

    offset: int
    end: bool
    chunks: Iterator[bytes]


class APIClient:
    """Speaks to one server. `Client` is what most programs want; this is what it is made of.

    Every request is safe to repeat, and is repeated when the connection fails.

    Args:
        base_url: the server's address, as `http://127.0.0.1:3000`, or a connection to it.
        token: the token that the server printed when it first started.
    """

    def __init__(self, base_url: str | Connection, token: str | None = None) -> None:
        self._connection = RemoteConnection(base_url, token) if isinstance(base_url, str) else base_url

    def __repr__(self) -> str:
        return f"<APIClient: {self._connection.label.removeprefix('The ')}>"

    @property
    def on_this_computer(self) -> bool:
        """Whether the server runs on this computer."""
        return self._connection.on_this_computer

    def services_url(self) -> str | None:
        """Where the server publishes services, as `http://127.0.0.1:3000`; `None` if it does not (yet)."""
        return self._connection.services_url or self.get_server_info().services_url

    def close(self) -> None:
        """Closes the open connections. The next request opens new ones."""
        self._connection.close()

    # -- server and backends -----------------------------------------------------------------------------------------

    def get_server_info(self) -> ServerInfo:
        """Who answers."""
        from dstack_core._models.wire import ServerInfo

        return ServerInfo.model_validate_json(self._request("GET", "/api/server/info"))

    def list_backends(self, project: str, *, check: bool = False) -> list[BackendStatus]:
        """All backends that are installed or configured; `check` also has each look whether it can work."""
        from dstack_core._models.wire import BackendStatus

        path = f"/api/project/{_quoted(project)}/backends/list"
        return _read_list(BackendStatus, self._request("GET", path, {"check": "1"} if check else {}))

    def examine(self, project: str) -> DoctorReport:
        """What there is in the clouds, and what is wrong with it."""
        from dstack_core._models.wire import DoctorReport

        # Every cloud is asked, so this may take a while.
        answer = self._send("GET", _path(project, "doctor"), wait=_ASKING_ALL)
        return DoctorReport.model_validate_json(answer.content)

    def fix(self, project: str, instances: Sequence[InstanceId]) -> FixReport:
        """Ends those of these instances that should not be there."""
        from dstack_core._models.wire import FixReport, FixRequest

        body = FixRequest(instances=tuple(instances)).model_dump_json()
        answer = self._send("POST", _path(project, "doctor/fix"), content=body, wait=_ASKING_ALL)
        return FixReport.model_validate_json(answer.content)

    def confirm_restore(self, project: str) -> None:
        """Says that the server's database may forget what it lost when it was restored."""
        self._request("POST", _path(project, "doctor/confirm_restore"))

    # -- runs --------------------------------------------------------------------------------------------------------

    def get_plan(self, project: str, spec: RunSpec) -> RunPlan:
        """What would happen if the run were submitted now."""
        from dstack_core._models.runs import RunPlan
        from dstack_core._models.wire import GetPlanRequest

        return RunPlan.model_validate_json(self._post(project, "get_plan", GetPlanRequest(run_spec=spec)))

    def submit(self, project: str, spec: RunSpec, submit_key: UUID) -> Run:
        """Submits a run. The same key again is the same run.

        Raises:
            ServerUnavailableError: no server answered; the message says whether the run may exist.
        """
        from dstack_core._models.runs import Run
        from dstack_core._models.wire import SubmitRequest

        request = SubmitRequest(run_spec=spec, submit_key=submit_key)
        failures = Failures()
        try:
            return Run.model_validate_json(self._post(project, "submit", request, failures=failures))
        except ServerClientError:
            raise
        except ServerUnavailableError as error:
            raise ServerUnavailableError(f"{error}\n{_outcome(spec.run_name, maybe=failures.sent)}") from error
        except DstackError as error:
            error.add_note(_outcome(spec.run_name, maybe=failures.sent))
            raise

    def get_run(
        self,
        project: str,
        run_name: str | None = None,
        *,
        run_id: UUID | None = None,
        after_version: int | None = None,
        wait: float = 0.0,
    ) -> Run:
        """One run; with `after_version`, as soon as it is newer than that, or after `wait` seconds."""
        from dstack_core._models.runs import Run
        from dstack_core._models.wire import GetRunRequest

        request = GetRunRequest(run_name=run_name, run_id=run_id, after_version=after_version, wait=wait)
        return Run.model_validate_json(self._post(project, "get", request, wait=wait))

    def list_runs(self, project: str, *, all: bool = False, limit: int = 1000) -> list[Run]:
        """The runs of the project, newest first: the active ones, or else the latest finished one; or all."""
        from dstack_core._models.runs import Run
        from dstack_core._models.wire import ListRunsRequest

        return _read_list(Run, self._post(project, "list", ListRunsRequest(all=all, limit=limit)))

    def stop_runs(
        self, project: str, names: Sequence[str] = (), *, ids: Sequence[UUID] = (), abort: bool = False
    ) -> None:
        """Stops runs: politely, or with `abort` at once."""
        from dstack_core._models.wire import StopRunsRequest

        self._post(project, "stop", StopRunsRequest(runs_names=tuple(names), run_ids=tuple(ids), abort=abort))

    def delete_runs(self, project: str, names: Sequence[str]) -> None:
        """Deletes finished runs and their output."""
        from dstack_core._models.wire import DeleteRunsRequest

        self._post(project, "delete", DeleteRunsRequest(runs_names=tuple(names)))

    def get_metrics(self, project: str, run_id: UUID) -> JobMetrics:
        """What the run's job uses now."""
        from dstack_core._models.wire import JobMetrics

        return JobMetrics.model_validate_json(
            self._request("GET", f"/api/project/{_quoted(project)}/runs/{run_id}/metrics")
        )

    def note_activity(self, project: str, run_id: UUID) -> None:
        """Somebody is at work with the run, so a dev environment is not idle."""
        self._request("POST", f"/api/project/{_quoted(project)}/runs/{run_id}/activity")

    @contextlib.contextmanager
    def open_logs(self, project: str, run_id: UUID, query: LogQuery) -> Iterator[LogAnswer]:
        """A piece of the run's output, which ends at any time: ask again from there.

        Raises:
            BrokenStreamError: the connection ended in the middle.
        """
        from dstack_core._models.wire import END_HEADER, OFFSET_HEADER

        path = f"/api/project/{_quoted(project)}/runs/{run_id}/logs"
        params = query.model_dump(mode="json", exclude_defaults=True)
        answer = self._send("GET", path, params, stream=True)
        try:
            end = answer.headers.get(END_HEADER) == "1"
            yield LogAnswer(int(answer.headers.get(OFFSET_HEADER, query.offset)), end, _chunks(answer))
        finally:
            answer.close()

    # -- repos and code ----------------------------------------------------------------------------------------------

    def init_repo(
        self, project: str, repo_id: str, repo_data: AnyRunRepoData, credentials: RepoCredentials | None = None
    ) -> None:
        """Makes a repo known. Credentials without a secret do not replace those that the server has."""
        from dstack_core._models.wire import InitRepoRequest

        request = InitRepoRequest(repo_id=repo_id, repo_data=repo_data, credentials=credentials)
        self._send("POST", _path(project, "repos/init"), content=request.model_dump_json())

    def get_repo(self, project: str, repo_id: str) -> RepoInfo:
        """A repo as the server knows it.

        Raises:
            NotFoundError: it was never initialised.
        """
        from dstack_core._models.wire import GetRepoRequest, RepoInfo

        request = GetRepoRequest(repo_id=repo_id)
        return RepoInfo.model_validate_json(
            self._send("POST", _path(project, "repos/get"), content=request.model_dump_json()).content
        )

    def check_code(self, project: str, manifest_hash: str) -> None:
        """Raises `NotFoundError` unless the server has this code, with all that belongs to it."""
        self._request("GET", _path(project, f"code/manifests/{manifest_hash}"))

    def missing_chunks(self, project: str, hashes: Sequence[str]) -> Sequence[str]:
        """Which of these chunks the server does not have."""
        from dstack_core._models.wire import MissingChunks, MissingChunksRequest

        request = MissingChunksRequest(hashes=tuple(hashes))
        answer = self._send("POST", _path(project, "code/missing"), content=request.model_dump_json())
        return MissingChunks.model_validate_json(answer.content).hashes

    def put_chunks(self, project: str, body: Callable[[], Iterator[bytes]], failures: Failures) -> None:
        """Sends chunks of code.

        Args:
            project: the project.
            body: called for each try; what to send then (see `_models.wire.CHUNK_HEAD`).
            failures: counts the tries that failed.
        """
        self._send("PUT", _path(project, "code/chunks"), content=body, failures=failures)

    def put_code_manifest(self, project: str, manifest_hash: str, body: bytes) -> None:
        """Sends a manifest, whose chunks the server has."""
        self._send("PUT", _path(project, f"code/manifests/{manifest_hash}"), content=body)

    # -- requests ----------------------------------------------------------------------------------------------------

    def _post(
        self, project: str, action: str, body: BaseModel, wait: float = 0.0, failures: Failures | None = None
    ) -> bytes:
        path = f"/api/project/{_quoted(project)}/runs/{action}"
        return self._send("POST", path, content=body.model_dump_json(), wait=wait, failures=failures).content

    def _request(self, method: str, path: str, params: dict[str, Any] | None = None) -> bytes:
        return self._send(method, path, params).content

    def _send(
        self,
        method: str,
        path: str,
        params: dict[str, Any] | None = None,
        *,
        content: str | bytes | Callable[[], Iterator[bytes]] | None = None,
        wait: float = 0.0,
        stream: bool = False,
        failures: Failures | None = None,
    ) -> httpx.Response:
        """Sends a request until it is answered, and returns an answer that is no refusal."""
        import httpx

        failures = failures or Failures()
        timeout = httpx.Timeout(ANSWER_TIMEOUT + wait, connect=CONNECT_TIMEOUT)
        while True:
            sent = False
            try:
                self._connection.prepare()
                sent = True
                http = self._connection.http()
                body = content() if callable(content) else content
                request = http.build_request(method, path, params=params, content=body, timeout=timeout)
                return self._accepted(http.send(request, stream=stream))
            except httpx.TransportError as error:
                failures.add(error, sent=sent)
                self._connection.recover(error, failures)

    def _accepted(self, answer: httpx.Response) -> httpx.Response:
        if answer.status_code == 200:
            return answer
        try:
            answer.read()
        finally:
            answer.close()
        raise _refusal(answer, self._connection.label)


def _chunks(answer: httpx.Response) -> Iterator[bytes]:
    import httpx

    try:
        yield from answer.iter_raw()
    except httpx.TransportError as error:
        raise BrokenStreamError from error


def _read_list(model: type[M], body: bytes) -> list[M]:
    return cast("list[M]", _list_of(model).validate_json(body))


@functools.cache
def _list_of(model: type[BaseModel]) -> TypeAdapter[Any]:
    # Making one takes longer than a whole request.
    from pydantic import TypeAdapter

    return TypeAdapter(list[model])  # type: ignore[valid-type]  # a type made at run time


def _path(project: str, rest: str) -> str:
    return f"/api/project/{_quoted(project)}/{rest}"


def _quoted(name: str) -> str:
    from urllib.parse import quote

    return quote(name, safe="")


def _outcome(name: str | None, *, maybe: bool) -> str:
    if maybe:
        which = f"the run '{name}'" if name else "the run"
        return f"It is not known whether {which} was submitted: `dstack ps` shows it, once the server answers."
    return "The run was not submitted."


# -------------------------------------------------------------------------------------------------------------- errors


def _refusal(answer: httpx.Response, label: str) -> ClientError:
    """The error that a refusal stands for."""
    details = _details(answer)
    message = "\n".join(str(detail.get("msg", "")) for detail in details).strip()
    if answer.status_code >= 500 or not message:
        return _unexpected(answer, label, message)
    code = str(details[0].get("code", ""))
    return _classes().get(code, ServerClientError)(message)


def _details(answer: httpx.Response) -> list[dict[str, Any]]:
    try:
        details = answer.json()["detail"]
    except (ValueError, KeyError, TypeError):
        return []
    return [detail for detail in details if isinstance(detail, dict)] if isinstance(details, list) else []


def _unexpected(answer: httpx.Response, label: str, message: str) -> ClientError:
    if message:
        return ClientError(message)
    status = f"{answer.status_code} {answer.reason_phrase}".strip()
    if answer.status_code in {502, 503, 504}:
        return ServerUnavailableError(f"{label} cannot be reached: something in between answers '{status}'.")
    return ClientError(f"{label} answers '{status}', which a dstack server does not say. Check its url.")


def _classes() -> dict[str, type[ServerClientError]]:
    kinds: list[type[ServerClientError]] = [ServerClientError, *ServerClientError.__subclasses__()]
    return {kind.code: kind for kind in kinds}
