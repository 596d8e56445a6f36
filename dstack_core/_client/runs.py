"""`client.runs`: submitting runs, and finding them."""

from __future__ import annotations

import builtins
import os
import posixpath
import threading
import uuid
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from dstack_core._client.api import APIClient
from dstack_core._client.run import Run, SubmittedRun
from dstack_core.errors import ConfigurationError, NotFoundError

if TYPE_CHECKING:
    from os import PathLike

    from dstack_core._client.ports import PortReservation
    from dstack_core._models.configurations import AnyConfiguration
    from dstack_core._models.profiles import Profile, ProfileRetryPolicy, SpotPolicy
    from dstack_core._models.repos import Repo
    from dstack_core._models.resources import Resources
    from dstack_core._models.runs import Run as RunModel
    from dstack_core._models.runs import RunPlan, RunSpec


class RunCollection:
    """The runs of the project."""

    def __init__(
        self, api_client: APIClient, project: str, ssh_identity_file: str | PathLike[str] | None = None
    ) -> None:
        self._api = api_client
        self._project = project
        self._ssh_identity_file = ssh_identity_file

    def __repr__(self) -> str:
        return f"<RunCollection of project '{self._project}'>"

    def submit(
        self,
        configuration: AnyConfiguration,
        configuration_path: str | None = None,
        repo: Repo | None = None,
        backends: Sequence[str] | None = None,
        resources: Resources | None = None,
        spot_policy: SpotPolicy | str | None = None,
        retry_policy: ProfileRetryPolicy | None = None,
        max_duration: int | str | None = None,
        max_price: float | None = None,
        working_dir: str | None = None,
        run_name: str | None = None,
        reserve_ports: bool = True,
        *,
        profile: Profile | None = None,
    ) -> SubmittedRun:
        """Submits a run, and returns as soon as the server has accepted it.

        What is passed here wins over the same field of the profile, and that over the same field of the configuration.
        Of `resources`, each field is taken from the first of the three that sets it.

        Args:
            configuration: what to run: a `Task`, `Service` or `DevEnvironment`.
            configuration_path: where the configuration came from, for people.
            repo: the code to bring along, a `LocalRepo`, `RemoteRepo` or `VirtualRepo`; none if not set. What the
                server has already is not sent again. A `RemoteRepo` must have been initialised: see `client.repos`.
            backends: names of the backends that may be used; all if not set.
            resources: what the run needs.
            spot_policy: `"spot"`, `"on-demand"` or `"auto"` (either). Default: auto for tasks and services, on-demand
                for dev environments.
            retry_policy: whether to wait when there is no capacity, and to go on after a spot interruption.
            max_duration: the run is stopped after that long, as `3600` or `"1h"`; `"off"` for no limit.
            max_price: the most to pay, in USD per hour.
            working_dir: where the commands run, relative to the job's folder. With a repo that is a folder of this
                computer, also absolute, if it is in there.
            run_name: the run's name; made up if not set. The name of a run that has ended can be used again.
            reserve_ports: hold the local ports that the run wants from now on, so that attaching finds them free.
            profile: how and where to run it, as `dstack.api.utils.load_profile` reads it; none if not set.

        Raises:
            ConfigurationError: something that was passed cannot be used.
            NoOffersError: nothing fits; says per backend why.
            RunNameTakenError: an active run has that name.
            PortUsedError: a wanted local port is taken.
            ServerUnavailableError: no server answered; says whether the run may exist all the same.
        """
        return self._submit(
            repo,
            lambda: self._spec(
                configuration,
                repo,
                configuration_path,
                working_dir,
                run_name,
                profile,
                backends=backends,
                resources=resources,
                spot_policy=spot_policy,
                retry_policy=retry_policy,
                max_duration=max_duration,
                max_price=max_price,
            ),
            reserve_ports,
        )

    def get_plan(
        self,
        configuration: AnyConfiguration,
        repo: Repo | None = None,
        configuration_path: str | None = None,
        backends: Sequence[str] | None = None,
        resources: Resources | None = None,
        spot_policy: SpotPolicy | str | None = None,
        retry_policy: ProfileRetryPolicy | None = None,
        max_duration: int | str | None = None,
        max_price: float | None = None,
        working_dir: str | None = None,
        run_name: str | None = None,
        *,
        profile: Profile | None = None,
    ) -> RunPlan:
        """What would happen if the run were submitted now: its jobs, and up to 50 offers for each, cheapest first.

        The arguments are those of `submit`. The code is neither read nor sent.

        Raises:
            ConfigurationError: something that was passed cannot be used.
            ServerUnavailableError: no server answered.
        """
        spec = self._spec(
            configuration,
            repo,
            configuration_path,
            working_dir,
            run_name,
            profile,
            backends=backends,
            resources=resources,
            spot_policy=spot_policy,
            retry_policy=retry_policy,
            max_duration=max_duration,
            max_price=max_price,
        )
        return self._api.get_plan(self._project, spec)

    def exec_plan(self, run_plan: RunPlan, repo: Repo | None = None, reserve_ports: bool = True) -> SubmittedRun:
        """Submits the run of a plan.

        Args:
            run_plan: what `get_plan` returned.
            repo: the same as there.
            reserve_ports: as for `submit`.

        Raises:
            ConfigurationError: it is not the same repo.
            ClientError: as `submit`.
        """
        _check_same_repo(run_plan.run_spec, repo)
        return self._submit(repo, lambda: run_plan.run_spec, reserve_ports)

    def list(self, all: bool = False) -> builtins.list[Run]:
        """The runs of the project, newest first.

        Args:
            all: also those that have ended. Otherwise the active ones or, if there is none, the latest that ended.
        """
        return [self._run(model) for model in self._api.list_runs(self._project, all=all)]

    def get(self, run_name: str) -> Run | None:
        """The run of that name, or `None` if there is none.

        Args:
            run_name: the name. Of several runs that had it one after the other, the latest.
        """
        try:
            return self._run(self._api.get_run(self._project, run_name))
        except NotFoundError:
            return None

    def _run(self, model: RunModel) -> Run:
        return Run(self._api, model, self._ssh_identity_file)

    def _submit(self, repo: Repo | None, prepare: Callable[[], RunSpec], reserve_ports: bool) -> SubmittedRun:
        from dstack_core._client.submitting import submitted

        reserved: builtins.list[PortReservation] = []
        # The same key for every try, so that a try whose answer was lost does not count twice.
        key = uuid.uuid4()
        abandoned = threading.Event()

        def prepared() -> RunSpec:
            spec = prepare()
            reserved.extend(self._reserve(spec.configuration) if reserve_ports else [])
            return self._with_code(spec, repo, abandoned)

        try:
            model = submitted(prepared, lambda spec: self._api.submit(self._project, spec, key))
        except BaseException:
            abandoned.set()
            for reservation in reserved:
                reservation.release()
            raise
        held = reserved[0] if reserved else None
        return SubmittedRun(self._api, model, held, self._ssh_identity_file)

    def _with_code(self, spec: RunSpec, repo: Repo | None, abandoned: threading.Event) -> RunSpec:
        if repo is None:
            return spec
        from dstack_core._client.code.uploading import upload

        code_hash = upload(self._api, self._project, repo, abandoned)
        return spec.model_copy(update={"repo_code_hash": code_hash}) if code_hash else spec

    def _reserve(self, configuration: AnyConfiguration) -> builtins.list[PortReservation]:
        from dstack_core._client.ports import PortReservation, to_hold

        wanted = to_hold(configuration)
        if not wanted:
            return []
        # Without an image, the job may become a process of this computer.
        here = self._api.on_this_computer and configuration.image is None
        return [PortReservation(wanted, job_listens_here=here)]

    def _spec(
        self,
        configuration: AnyConfiguration,
        repo: Repo | None,
        configuration_path: str | None,
        working_dir: str | None,
        run_name: str | None,
        profile: Profile | None,
        **given: Any,
    ) -> RunSpec:
        from dstack_core._client.ssh.keys import public_key
        from dstack_core._models.configurations import BaseConfiguration, check_run_name, fill_env
        from dstack_core._models.profiles import Profile, profile_with
        from dstack_core._models.runs import RunSpec

        if not isinstance(configuration, BaseConfiguration):
            raise ConfigurationError(
                f"configuration is a {type(configuration).__name__}; pass a Task, Service or DevEnvironment"
            )
        if profile is not None and not isinstance(profile, Profile):
            raise ConfigurationError(f"profile is a {type(profile).__name__}; pass a Profile, or load_profile(...)")
        return RunSpec(
            run_name=check_run_name(run_name) if run_name is not None else configuration.name,
            **_about(repo, configuration),
            working_dir=_checked_dir(working_dir, repo),
            configuration_path=configuration_path or "(python)",
            configuration=fill_env(configuration, os.environ),
            profile=profile_with(profile, **given),
            ssh_key_pub=public_key(self._ssh_identity_file),
        )


