"""Cases about the end, and about what happens to an instance by itself."""

from __future__ import annotations

import contextlib
from functools import partial

import pytest

from dstack_core.plugin import BackendError, Endpoint, Instance, InstanceState, StateReason
from dstack_core.testing._clouds import Event
from dstack_core.testing._suite._base import Base
from dstack_core.testing._suite._calls import together
from dstack_core.testing._suite._looking import STRANGE, unknown
from dstack_core.testing._suite._messages import expect, fail
from dstack_core.testing._suite._needs import BOOT, CONNECTS, EVENTS, FAULTS, TRUTH, needs
from dstack_core.testing._suite._rig import Rig

_OVER = (InstanceState.STOPPING, InstanceState.TERMINATED)
_REASONS = {
    Event.STOPPED: None,
    Event.SPOT_INTERRUPTION: StateReason.SPOT_INTERRUPTION,
    Event.SHUTDOWN_FROM_INSIDE: StateReason.SHUTDOWN_FROM_INSIDE,
    Event.FAILURE: StateReason.FAILURE,
}
_NO_ERROR = "turn the cloud's 404, and its 'is being deleted already', into success"


class EndCases(Base):
    """Ending is idempotent, takes everything along, and touches nothing else."""

    def test_terminate_ends_the_instance(self, rig: Rig) -> None:
        """Is an instance gone, some time after it was terminated?"""
        rig.end(rig.running(rig.start()))

    @needs(TRUTH)
    def test_terminate_ends_the_bill(self, rig: Rig) -> None:
        """Is the server no longer billed, once the backend says that it is gone?"""
        instance = rig.start()
        rig.end(instance)
        billed = [server.id for server in rig.new_servers() if server.billed]
        expect(
            not billed,
            "terminated",
            "the backend says TERMINATED while the cloud still bills",
            expected="TERMINATED only when nothing is billed any more",
            got=f"still billed: {', '.join(billed)}",
            cure="delete the server, do not stop it; and what is stopped or deallocated is STOPPING",
        )

    @needs(TRUTH)
    def test_terminate_takes_everything_along(self, rig: Rig) -> None:
        """Are the disks, addresses and interfaces gone with the server?"""
        rig.end(rig.running(rig.start()))
        left = rig.cloud.truth().leftovers
        expect(
            not left,
            "end",
            "something that was made for the instance outlives it",
            expected="nothing",
            got="; ".join(left),
            cure="delete it in dstack_terminate_instance, or create it so that the cloud deletes it with the server",
        )

    def test_terminate_ten_times_is_fine(self, rig: Rig) -> None:
        """Is terminating again, before and after the end, success?"""
        instance = rig.start()
        for _ in range(5):
            rig.backend.terminate(instance.ref)
        rig.end(instance)
        for _ in range(5):
            _terminate(rig, instance, "an instance that was terminated before")

    def test_terminate_ten_times_at_once_is_fine(self, rig: Rig) -> None:
        """Is terminating ten times at once, from two objects, success?"""
        instance = rig.running(rig.start())
        backends = [rig.backend, rig.another()] * 5
        outcomes = together([partial(one.terminate, instance.ref) for one in backends])
        errors = [repr(outcome.error) for outcome in outcomes if outcome.error is not None]
        expect(
            not errors,
            "end-again",
            "of ten calls at once some failed",
            expected="no error",
            got=errors,
            cure=_NO_ERROR,
        )
        rig.end(instance)

    @pytest.mark.parametrize("id", STRANGE)
    def test_terminate_of_the_unknown_is_fine(self, rig: Rig, id: str) -> None:
        """Is terminating what never was success, whatever its id looks like?"""
        try:
            rig.backend.terminate(unknown(rig, STRANGE[id]))
        except BackendError as error:
            fail(
                "end-again",
                "terminating an instance that the cloud does not know failed",
                expected="no error",
                got=f"{type(error).__name__}: {error}",
                cure=_NO_ERROR,
            )

    @needs(BOOT)
    def test_terminate_while_pending_ends_it(self, rig: Rig) -> None:
        """Can an instance be ended before it runs?"""
        rig.cloud.boot(3600)
        instance = rig.start()
        expect(
            rig.state(instance.ref) is InstanceState.PENDING,
            "pending",
            "a machine that takes an hour to boot is not pending",
            expected="PENDING",
            got=rig.state(instance.ref),
            cure="map what the cloud calls starting, provisioning or building to PENDING",
        )
        rig.end(instance)

    def test_terminate_by_another_process(self, rig: Rig) -> None:
        """Can another process end an instance, by its reference alone?"""
        instance = rig.start()
        rig.another().terminate(instance.ref)
        rig.until(
            lambda: rig.state(instance.ref) is InstanceState.TERMINATED,
            "ref",
            "another object of the backend could not end the instance",
            expected="TERMINATED or None",
            cure="keep nothing about instances in the object",
        )

    def test_terminate_leaves_the_others_alone(self, rig: Rig) -> None:
        """Does ending one instance leave another one of the same owner running?"""
        first, second = rig.start(), rig.start()
        rig.end(first)
        expect(
            rig.state(second.ref) not in _OVER,
            "end",
            "ending one instance ended another one",
            expected=f"{second.ref.id} goes on",
            got=rig.state(second.ref),
            cure="delete by the instance's id, never by the owner's tag",
        )

    def test_what_was_terminated_does_not_come_back(self, rig: Rig) -> None:
        """Is an instance that is gone never pending or running again, in get and list?"""
        instance = rig.start()
        rig.end(instance)
        states = {rig.state(instance.ref)} | {one.state for one in rig.backend.listed(rig.owner)}
        expect(
            states <= set(_OVER),
            "terminated",
            "an instance that was gone is alive again",
            expected="TERMINATED, or no such instance",
            got=sorted(state.value for state in states),
            cure="map each of the cloud's states of the end",
        )

    def test_the_reason_of_a_requested_end(self, rig: Rig) -> None:
        """Is the reason REQUESTED, or not known, when somebody asked for the end?"""
        instance = rig.start()
        rig.end(instance)
        known = rig.backend.get(instance.ref)
        expect(
            known is None or known.reason in (None, StateReason.REQUESTED),
            "instance-reason",
            "the reason of an end that was asked for is another one",
            expected="REQUESTED, or None",
            got=known and known.reason,
            cure="give a reason only where the cloud tells",
        )

    @needs(FAULTS, TRUTH)
    @pytest.mark.parametrize("fault", ["drop", "server error"])
    def test_terminate_again_after_a_lost_answer(self, rig: Rig, fault: str) -> None:
        """Does a termination whose answer was lost end well when it is asked for again, with nothing left?"""
        instance = rig.running(rig.start())
        with rig.failing(fault, 20, after=True), contextlib.suppress(BackendError):
            rig.backend.terminate(instance.ref)
        _terminate(rig, instance, "an instance whose end was under way")
        rig.end(instance)
        left = rig.cloud.truth().leftovers
        expect(
            not left,
            "end",
            "after a termination that had to be repeated something is left",
            expected="nothing",
            got="; ".join(left),
            cure="let each call do all that is to be done, whether the server is there or not",
        )


