"""Calling hooks as the core does: in a daemon thread, for a limited time, and with an answer that is looked at."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence
from typing import Any, Generic, TypeVar
from uuid import UUID

from dstack_core.plugin import (
    AuthenticationError,
    BackendError,
    BackendInfo,
    Endpoint,
    Instance,
    InstanceRef,
    InstanceRequest,
    InvalidRequestError,
    NoCapacityError,
    Offer,
    QuotaExceededError,
    RateLimitedError,
    Requirements,
    UnknownOutcomeError,
)
from dstack_core.testing._loading import Hooks
from dstack_core.testing._suite._messages import expect, fail, message

T = TypeVar("T")

READS = (AuthenticationError, RateLimitedError, UnknownOutcomeError)
REFUSES = (*READS, InvalidRequestError)
CREATES = (*REFUSES, NoCapacityError, QuotaExceededError)
_ABOUT = {
    "dstack_list_offers": "offers",
    "dstack_create_instance": "create",
    "dstack_get_instance": "get",
    "dstack_list_instances": "list",
    "dstack_terminate_instance": "end",
    "dstack_check_config": "check",
    "dstack_connect": "connect",
}
_ANSWERS = {**_ABOUT, "dstack_get_instance": "get-none", "dstack_terminate_instance": "end-again"}
_CATCH = (
    "catch what the SDK raises where the hook calls it, and raise the class that says what to do; what nobody can "
    "tell is an UnknownOutcomeError"
)
_FINE = "the cloud did not fail: look at what it was asked"
_CURES = {
    **dict.fromkeys(_ABOUT, _FINE),
    "dstack_get_instance": "turn the cloud's 404 into None",
    "dstack_terminate_instance": "turn the cloud's 404, and its 'is being deleted already', into success",
}


class Outcome(Generic[T]):
    """What became of a call in another thread: a value, an error, or neither yet."""

    def __init__(self, function: Callable[[], T]) -> None:
        self.error: BaseException | None = None
        self._value: T | None = None
        self._ended = threading.Event()
        threading.Thread(target=self._run, args=(function,), name="suite-call", daemon=True).start()

    def _run(self, function: Callable[[], T]) -> None:
        try:
            self._value = function()
        except BaseException as error:  # noqa: BLE001  # raised again where it is asked for
            self.error = error
        finally:
            self._ended.set()

    def ended(self, seconds: float) -> bool:
        """Whether it ended within so many seconds."""
        return self._ended.wait(seconds)

    def get(self, seconds: float = 600.0) -> T:
        """The value; raises what the call raised, or `TimeoutError`."""
        __tracebackhide__ = True
        if not self.ended(seconds):
            raise TimeoutError(f"Not within {seconds:g} s")
        if self.error is not None:
            raise self.error
        return self._value  # type: ignore[return-value]  # it is there when there is no error


def together(functions: Sequence[Callable[[], T]], seconds: float = 600.0) -> list[Outcome[T]]:
    """Runs them at once, each in a thread of its own, and waits for all."""
    barrier = threading.Barrier(len(functions))

    def started(function: Callable[[], T]) -> Callable[[], T]:
        def run() -> T:
            barrier.wait(60)
            return function()

        return run

    outcomes = [Outcome(started(function)) for function in functions]
    deadline = time.monotonic() + seconds
    for outcome in outcomes:
        outcome.ended(max(0.0, deadline - time.monotonic()))
    return outcomes


class Backend:
    """A backend's object. Each hook is called in time, may raise what it may raise, and answers what it may answer.

    Args:
        info: what its package declares.
        hooks: of the object.
        made: the object.
    """

    def __init__(self, info: BackendInfo, hooks: Hooks, made: object) -> None:
        self.info = info
        self.hooks = hooks
        self.made = made

    def offers(self, requirements: Requirements) -> list[Offer]:
        """`dstack_list_offers`."""
        __tracebackhide__ = True
        return self._items("dstack_list_offers", Offer, REFUSES, requirements=requirements)

    def create(self, request: InstanceRequest) -> Instance:
        """`dstack_create_instance`."""
        __tracebackhide__ = True
        instance = self._ask("dstack_create_instance", CREATES, request=request)
        self._look("dstack_create_instance", instance)
        expect(
            (instance.intent, instance.owner) == (request.intent, request.owner),
            "instance-intent",
            "dstack_create_instance answered with an instance of another intent or owner",
            expected=f"intent {request.intent} of owner {request.owner}",
            got=f"intent {instance.intent} of owner {instance.owner}",
            cure="read both back from the tags (or the name) of the server that the cloud answers with, and never "
            "take a server that was made for somebody else",
        )
        return instance  # type: ignore[no-any-return]  # `_look` has seen that it is one

    def get(self, ref: InstanceRef) -> Instance | None:
        """`dstack_get_instance`."""
        __tracebackhide__ = True
        instance = self._ask("dstack_get_instance", READS, ref=ref)
        if instance is None:
            return None
        self._look("dstack_get_instance", instance)
        expect(
            instance.ref.id == ref.id,
            "get",
            "the answer is about another instance",
            expected=f"the instance {ref.id!r}",
            got=f"the instance {instance.ref.id!r}",
            cure="ask the cloud for the server with `ref.id`, and for no other",
        )
        return instance  # type: ignore[no-any-return]  # as above

    def listed(self, owner: UUID) -> list[Instance]:
        """`dstack_list_instances`."""
        __tracebackhide__ = True
        found: list[Instance] = self._items("dstack_list_instances", Instance, READS, owner=owner)
        for instance in found:
            self._look("dstack_list_instances", instance)
            expect(
                instance.owner == owner,
                "list-others",
                "an instance of another owner is in the listing",
                expected=f"instances of {owner} alone",
                got=f"{instance.ref.id} of {instance.owner}",
                cure="filter by the owner's tag, in the cloud's API if it can, else in the backend",
            )
        return found

    def terminate(self, ref: InstanceRef) -> None:
        """`dstack_terminate_instance`."""
        __tracebackhide__ = True
        self._ask("dstack_terminate_instance", READS, ref=ref)

    def check(self) -> Sequence[str]:
        """`dstack_check_config`."""
        __tracebackhide__ = True
        problems = self._ask("dstack_check_config", REFUSES)
        good = not isinstance(problems, str) and all(isinstance(problem, str) for problem in problems)
        expect(
            good,
            "check-answer",
            "the answer is no list of sentences",
            expected="a list of str, empty when all is well",
            got=repr(problems),
            cure='return ["The token lacks the permission …"], or []',
        )
        return list(problems)

    def connect(self, instance: Instance) -> Endpoint | None:
        """`dstack_connect`, or the endpoint that there is."""
        __tracebackhide__ = True
        if "dstack_connect" not in self.hooks:
            return instance.endpoint
        endpoint = self._ask("dstack_connect", READS, instance=instance)
        expect(
            endpoint is None or isinstance(endpoint, Endpoint),
            "connect",
            "the answer is no endpoint",
            expected="an Endpoint, or None when there is none yet",
            got=repr(endpoint),
            cure="return Endpoint(ssh_host=…) or Endpoint(unix_socket=…)",
        )
        return endpoint  # type: ignore[no-any-return]  # just looked at

    # -- inside -----------------------------------------------------------------------------------------------------

    def _ask(self, hook: str, allowed: tuple[type[BackendError], ...], **arguments: object) -> Any:
        __tracebackhide__ = True
        limit = self.info.hook_timeout
        outcome = Outcome(lambda: self.hooks.call(hook, backend=self.info.name, **arguments))
        if not outcome.ended(limit):
            fail(
                "in-time",
                f"{hook} did not return in time",
                expected=f"an answer or an error within the {limit:g} s that `BackendInfo.hook_timeout` allows",
                got="neither",
                cure="do not wait for what the machine does, and give the HTTP client a limit below `hook_timeout`",
            )
        if outcome.error is None:
            return outcome.get()
        if isinstance(outcome.error, allowed):
            # Read only where the case expected an answer.
            outcome.error.add_note(_unexpected(hook, "an answer", outcome.error, _CURES[hook], _ANSWERS[hook]))
            raise outcome.error
        names = ", ".join(sorted(one.__name__ for one in allowed))
        raise AssertionError(
            _unexpected(hook, f"an answer, or one of {names}", outcome.error, _CATCH, "raises")
        ) from outcome.error

    def _items(self, hook: str, kind: type[T], allowed: tuple[type[BackendError], ...], **arguments: object) -> list[T]:
        __tracebackhide__ = True
        found = self._ask(hook, allowed, **arguments)
        good = isinstance(found, list | tuple) and all(isinstance(item, kind) for item in found)
        expect(
            good,
            _ABOUT[hook],
            f"{hook} did not return a list of {kind.__name__}",
            expected=f"a list of {kind.__name__}",
            got=f"{found!r:.200}",
            cure=f"return a list, empty when there is none, and make each item a {kind.__name__}",
        )
        return list(found)

    def _look(self, hook: str, instance: object) -> None:
        """What holds for every instance, whoever returns it."""
        __tracebackhide__ = True
        if not isinstance(instance, Instance):
            fail(
                _ABOUT[hook],
                f"{hook} did not return an Instance",
                expected="an Instance",
                got=repr(instance),
                cure="describe the server that the cloud answered with",
            )
        expect(
            instance.ref.backend == self.info.name,
            "ref",
            f"{hook} returned an instance of another backend",
            expected=f"`ref.backend` {self.info.name!r}",
            got=repr(instance.ref.backend),
            cure=f"write InstanceRef(backend={self.info.name!r}, …)",
        )
        expect(
            instance.created_at.utcoffset() is not None,
            "instance-created",
            f"{hook} returned a `created_at` without a time zone",
            expected="an aware time, as datetime.now(UTC)",
            got=repr(instance.created_at),
            cure="parse the cloud's time with its zone, or add `tzinfo=UTC` where the cloud means UTC",
        )


def _unexpected(hook: str, expected: str, error: BaseException, cure: str, clause: str) -> str:
    got = f"{type(error).__name__}: {error}"
    return message(clause, f"{hook}: it raised what it may not raise here", expected=expected, got=got, cure=cure)