def _about(repo: Repo | None, configuration: AnyConfiguration) -> dict[str, Any]:
    """What a run's specification says of its repo."""
    if repo is None:
        return {}
    from dstack_core._models.repos import Repo

    if not isinstance(repo, Repo):
        raise ConfigurationError(f"repo is a {type(repo).__name__}; pass a LocalRepo, RemoteRepo or VirtualRepo")
    if configuration.working_dir is not None:
        _checked_dir(configuration.working_dir, None)
    return {"repo_id": repo.repo_id, "repo_data": repo.run_repo_data.model_dump(mode="json")}


def _checked_dir(working_dir: str | None, repo: Repo | None) -> str:
    path = posixpath.normpath(working_dir or ".")
    if repo is not None and repo.repo_dir is not None and path.startswith("/"):
        path = _inside(path, repo.repo_dir)
    if path == ".." or path.startswith("../"):
        folder = f" {repo.repo_dir}" if repo is not None and repo.repo_dir is not None else ""
        raise ConfigurationError(
            f"Working directory is outside of the repo{folder}: '{working_dir}'. Use a path without '..' that begins "
            "in the repo."
        )
    return path


def _inside(path: str, folder: str) -> str:
    """A path relative to a folder; that of its file system's own name for it, if only that lies in the folder."""
    relative = posixpath.relpath(path, folder)
    return posixpath.relpath(posixpath.realpath(path), folder) if relative.startswith("..") else relative


def _check_same_repo(spec: RunSpec, repo: Repo | None) -> None:
    # The id that a configuration's own, empty repo has.
    nothing = "none"
    if (repo.repo_id if repo else nothing) != spec.repo_id:
        with_repo = f"with the repo '{spec.repo_id}'" if spec.repo_id != nothing else "without a repo"
        raise ConfigurationError(f"The plan was made {with_repo}. Pass the same `repo` as to get_plan.")
