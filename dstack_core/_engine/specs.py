"""From what a user wrote to what runs: run, then job, then what the agent is told. Pure functions."""

from __future__ import annotations

import re
import shlex
from collections.abc import Sequence
from functools import lru_cache
from typing import TYPE_CHECKING, cast
from uuid import UUID

from dstack_core._engine import dev_environments
from dstack_core._engine.transitions import KeepAlive, RetryRule, Rule
from dstack_core._models.configurations import AppSpec, BaseConfiguration, DevEnvironment, PortMapping, Task
from dstack_core._models.profiles import Profile, RetryEvent, RetryPolicy
from dstack_core._models.repos import RemoteRunRepoData
from dstack_core._models.requirements import effective_profile, requirements_of
from dstack_core._models.runs import JobSpec, Reason, RunSpec
from dstack_core._models.services import Service, TGIChatModel
from dstack_core._transport import AgentCode, AgentJobSpec, AgentRepo
from dstack_core.errors import ConfigurationError

if TYPE_CHECKING:
    from dstack_core._models.configurations import AnyConfiguration


def _words(text: str) -> tuple[str, ...]:
    return tuple(text.split())


_PUBLIC_KEY = re.compile(r"(ssh|ecdsa|sk)-[a-z0-9@.-]{1,60} [A-Za-z0-9+/]{20,1500}={0,2}( [\x20-\x7e]{0,200})?")
STOP_GRACE = 15
"""Seconds between the polite stop and the kill, unless `stop_duration` says otherwise."""

_RETRY_REASONS: dict[RetryEvent, frozenset[Reason]] = {
    RetryEvent.NO_CAPACITY: frozenset({Reason.NO_CAPACITY, Reason.WAITING_RUNNER_LIMIT}),
    RetryEvent.INTERRUPTION: frozenset({Reason.INTERRUPTED, Reason.AGENT_LOST, Reason.INSTANCE_LOST}),
    RetryEvent.ERROR: frozenset(
        {Reason.EXITED_WITH_ERROR, Reason.START_FAILED, Reason.PORTS_BINDING_FAILED, Reason.BACKEND_ERROR}
    ),
}


@lru_cache(maxsize=256)
def stored_job(text: str) -> JobSpec:
    """The job that a row describes. Each step of a job reads the same text."""
    return JobSpec.model_validate_json(text)


@lru_cache(maxsize=256)
def stored_run(text: str) -> RunSpec:
    """What a run's row says that its user asked for."""
    return RunSpec.model_validate_json(text)


def job_specs(spec: RunSpec, run_name: str) -> tuple[JobSpec, ...]:
    """The jobs of a run. A task is one job, a service one for each replica.

    Raises:
        ConfigurationError: a kind of run that this version cannot start, or a field that it does not carry out.
    """
    configuration = spec.configuration
    if isinstance(configuration, Task):
        return (_task(configuration, spec, run_name),)
    if isinstance(configuration, Service):
        return _service(configuration, spec, run_name)
    return (_dev_environment(configuration, spec, run_name),)


def _task(task: Task, spec: RunSpec, run_name: str) -> JobSpec:
    _refuse_what_would_be_ignored(task, spec.profile)
    return _job(task, spec, run_name, task.ports, task.commands)


def _dev_environment(configuration: DevEnvironment, spec: RunSpec, run_name: str) -> JobSpec:
    _refuse_what_would_be_ignored(configuration, spec.profile)
    job = _job(configuration, spec, run_name, configuration.ports, [])
    return job.model_copy(update=dev_environments.what_runs(configuration, job.max_duration, run_name))


def _service(service: Service, spec: RunSpec, run_name: str) -> tuple[JobSpec, ...]:
    _refuse_what_would_be_ignored(service, spec.profile)
    _refuse_other_services(service)
    port = service.port.container_port
    replica = _job(service, spec, run_name, [service.port], service.commands).model_copy(
        update={"service_port": port, "probes": tuple(service.probes or ()), "replicas": service.replicas.min}
    )
    names = ((number, f"{run_name}-{number}-0") for number in range(service.replicas.min or 0))
    return tuple(replica.model_copy(update={"replica_num": number, "job_name": name}) for number, name in names)


