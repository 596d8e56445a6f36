"""A run, as the program that submitted it (or found it) holds it."""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import datetime
from typing import TYPE_CHECKING, Self

from dstack_core._client.api import LONGEST_WAIT, APIClient
from dstack_core.errors import AttachError

if TYPE_CHECKING:
    from os import PathLike
    from uuid import UUID

    from dstack_core._client.attachment import Attachment
    from dstack_core._client.ports import PortReservation
    from dstack_core._client.presence import Presence
    from dstack_core._client.ssh.login import Login
    from dstack_core._models.runs import Job, JobProvisioningData, JobSubmission, Reason, RunStatus
    from dstack_core._models.runs import Run as RunModel

_LOOK_AGAIN = 1.0
"""Seconds after which readiness is asked for again: that a replica answers once more is no new version of the run."""


@dataclass(frozen=True, slots=True)
class ServiceModel:
    """A model that a service offers in OpenAI's protocol.

    Attributes:
        name: what to pass as `model`.
        url: what to pass as `base_url` to a client of that protocol.
    """

    name: str
    url: str


class Run:
    """A run of the project.

    What the properties say is as of the last `refresh()`, or of the last `attach()`, which looks as well.
    As a context manager it detaches at the end of the block; the run itself goes on.
    """

    def __init__(
        self, api_client: APIClient, model: RunModel, ssh_identity_file: str | PathLike[str] | None = None
    ) -> None:
        self._api = api_client
        self._model = model
        self._ssh_identity_file = ssh_identity_file
        self._attachment: Attachment | None = None
        self._presence: Presence | None = None

    def __repr__(self) -> str:
        where = f" on {self.backend}" if self.backend else ""
        return f"<{type(self).__name__} '{self.name}': {self.status.value}{where}>"

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.detach()

    # -- what is known -----------------------------------------------------------------------------------------------

    @property
    def id(self) -> UUID:
        """The run's own id. Names can be used again, ids never."""
        return self._model.id

    @property
    def name(self) -> str:
        """The run's name."""
        return self._model.run_name

    @property
    def status(self) -> RunStatus:
        """Where the run stands: after a retry, where its latest attempt does."""
        return self._model.status

    @property
    def backend(self) -> str | None:
        """Name of the backend whose instance runs it; `None` before there is one."""
        data = self._provisioning
        return data.backend if data else None

    @property
    def hostname(self) -> str | None:
        """Address of the instance; `None` before there is one."""
        data = self._provisioning
        return data.hostname if data else None

    @property
    def ports(self) -> dict[int, int] | None:
        """While attached: the local port for each port of the run, as `{80: 8080}`. Else `None`."""
        return dict(self._attachment.ports) if self._attachment and not self._attachment.broken else None

    @property
    def exit_code(self) -> int | None:
        """Exit code of the job's main process, 128 + N if signal N ended it; `None` before that, or if it never ran."""
        latest = self._latest
        return latest.exit_code if latest else None

    @property
    def reason(self) -> Reason | None:
        """Why the run ended, for programs; `None` while it goes on, and after success."""
        return self._model.reason

    @property
    def message(self) -> str | None:
        """Why the run ended, or what it waits for, for people, with what to do; `None` if all is well."""
        return self._model.message

    @property
    def submitted_at(self) -> datetime:
        """When the server accepted it (aware, UTC)."""
        return self._model.submitted_at

    @property
    def finished_at(self) -> datetime | None:
        """When it ended (aware, UTC); `None` while it goes on."""
        return self._model.finished_at

    @property
    def cost(self) -> float:
        """What it has cost, in USD."""
        return self._model.cost

    @property
    def url(self) -> str | None:
        """Address of a service, which leads to the replicas that are ready; `None` if the run is no service, or ended.

        On a shared server the address asks for the token that the client uses, unless the service has `auth=False`.
        """
        service = self._model.service
        return self._published(service.path) if service else None

    @property
    def service_url(self) -> str | None:
        """The same as `url`."""
        return self.url

    @property
    def service_model(self) -> ServiceModel | None:
        """The model that a service offers in OpenAI's protocol; `None` if it offers none."""
        service = self._model.service
        if service is None or service.model is None:
            return None
        url = self._published(f"/models/{self._model.project_name}/")
        return ServiceModel(service.model, url) if url else None

    def _published(self, path: str) -> str | None:
        base = self._api.services_url()
        return f"{base}{path}" if base else None

    @property
    def _latest(self) -> JobSubmission | None:
        return self._model.latest_job_submission

    @property
    def _provisioning(self) -> JobProvisioningData | None:
        latest = self._latest
        return latest.job_provisioning_data if latest else None

    def refresh(self) -> None:
        """Asks the server how the run stands now.

        Raises:
            NotFoundError: the run was deleted meanwhile.
            ServerUnavailableError: no server answered.
        """
        self._model = self._api.get_run(self._model.project_name, run_id=self.id)

    # -- acting on it ------------------------------------------------------------------------------------------------

    def stop(self, abort: bool = False) -> None:
        """Stops the run, and detaches. Stopping a run that has ended does nothing.

        Args:
            abort: kill it at once. Otherwise its process gets SIGTERM and some seconds to end by itself.
        """
        try:
            self._api.stop_runs(self._model.project_name, ids=[self.id], abort=abort)
        finally:
            self.detach()

    def wait_until_ready(self, timeout: float | None = None) -> bool:
        """Waits until a replica of a service answers as its probes want it. A task is ready as soon as it runs.

        Args:
            timeout: seconds to wait at most; no limit if not set.

        Returns:
            False if the run has ended, or the time is over: see `status` and `message`.
        """
        deadline = None if timeout is None else time.monotonic() + timeout
        self.refresh()
        while not self._is_ready and not self.status.is_finished:
            left = _LOOK_AGAIN if deadline is None else min(_LOOK_AGAIN, deadline - time.monotonic())
            if left <= 0:
                return False
            self._model = self._api.get_run(
                self._model.project_name, run_id=self.id, after_version=self._model.version, wait=left
            )
        return self._is_ready

    @property
    def _is_ready(self) -> bool:
        service = self._model.service
        return service.ready > 0 if service else self.status.value == "running"

    def logs(self, start_time: datetime | None = None, diagnose: bool = False, replica_num: int = 0) -> Iterator[bytes]:
        r"""What the run printed and prints: byte for byte, from the beginning, until it has ended.

        Works the same attached or not, while the run goes on and after it, and across restarts of the server. Pieces
        have no particular size: they may end in the middle of a line or of a character.

            for log in run.logs():
                sys.stdout.buffer.write(log)
                sys.stdout.buffer.flush()

        If some of the output could not be kept, `LogsDroppedWarning` says so, and what comes after it follows.

        Args:
            start_time: leave out what was printed before. A time without a zone is local time.
            diagnose: instead, what the server and the instance did about this run, as lines of UTF-8 text.
            replica_num: of a service with several replicas: which one, from 0.
        """
        from dstack_core._client.output import OutputReader

        project = self._model.project_name
        reader = OutputReader(
            self._api, project, self.id, start_time, diagnose=diagnose, replica_num=replica_num, check=self._check_ports
        )
        return reader.chunks()

    def _check_ports(self) -> None:
        """Who follows the output of a run without ports misses nothing."""
        if self._attachment is not None and self._attachment.ports:
            self.check_attached()

    def check_attached(self) -> None:
        """Does nothing, unless the connection to the run's machine broke while the run goes on.

        Not attached, or attached to a run that has ended meanwhile, or that is being retried, is no error.

        Raises:
            AttachError: it broke; says why. `attach` makes another one.
        """
        attachment = self._attachment
        if attachment is None or attachment.broken is None:
            return
        self.detach()
        self.refresh()
        if self.status.value == "running":
            raise AttachError(
                f"{attachment.broken} The run '{self.name}' goes on, and is not attached any more. Attach again to go "
                "on here; its output can be read without that."
            )

    def attach(self, ssh_identity_file: str | PathLike[str] | None = None) -> bool:
        """Waits until the run runs, and forwards its ports to this computer, where `ports` says.

        The port of a service leads to one replica, one that is ready if there is any, for as long as that one lives;
        `url` leads to whichever is ready. Its local port is 80 unless the configuration says another one; where 80 may
        not be used, or is taken, a free one is picked.

        A dev environment does not end for want of activity while somebody is attached to it.

        A machine of a cloud is reached over SSH, by the command `ssh`, with the key in `$DSTACK_HOME/ssh`, which is
        made when the first run is submitted. While attached, `ssh NAME` logs in where the job is: in its container, or
        else in its working directory. For that, `~/.ssh/config` gets a line at its top, and is as it was after the
        last `detach`. If the connection breaks while the run goes on, `ports` is `None` again, `check_attached` raises
        `AttachError`, and so does `logs` if the run has ports; `attach` makes another connection.

        Args:
            ssh_identity_file: the private key to log in with, where the instance is reached over SSH. Machines let in
                the one with which the run was submitted. Default: that of the client, else the one in the home folder.

        Returns:
            False if the run has ended already, and not well: see `status` and `message`.

        Raises:
            PortUsedError: a wanted local port is taken.
            AttachError: the instance's ports cannot be reached from here.
            ConfigurationError: the key cannot be used.
        """
        if self._attachment is not None:
            if self._attachment.broken is None:
                return True
            self.detach()
        self._wait_until_running()
        if self.status.is_finished:
            self.detach()
            return self.status.value == "done"
        self._attachment = self._forwarded(ssh_identity_file or self._ssh_identity_file)
        self._presence = self._present()
        return True

    def detach(self) -> None:
        """Stops forwarding, and gives the local ports back. The run goes on."""
        presence, self._presence = self._presence, None
        if presence is not None:
            presence.close()
        attachment, self._attachment = self._attachment, None
        if attachment is not None:
            attachment.close()
        self._release()

    def _release(self) -> None:
        """Gives back ports that are held for a run that is not attached."""

    def _reservation(self) -> PortReservation | None:
        return None

    def _present(self) -> Presence | None:
        inactivity = self._model.jobs[0].job_spec.inactivity_duration
        if inactivity is None:
            return None
        from dstack_core._client.presence import Presence

        return Presence(self._api, self._model.project_name, self.id, inactivity)

    def _wait_until_running(self) -> None:
        self.refresh()
        while self.status.value != "running" and not self.status.is_finished:
            self._model = self._api.get_run(
                self._model.project_name, run_id=self.id, after_version=self._model.version, wait=LONGEST_WAIT
            )

    def _forwarded(self, identity: str | PathLike[str] | None) -> Attachment:
        from dstack_core._client.attachment import Attachment
        from dstack_core._client.ports import wanted_of, with_free_ports

        job = self._job_to_reach()
        wanted = wanted_of(job.job_spec.app_specs)
        if self._model.service is not None:
            wanted = with_free_ports(wanted)
        data = job.job_submissions[-1].job_provisioning_data
        if data is None:
            raise AttachError(f"Run '{self.name}' runs, but where is not known. Try again.")
        if data.ssh_port is not None and data.host_key is not None:
            login = self._login(job.job_submissions[-1], data, identity)
            return Attachment(wanted, data, self._reservation(), login)
        if wanted and not (data.same_host_as_server and self._api.on_this_computer):
            cure = f"Reach it at {self.url}." if self._model.service else "Its output can be read, with logs()."
            raise AttachError(
                f"Run '{self.name}' runs on another computer ({data.hostname}), which is not reached over SSH: its "
                f"ports cannot be forwarded. {cure}"
            )
        return Attachment(wanted, data, self._reservation())

    def _login(
        self, submission: JobSubmission, data: JobProvisioningData, identity: str | PathLike[str] | None
    ) -> Login:
        from dstack_core._client.ssh.keys import identity_file
        from dstack_core._client.ssh.login import Login

        return Login(
            name=self.name,
            alias=f"dstack-{submission.id}",
            host=data.hostname or "",
            port=data.ssh_port or 22,
            user=data.username,
            host_key=data.host_key or "",
            identity=str(identity_file(identity)),
        )

    def _job_to_reach(self) -> Job:
        """The first replica that is ready; else the first that runs; else the first."""

        def rank(job: Job) -> tuple[bool, bool]:
            latest = job.job_submissions[-1]
            runs = latest.status.value == "running"
            return not (runs and latest.ready_at is not None), not runs

        return min(self._model.jobs, key=rank)


class SubmittedRun(Run):
    """A run that this program submitted. Until it attaches, it holds the local ports that the run wants."""

    def __init__(
        self,
        api_client: APIClient,
        model: RunModel,
        reserved: PortReservation | None = None,
        ssh_identity_file: str | PathLike[str] | None = None,
    ) -> None:
        super().__init__(api_client, model, ssh_identity_file)
        self._reserved = reserved

    def _reservation(self) -> PortReservation | None:
        return self._reserved

    def _release(self) -> None:
        reserved, self._reserved = self._reserved, None
        if reserved is not None:
            reserved.release()
