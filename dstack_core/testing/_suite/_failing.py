"""Cases about errors: each class asks the engine for something else, so each fault has its class."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import pytest

from dstack_core.plugin import (
    AuthenticationError,
    BackendError,
    InvalidRequestError,
    NoCapacityError,
    QuotaExceededError,
    RateLimitedError,
    Requirements,
    UnknownOutcomeError,
)
from dstack_core.testing._clouds import Failure, Fault
from dstack_core.testing._suite._base import Base
from dstack_core.testing._suite._calls import Outcome, together
from dstack_core.testing._suite._messages import expect, fail
from dstack_core.testing._suite._needs import CHECKS, COUNT, FAULTS, MARKED, SECRETS, TRUTH, needs
from dstack_core.testing._suite._rig import Rig

# So many that an SDK which repeats calls by itself gives up, too.
_ALL = 1000
_CLASSES: dict[str, type[BackendError]] = {
    "throttle": RateLimitedError,
    "no capacity": NoCapacityError,
    "quota": QuotaExceededError,
    "unauthorized": AuthenticationError,
    "forbidden": AuthenticationError,
    "invalid": InvalidRequestError,
    "server error": UnknownOutcomeError,
    "drop": UnknownOutcomeError,
    "hang": UnknownOutcomeError,
}
_CLAUSES = {
    "throttle": "create-limited",
    "no capacity": "create-capacity",
    "quota": "create-quota",
    "unauthorized": "create-auth",
    "forbidden": "create-auth",
    "invalid": "create-invalid",
    "server error": "create-unknown",
    "drop": "create-unknown",
}
_OF_READS = ["throttle", "unauthorized", "forbidden", "server error", "drop"]
_REFUSALS = ["throttle", "no capacity", "quota", "unauthorized", "forbidden", "invalid"]
_CURES = {
    "throttle": "HTTP 429 and its like are a RateLimitedError, with the seconds of Retry-After",
    "no capacity": "look at the cloud's error code before its HTTP status: many clouds report shortage as 500 or 503",
    "quota": "look at the cloud's error code: a quota is neither a shortage, which passes, nor a lack of permission",
    "unauthorized": "HTTP 401 and its like are an AuthenticationError",
    "forbidden": "HTTP 403 is an AuthenticationError, unless the error code says that it is a quota",
    "invalid": "HTTP 400 and 422 are an InvalidRequestError, unless the error code says more",
    "server error": "HTTP 500 to 504 may have done it or not: an UnknownOutcomeError, unless the error code says more",
    "drop": "a connection that breaks after the request was sent may have done it or not: an UnknownOutcomeError",
    "hang": "a time-out may have done it or not: an UnknownOutcomeError",
}


@dataclass(frozen=True)
class _Hook:
    """A hook that reads or ends, ready to be called."""

    name: str
    clause: str
    call: Callable[[Rig, Any], object]


_HOOKS = {
    "offers": _Hook("dstack_list_offers", "offers-read", lambda rig, _: rig.backend.offers(Requirements())),
    "get": _Hook("dstack_get_instance", "get-errors", lambda rig, one: rig.backend.get(one.ref)),
    "list": _Hook("dstack_list_instances", "list-errors", lambda rig, one: rig.backend.listed(one.owner)),
    "terminate": _Hook("dstack_terminate_instance", "end-errors", lambda rig, one: rig.backend.terminate(one.ref)),
}


class ErrorCases(Base):
    """The table of errors: what the cloud says, the class it has to become, and what else has to be in it."""

    @needs(FAULTS)
    @pytest.mark.parametrize("fault", list(_CLAUSES))
    def test_the_error_of_create(self, rig: Rig, fault: str) -> None:
        """Has each way in which a creation fails its class, with the cloud's words, scope and waiting time?"""
        request = rig.request()
        rig.expect_to_end(request)
        with rig.failing(fault, _ALL) as failure:
            error = _error(lambda: rig.backend.create(request), _CLAUSES[fault], fault, "dstack_create_instance")
        _expect_class(error, fault, _CLAUSES[fault], "dstack_create_instance")
        _expect_words(error, failure, fault, "dstack_create_instance")
        _expect_scope(error, failure)
        _expect_wait(error, failure, "dstack_create_instance")
        _expect_no_secret(rig, error, "dstack_create_instance")

    @needs(FAULTS, TRUTH)
    @pytest.mark.parametrize("fault", _REFUSALS)
    def test_a_refusal_leaves_nothing_and_may_be_tried_again(self, rig: Rig, fault: str) -> None:
        """Is nothing made by a creation that was refused, and one instance when the same request is accepted later?"""
        request = rig.request()
        rig.expect_to_end(request)
        with rig.failing(fault, _ALL):
            _error(lambda: rig.backend.create(request), _CLAUSES[fault], fault, "dstack_create_instance")
        made = rig.new_servers()
        expect(
            not made,
            _CLAUSES[fault],
            f"a creation that was refused ({fault}) made something",
            expected="nothing",
            got=[server.name for server in made],
            cure="do not go on after an error, and do not try another type or zone: choosing is the engine's business",
        )
        rig.create(request)
        made = rig.new_servers()
        expect(
            len(made) == 1,
            "intent",
            f"after a refusal ({fault}), the same request made more or less than one server",
            expected="one server",
            got=[server.name for server in made],
            cure="keep nothing of a failed call",
        )

    @needs(FAULTS)
    @pytest.mark.parametrize("fault", ["no capacity", "quota", "invalid"])
    def test_a_refusal_is_reported_and_not_worked_around(self, rig: Rig, fault: str) -> None:
        """Is a single refusal reported at once, instead of being answered by another zone, type or try?"""
        request = rig.request()
        rig.expect_to_end(request)
        with rig.failing(fault, 1):
            error = _error(lambda: rig.backend.create(request), _CLAUSES[fault], fault, "dstack_create_instance")
        _expect_class(error, fault, _CLAUSES[fault], "dstack_create_instance")

    @needs(FAULTS)
    @pytest.mark.parametrize("fault", _OF_READS)
    @pytest.mark.parametrize("hook", ["offers", "get", "list", "terminate"])
    def test_the_error_of_a_call(self, rig: Rig, hook: str, fault: str) -> None:
        """Is each way in which offers, get, list and terminate fail reported by its class, and never as an answer?"""
        asked = _HOOKS[hook]
        instance = None if hook == "offers" else rig.start()
        if hook == "offers":
            rig.backend  # noqa: B018  # made before the cloud fails
        with rig.failing(fault, _ALL) as failure:
            error = _error(lambda: asked.call(rig, instance), asked.clause, fault, asked.name)
        _expect_class(error, fault, asked.clause, asked.name)
        _expect_words(error, failure, fault, asked.name)
        _expect_wait(error, failure, asked.name)
        _expect_no_secret(rig, error, asked.name)

    @needs(FAULTS)
    def test_every_hook_gives_up_in_time(self, rig: Rig) -> None:
        """Does each hook, when the cloud does not answer at all, raise UnknownOutcomeError before `hook_timeout`?"""
        instance, request = rig.start(), rig.request()
        kept = rig.backend.offers(Requirements())
        rig.expect_to_end(request)
        calls: dict[str, Callable[[], object]] = {
            **{asked.name: partial(asked.call, rig, instance) for asked in _HOOKS.values()},
            "dstack_create_instance": lambda: rig.backend.create(request),
        }
        with rig.failing("hang", _ALL):
            outcomes = together(list(calls.values()), rig.info.hook_timeout + 5)
        for name, outcome in zip(calls, outcomes, strict=True):
            if name == "dstack_list_offers" and outcome.ended(0) and outcome.error is None and outcome.get() == kept:
                # A backend may keep what it sells, and show that.
                continue
            error = _error(outcome.get, "in-time", "hang", name)
            _expect_class(error, "hang", "in-time", name)

    # -- the answer that never came ---------------------------------------------------------------------------------

    @needs(FAULTS, TRUTH)
    @pytest.mark.parametrize("fault", ["drop", "server error"])
    def test_a_lost_answer_is_unknown_and_asked_for_again(self, rig: Rig, fault: str) -> None:
        """Is a creation that was carried out and not answered unknown, and does the same request find its instance?"""
        request = rig.request()
        rig.expect_to_end(request)
        with rig.failing(fault, _ALL, after=True):
            error = _error(lambda: rig.backend.create(request), "create-unknown", fault, "dstack_create_instance")
        _expect_class(error, fault, "create-unknown", "dstack_create_instance")
        again = rig.create(request)
        there = [server.id for server in rig.new_servers()]
        expect(
            there == [again.ref.id],
            "create-once",
            "a creation whose answer was lost, and that was asked for again, is not one server",
            expected=f"one server, {again.ref.id}",
            got=there,
            cure="use the same key each time, and never repeat a call that creates with a fresh one",
        )

    @needs(FAULTS, TRUTH, MARKED)
    @pytest.mark.parametrize("fault", ["drop", "server error"])
    def test_a_lost_answer_is_found_in_the_listing(self, rig: Rig, fault: str) -> None:
        """Does the listing show an instance whose creation was never answered, so that it can be adopted?"""
        request = rig.request()
        rig.expect_to_end(request)
        with rig.failing(fault, _ALL, after=True):
            _error(lambda: rig.backend.create(request), "create-unknown", fault, "dstack_create_instance")
        rig.until(
            lambda: [one for one in rig.another().listed(rig.owner) if one.intent == request.intent],
            "list",
            "an instance whose creation was not answered is not found by its owner and intent",
            expected=f"one instance of the intent {request.intent}",
            cure="put the tags into the create call, and list by the owner's tag",
        )

    # -- throttling -------------------------------------------------------------------------------------------------

    @needs(FAULTS, TRUTH)
    def test_a_storm_of_throttling_passes(self, rig: Rig) -> None:
        """Are eight threads that are throttled told so, is nothing made, and all of it once the storm is over?"""
        requests = [rig.request() for _ in range(8)]
        rig.expect_to_end(*requests)
        calls = [partial(rig.backend.create, request) for request in requests]
        with rig.failing("throttle", 100_000):
            for outcome in together(calls):
                error = _error(outcome.get, "create-limited", "throttle", "dstack_create_instance")
                _expect_class(error, "throttle", "create-limited", "dstack_create_instance")
        made = rig.new_servers()
        expect(
            not made,
            "create-limited",
            "while everything was throttled, something was made",
            expected="nothing",
            got=[server.name for server in made],
            cure="RateLimitedError says that nothing happened",
        )
        for outcome in together(calls):
            rig.know(outcome.get())
        made = rig.new_servers()
        expect(
            sorted(str(server.intent) for server in made) == sorted(str(one.intent) for one in requests),
            "intent",
            "after the storm there is not one server for each request",
            expected=f"{len(requests)} servers",
            got=f"{len(made)}",
            cure="send each request's own key",
        )

    @needs(FAULTS, COUNT)
    def test_a_throttled_call_is_not_repeated_at_once(self, rig: Rig) -> None:
        """Makes a hook that is throttled few calls, instead of hammering a cloud that asks for a pause?"""
        instance = rig.start()
        with rig.failing("throttle", _ALL):
            before = rig.cloud.calls()
            _error(lambda: rig.backend.get(instance.ref), "get-errors", "throttle", "dstack_get_instance")
            made = rig.cloud.calls() - before
        expect(
            made <= 5,
            "once",
            "dstack_get_instance: a throttled call is repeated by the backend",
            expected="one call, five at most",
            got=f"{made} calls",
            cure="switch the SDK's retries off: the engine repeats calls, with pauses that the cloud asked for",
        )

    # -- secrets ----------------------------------------------------------------------------------------------------

    @needs(SECRETS)
    def test_logs_hold_no_secret(self, rig: Rig, caplog: pytest.LogCaptureFixture) -> None:
        """Is nothing of the configuration's secrets in the logs, at their most talkative, through a whole life?"""
        caplog.set_level(logging.DEBUG)
        instance = rig.start()
        rig.backend.listed(rig.owner)
        rig.end(instance)
        shown = "\n".join(f"{record.getMessage()} {record.exc_text or ''}" for record in caplog.records)
        _no_secret(
            rig,
            shown,
            "the logs of dstack_create_instance and the other hooks hold a secret",
            "keep headers and configurations out of log messages",
        )

    @needs(SECRETS)
    def test_instances_and_offers_hold_no_secret(self, rig: Rig) -> None:
        """Is no secret in what the core stores: instances, references, and the data of offers?"""
        shown = f"{rig.start().model_dump_json()} {rig.backend.offers(Requirements())!r}"
        _no_secret(
            rig,
            shown,
            "what dstack_create_instance and dstack_list_offers return holds a secret",
            "what `data` needs is an id, not a credential",
        )

    # -- the configuration's check ----------------------------------------------------------------------------------

    @needs(CHECKS)
    def test_a_good_configuration_has_no_problems(self, rig: Rig) -> None:
        """Has the configuration that everything else here works with no problem?"""
        problems = rig.backend.check()
        expect(
            not problems or rig.info.existing_machines,
            "check-answer",
            "a configuration that works has problems",
            expected="[]",
            got=problems,
            cure="ask only for what is needed",
        )

    @needs(CHECKS, SECRETS)
    def test_wrong_credentials_are_found(self, rig: Rig) -> None:
        """Does the check find wrong credentials, as a sentence or as AuthenticationError, and do hooks say so?"""
        wrong = _with_wrong_secrets(rig)
        problems = _problems(wrong.check)
        expect(
            problems,
            "check",
            "credentials that are wrong pass the check",
            expected="a sentence, or AuthenticationError",
            got="no problem",
            cure="make a cheap call that needs the credentials",
        )
        error = _error(lambda: wrong.listed(rig.owner), "list-errors", "unauthorized", "dstack_list_instances")
        _expect_class(error, "unauthorized", "list-errors", "dstack_list_instances")

    @needs(CHECKS, FAULTS)
    @pytest.mark.parametrize("fault", ["unauthorized", "forbidden", "server error", "drop"])
    def test_the_check_reports_what_fails(self, rig: Rig, fault: str) -> None:
        """Does the check report a cloud that refuses or cannot be reached, instead of saying that all is well?"""
        with rig.failing(fault, _ALL):
            problems = _problems(rig.backend.check)
        expect(
            problems and all(len(problem) > 5 for problem in problems),
            "check-answer",
            f"with '{fault}' the check finds nothing",
            expected="a sentence for the problem, or one of the errors",
            got=problems,
            cure="return the cloud's words, or let the error out",
        )

    @needs(CHECKS, TRUTH)
    def test_the_check_changes_nothing(self, rig: Rig) -> None:
        """Is nothing made by the check?"""
        rig.backend.check()
        expect(
            not rig.new_servers(),
            "check-read",
            "the check of the configuration made something",
            expected="nothing",
            got=[server.name for server in rig.new_servers()],
            cure="read only",
        )