def _job(
    configuration: BaseConfiguration, spec: RunSpec, run_name: str, ports: Sequence[PortMapping], commands: list[str]
) -> JobSpec:
    """What all kinds of runs have in common."""
    # The types of the two ends of one union, of which this is any.
    profile = effective_profile(cast("AnyConfiguration", configuration), spec.profile)
    auth = configuration.registry_auth
    return JobSpec(
        job_name=f"{run_name}-0-0",
        app_specs=tuple(
            AppSpec(port=port.container_port, map_to_port=port.local_port, app_name=f"app_{number}")
            for number, port in enumerate(ports)
        ),
        commands=tuple(one for one in (*configuration.setup, *commands) if one.strip()),
        shell=configuration.shell,
        env={name: value or "" for name, value in configuration.env.items()} | {"DSTACK_RUN_NAME": run_name},
        image_name=configuration.image,
        entrypoint=tuple(shlex.split(configuration.entrypoint)) if configuration.entrypoint else None,
        user=configuration.user,
        privileged=bool(configuration.privileged),
        python=configuration.python,
        registry_username=auth.username if auth else None,
        registry_password=auth.password if auth else None,
        max_duration=_seconds(profile.max_duration),
        stop_duration=_grace(profile.stop_duration),
        requirements=requirements_of(cast("AnyConfiguration", configuration), spec.profile),
        backends=tuple(profile.backends or ()),
        retry_policy=profile.retry_policy or RetryPolicy(),
        working_dir=configuration.working_dir or (spec.working_dir if spec.working_dir != "." else None),
        repo_id=spec.repo_id if is_cloned(spec) else None,
        repo_data=RemoteRunRepoData.model_validate(spec.repo_data) if is_cloned(spec) else None,
        code_hash=spec.repo_code_hash,
        ssh_key_pub=_public_key(spec.ssh_key_pub),
    )


def _public_key(text: str | None) -> str | None:
    """One line of `authorized_keys`, and nothing that could make it two, or say more than who is let in."""
    if text is None:
        return None
    if not _PUBLIC_KEY.fullmatch(text.strip()):
        raise ConfigurationError("ssh_key_pub is no public key as OpenSSH writes it: ssh-ed25519 AAAA... comment")
    return text.strip()


def is_cloned(spec: RunSpec) -> bool:
    """Whether a git repository is cloned into the job's folder."""
    return spec.repo_data.get("repo_type") == "remote"


_NOT_YET = _words(
    "nodes groups volumes docker repos files schedule utilization_policy reservation fleets instances backend_options"
)


def _refuse_what_would_be_ignored(configuration: BaseConfiguration, profile: Profile) -> None:
    """What a person wrote is carried out or refused, never passed over."""
    kind = type(configuration).__name__
    for name in _NOT_YET:
        value = getattr(configuration, name, None) or getattr(profile, name, None)
        if value and not (name == "nodes" and value == 1):
            raise ConfigurationError(
                f"{kind}: '{name}' is not carried out by this version. Remove it to run the {kind.lower()}."
            )


def _refuse_other_services(service: Service) -> None:
    """The same for what only a service has."""
    refused = {
        "scaling": (service.scaling, "Remove it, and give a fixed number: replicas=2."),
        "gateway": (service.gateway, "Remove it: the server itself publishes the service, at the run's url."),
        "https": (service.https is True, "Remove it, and put a proxy with TLS in front of the server."),
        "rate_limits": (service.rate_limits, "Remove it, and limit the rate in the service itself."),
        "format: tgi": (
            isinstance(service.model, TGIChatModel),
            "Text Generation Inference speaks OpenAI's protocol itself: use format: openai.",
        ),
    }
    for name, (value, cure) in refused.items():
        if value:
            raise ConfigurationError(f"Service: '{name}' is not carried out by this version. {cure}")
    if not service.replicas.min or service.replicas.min != service.replicas.max:
        raise ConfigurationError(
            f"Service: replicas={str(service.replicas)!r} is not carried out by this version. "
            "Give a fixed number of at least one: replicas=2."
        )


def _seconds(duration: int | str | None) -> int | None:
    """A duration in seconds; `"off"` and none at all are no limit."""
    return duration if isinstance(duration, int) and duration >= 0 else None