class StateCases(Base):
    """States are what the cloud says, in the core's words."""

    @needs(BOOT)
    def test_pending_becomes_running(self, rig: Rig) -> None:
        """Is an instance PENDING until it runs, and RUNNING then?"""
        rig.cloud.boot(3600)
        instance = rig.start()
        first = rig.state(instance.ref)
        rig.cloud.boot(0)
        rig.running(instance)
        expect(
            first is InstanceState.PENDING is instance.state,
            "pending",
            "an instance that does not run yet is not pending",
            expected="PENDING, from create and from get",
            got=f"{instance.state.value} and {first.value}",
            cure="map what the cloud calls starting, provisioning or building to PENDING",
        )

    def test_a_running_instance_can_be_reached(self, rig: Rig) -> None:
        """Has a running instance an endpoint, or does dstack_connect give one, with exactly one way in it?"""
        instance = rig.running(rig.start())

        def endpoint() -> Endpoint | None:
            known = rig.backend.get(instance.ref)
            return (known.endpoint or rig.backend.connect(known)) if known else None

        found = rig.until(
            endpoint,
            "instance-endpoint",
            "a running instance cannot be reached",
            expected="an Endpoint in `endpoint`, or from dstack_connect",
            cure="fill in `endpoint` as soon as the cloud shows an address",
        )
        expect(
            (found.unix_socket is None) != (found.ssh_host is None),
            "instance-endpoint",
            "the endpoint has not exactly one way in",
            expected="either unix_socket or ssh_host",
            got=found,
            cure="write Endpoint(ssh_host=…, ssh_port=…, ssh_user=…)",
        )

    @needs(CONNECTS)
    def test_connecting_twice_is_the_same(self, rig: Rig) -> None:
        """Gives dstack_connect the same endpoint when it is called again?"""
        instance = rig.running(rig.start())
        first, second = rig.backend.connect(instance), rig.backend.connect(instance)
        expect(
            first == second,
            "connect-again",
            "connecting again gives another endpoint",
            expected=first,
            got=second,
            cure="return what was set up by the first call",
        )

    def test_terminate_shows(self, rig: Rig) -> None:
        """Is an instance on its way to the end STOPPING or TERMINATED, soon after it was terminated?"""
        instance = rig.running(rig.start())
        rig.backend.terminate(instance.ref)
        rig.until(
            lambda: rig.state(instance.ref) in _OVER,
            "stopping",
            "an instance that was terminated still counts as alive",
            expected="STOPPING or TERMINATED",
            cure="map what the cloud calls deleting or shutting down to STOPPING",
        )

    @needs(EVENTS)
    def test_stopped_is_not_terminated(self, rig: Rig) -> None:
        """Is a server that was switched off, and is still billed, STOPPING?"""
        known = _after(rig, Event.STOPPED)
        expect(
            known is not None and known.state is InstanceState.STOPPING,
            "stopped",
            "a server that is switched off and billed is taken for something else",
            expected="STOPPING, so that the engine terminates it",
            got=known and known.state,
            cure="map what the cloud calls stopped, deallocated or suspended to STOPPING; TERMINATED is final",
        )

    @needs(EVENTS)
    @pytest.mark.parametrize("event", ["spot interruption", "shutdown from inside", "failure"])
    def test_what_ended_by_itself_is_over(self, rig: Rig, event: str) -> None:
        """Is a server that ended without being asked STOPPING or TERMINATED, or unknown?"""
        known = _after(rig, Event(event))
        expect(
            known is None or known.state in _OVER,
            "instance-state",
            f"after {event}, the instance counts as alive",
            expected="STOPPING, TERMINATED, or None",
            got=known and known.state,
            cure="map every state that the cloud documents, and raise for one that is new",
        )

    @needs(EVENTS)
    @pytest.mark.parametrize("event", ["spot interruption", "shutdown from inside", "failure"])
    def test_the_reason_is_the_right_one(self, rig: Rig, event: str) -> None:
        """Is the reason of an end the one that the cloud tells, or left open?"""
        known = _after(rig, Event(event))
        expect(
            known is None or known.reason in (None, _REASONS[Event(event)]),
            "instance-reason",
            f"after {event}, the reason is a wrong one",
            expected=f"{_REASONS[Event(event)]}, or None",
            got=known and known.reason,
            cure="retries depend on it: give a reason only where the cloud tells",
        )

    @needs(EVENTS, TRUTH)
    @pytest.mark.parametrize("event", ["stopped", "spot interruption", "shutdown from inside", "failure"])
    def test_terminate_after_an_end_leaves_nothing(self, rig: Rig, event: str) -> None:
        """Can what stopped or ended by itself be terminated, and is nothing left then?"""
        instance = rig.running(rig.start())
        rig.cloud.befall(instance.ref.id, Event(event))
        _terminate(rig, instance, f"an instance after {event}")
        rig.end(instance)
        left = [*(server.id for server in rig.new_servers() if server.billed), *rig.cloud.truth().leftovers]
        expect(
            not left,
            "end",
            f"after {event} and a termination, something is left that costs money",
            expected="nothing",
            got=left,
            cure="delete what is only stopped, and what is left of what ended by itself",
        )


def _terminate(rig: Rig, instance: Instance, what: str) -> None:
    __tracebackhide__ = True
    try:
        rig.backend.terminate(instance.ref)
    except BackendError as error:
        fail(
            "end-again",
            f"terminating {what} failed",
            expected="no error",
            got=f"{type(error).__name__}: {error}",
            cure=_NO_ERROR,
        )


def _after(rig: Rig, event: Event) -> Instance | None:
    __tracebackhide__ = True
    instance = rig.running(rig.start())
    rig.cloud.befall(instance.ref.id, event)
    return rig.backend.get(instance.ref)