# -- helpers ----------------------------------------------------------------------------------------------------------


def _error(call: Callable[[], object], clause: str, fault: str, hook: str) -> BackendError:
    """The error that a call raises; fails if it answers instead."""
    __tracebackhide__ = True
    try:
        answer = call()
    except BackendError as error:
        return error
    return fail(
        clause,
        f"{hook}, when the cloud failed ({fault}), answered as if it had not",
        expected=_CLASSES[fault].__name__,
        got=f"the answer {answer!r:.120}",
        cure=_CURES[fault],
    )


def _expect_class(error: BackendError, fault: str, clause: str, hook: str) -> None:
    __tracebackhide__ = True
    expect(
        isinstance(error, _CLASSES[fault]),
        clause,
        f"{hook}, when the cloud failed ({fault}), raised another class, which asks the engine for something else",
        expected=_CLASSES[fault].__name__,
        got=f"{type(error).__name__}: {error}",
        cure=_CURES[fault],
    )


def _expect_words(error: BackendError, failure: Failure, fault: str, hook: str) -> None:
    __tracebackhide__ = True
    expect(
        error.message.strip() and failure.words in error.message,
        "words",
        f"the message of {hook} ({fault}) does not have the cloud's own words",
        expected=f"… {failure.words!r} …",
        got=repr(error.message),
        cure="take the message out of the cloud's answer, and put the cure after it",
    )