def _grace(duration: int | str | None) -> int:
    """Seconds between the polite stop and the kill."""
    seconds = _seconds(duration)
    return STOP_GRACE if seconds is None else seconds


def retry_rule(spec: JobSpec) -> RetryRule:
    """The retry policy in the terms of the transitions."""
    policy = spec.retry_policy
    if not policy.retry:
        return RetryRule()
    reasons: frozenset[Reason] = frozenset().union(*(_RETRY_REASONS[event] for event in policy.on_events))
    return RetryRule(reasons=reasons, limit=policy.limit)


def rule_of(spec: JobSpec, proven: bool) -> Rule:
    """What follows the end of an attempt. `proven`: a replica of the run has been ready once."""
    return retry_rule(spec) if spec.service_port is None else KeepAlive(proven, retry_rule(spec))


def agent_job_spec(spec: JobSpec, code: AgentCode | None = None, repo: AgentRepo | None = None) -> AgentJobSpec:
    """What the agent is told to run, and the files that it starts with."""
    registry = None
    if spec.registry_password is not None:
        registry = {"username": spec.registry_username or "", "password": spec.registry_password}
    argv: tuple[str, ...] = ()
    shell = None
    entrypoint = spec.entrypoint
    if entrypoint is not None:
        argv = spec.commands
    elif spec.commands and spec.shell is not None and spec.image_name is not None:
        entrypoint, argv = (spec.shell,), ("-c", script_of(spec.commands))
    elif spec.commands and spec.shell is not None:
        argv = (spec.shell, "-c", script_of(spec.commands))
    elif spec.commands:
        shell = script_of(spec.commands)
    return AgentJobSpec(
        argv=argv,
        shell=shell,
        env=spec.env,
        image=spec.image_name,
        entrypoint=entrypoint,
        user=spec.user,
        privileged=spec.privileged,
        registry=registry,
        python=spec.python,
        working_dir=spec.working_dir,
        ports=tuple(app.port for app in spec.app_specs),
        gpus="all" if spec.requirements.gpu is not None else None,
        shm_mib=spec.requirements.shm_mib,
        max_duration=spec.max_duration,
        stop_grace=spec.stop_duration,
        code=code,
        repo=repo,
        service_port=spec.service_port,
        keep_port=spec.replicas == 1,
        inactivity=spec.inactivity_duration,
    )


def script_of(commands: tuple[str, ...]) -> str:
    """One shell script that runs the commands in order and ends with the first that fails.

    Each command is a group of its own lines, so that comments, here-documents and a trailing `&` stay within it.
    """
    return " &&\n".join(f"{{ {command}\n}}" for command in commands)


def run_name_of(number: int) -> str:
    """A name for a run that has none: `adjective-animal-N`."""
    adjective, number = _ADJECTIVES[number % len(_ADJECTIVES)], number // len(_ADJECTIVES)
    animal, number = _ANIMALS[number % len(_ANIMALS)], number // len(_ANIMALS)
    return f"{adjective}-{animal}-{number % 1000 + 1}"


def submit_key_seed(key: UUID) -> int:
    """A number for `run_name_of` that a repeated submit draws again."""
    return key.int >> 64


_ADJECTIVES = _words(
    "brave calm clever cosy eager early fair fancy fast fresh gentle glad grand happy honest jolly keen kind light "
    "lively lucky merry mild modest neat nice noble plucky polite proud quick quiet rapid ready sharp shiny smart "
    "smooth snug solid steady sunny swift tidy tiny tough warm wise witty zesty"
)
_ANIMALS = _words(
    "ant badger bat bear bee beetle bison boar buck camel cat cobra crab crane crow deer dingo dodo dog dove duck "
    "eagle eel elk emu falcon ferret finch fish fox frog gecko goat goose hare hawk hen heron horse ibis jay koala "
    "lark lemur lion llama lynx mole moose moth mouse newt otter owl ox panda parrot pig pony puma quail rabbit ram "
    "rat raven robin salmon seal shark sheep shrew skunk sloth snail snake spider squid stork swan tiger toad trout "
    "turtle viper vole wasp whale wolf wombat wren yak zebra"
)