def _expect_scope(error: BackendError, failure: Failure) -> None:
    __tracebackhide__ = True
    if failure.scope is not None and isinstance(error, NoCapacityError | QuotaExceededError):
        expect(
            error.scope == failure.scope,
            "capacity-scope" if isinstance(error, NoCapacityError) else "quota-scope",
            "the scope is another one than the cloud's",
            expected=failure.scope,
            got=error.scope,
            cure="too narrow, and the next offer fails the same way; too wide, and good offers are passed over",
        )


def _expect_wait(error: BackendError, failure: Failure, hook: str) -> None:
    __tracebackhide__ = True
    if failure.retry_after is not None and isinstance(error, NoCapacityError | RateLimitedError):
        expect(
            error.retry_after == failure.retry_after,
            "limited-after" if isinstance(error, RateLimitedError) else "capacity-after",
            f"{hook}: the waiting time that the cloud asked for is lost",
            expected=f"retry_after={failure.retry_after:g}",
            got=f"retry_after={error.retry_after}",
            cure="read Retry-After, in seconds, and pass it on",
        )


def _expect_no_secret(rig: Rig, error: BaseException, hook: str) -> None:
    __tracebackhide__ = True
    seen: list[BaseException] = []
    while error not in seen:
        seen.append(error)
        error = error.__cause__ or error.__context__ or error
    shown = " ".join(f"{one} {one!r}" for one in seen)
    _no_secret(
        rig, shown, f"an error of {hook} holds a secret", "build messages from the cloud's answer, not from the request"
    )


def _no_secret(rig: Rig, text: str, what: str, cure: str) -> None:
    __tracebackhide__ = True
    expect(
        not any(secret in text for secret in rig.secrets),
        "no-secret",
        what,
        expected="no secret of the configuration",
        got="one of them (not repeated here)",
        cure=cure,
    )


def _with_wrong_secrets(rig: Rig) -> Any:
    return rig.another(rig.info.config.model_validate(_spoilt(rig.cloud.config(), set(rig.secrets))))


def _spoilt(value: Any, secrets: set[str]) -> Any:
    """The same, with other secrets, however deep."""
    if isinstance(value, dict):
        return {key: _spoilt(inner, secrets) for key, inner in value.items()}
    if isinstance(value, (list, tuple)):
        return [_spoilt(inner, secrets) for inner in value]
    return "wrong-0123456789" if isinstance(value, str) and value in secrets else value


def _problems(check: Callable[[], Sequence[str]]) -> list[str]:
    """What a check finds; an error is a problem."""
    outcome = Outcome(check)
    try:
        return list(outcome.get())
    except BackendError as error:
        return [str(error)]


assert set(_CLASSES) == {fault.value for fault in Fault}  # noqa: S101  # a fault without a class would be no case
