"""A state machine of Hypothesis: any sequence of calls and faults, held against a model of what must be."""

from __future__ import annotations

import contextlib
from typing import Any, ClassVar
from uuid import UUID

from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    Bundle,
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)

from dstack_core.plugin import BackendError, Instance, InstanceRequest, InstanceState
from dstack_core.testing._suite._base import Base
from dstack_core.testing._suite._messages import expect
from dstack_core.testing._suite._needs import FAULTS, LAG, MARKED, NATIVE, TRUTH, needs
from dstack_core.testing._suite._rig import Rig

_OVER = (InstanceState.STOPPING, InstanceState.TERMINATED)
_HARMLESS = ("throttle", "unauthorized", "server error", "drop", "no capacity", "quota")


class SequenceCases(Base):
    """Any sequence of calls, not only those that somebody thought of."""

    @needs(MARKED, NATIVE)
    def test_any_sequence_of_calls(self, rig: Rig) -> None:
        """Does every sequence of creating, repeating, looking, ending, lagging and failing keep what must hold?"""
        if rig.meter is not None:
            import pytest

            pytest.skip("makes dozens of instances: not in a live account")
        quick = FAULTS.met(rig)
        machine = type("Sequence", (_Sequence,), {"rig": rig})
        run_state_machine_as_test(
            machine,
            settings=settings(
                max_examples=12 if quick else 3,
                stateful_step_count=20 if quick else 8,
                deadline=None,
                database=None,
                suppress_health_check=list(HealthCheck),
            ),
        )


class _Sequence(RuleBasedStateMachine):
    """The model: which requests were made, and what is known of their instances.

    Attributes:
        ids: the instance of each intent that was ever answered.
        ended: intents whose end was asked for.
        unsure: intents that were asked for and never answered.
    """

    rig: ClassVar[Rig]
    requests: Any = Bundle("requests")

    def __init__(self) -> None:
        super().__init__()
        self.ids: dict[UUID, str] = {}
        self.known: dict[UUID, Instance] = {}
        self.ended: set[UUID] = set()
        self.unsure: set[UUID] = set()
        self.other: Any = None
        self.owner: UUID

    @initialize()
    def begin(self) -> None:
        """A new owner, to whom nothing belongs."""
        self.owner = self.rig.request().intent
        if TRUTH.met(self.rig):
            self.rig.forget_new_servers()

    @rule(target=requests, number=st.integers(0, 4))
    def ask_for_another(self, number: int) -> InstanceRequest:
        """A request for a new intent, which nobody has sent yet."""
        offers = self.rig.offers
        request: InstanceRequest = self.rig.request(offers[number % len(offers)], owner=self.owner)
        self.rig.expect_to_end(request)
        return request

    @rule(request=requests)
    def create(self, request: InstanceRequest) -> None:
        """Sent for the first time or again, after anything."""
        self._answered(request, self.rig.backend.create(request))

    @rule(request=requests)
    def create_from_elsewhere(self, request: InstanceRequest) -> None:
        """Sent by another process."""
        # The same one throughout: some SDKs take longer to set up than all the calls together.
        self.other = self.other or self.rig.another()
        self._answered(request, self.other.create(request))

    @precondition(lambda self: FAULTS.met(self.rig))
    @rule(request=requests, fault=st.sampled_from(_HARMLESS), times=st.integers(1, 3))
    def create_while_it_fails(self, request: InstanceRequest, fault: str, times: int) -> None:
        """The call fails before anything happened."""
        with self.rig.failing(fault, times), contextlib.suppress(BackendError):
            self._answered(request, self.rig.backend.create(request))

    @precondition(lambda self: FAULTS.met(self.rig))
    @rule(request=requests, fault=st.sampled_from(["drop", "server error"]))
    def create_and_lose_the_answer(self, request: InstanceRequest, fault: str) -> None:
        """The call is carried out, and the answer is lost."""
        self.unsure.add(request.intent)
        with self.rig.failing(fault, 20, after=True), contextlib.suppress(BackendError):
            self._answered(request, self.rig.backend.create(request))

    @precondition(lambda self: self.known)
    @rule(data=st.data())
    def get(self, data: st.DataObject) -> None:
        """What was answered is known."""
        intent = data.draw(st.sampled_from(sorted(self.known, key=str)))
        found = self.rig.backend.get(self.known[intent].ref)
        alive = found is not None and found.state not in _OVER
        expect(
            alive or intent in self.ended,
            "get",
            "an instance that nobody ended is not alive",
            expected=f"{self.ids[intent]}, pending or running",
            got=found and found.state,
            cure="look at what ended it",
        )

    @precondition(lambda self: self.known)
    @rule(data=st.data())
    def terminate(self, data: st.DataObject) -> None:
        """Once, or again."""
        intent = data.draw(st.sampled_from(sorted(self.known, key=str)))
        self.rig.backend.terminate(self.known[intent].ref)
        self.ended.add(intent)

    @precondition(lambda self: self.known and FAULTS.met(self.rig))
    @rule(data=st.data(), fault=st.sampled_from(["drop", "server error", "throttle"]), after=st.booleans())
    def terminate_while_it_fails(self, data: st.DataObject, fault: str, after: bool) -> None:
        """It may have been ended."""
        intent = data.draw(st.sampled_from(sorted(self.known, key=str)))
        with self.rig.failing(fault, 3, after=after and fault != "throttle"), contextlib.suppress(BackendError):
            self.rig.backend.terminate(self.known[intent].ref)
        self.ended.add(intent)

    @precondition(lambda self: LAG.met(self.rig))
    @rule(seconds=st.sampled_from([0.0, 3600.0]))
    def lag(self, seconds: float) -> None:
        """Listings lag, or do not."""
        self.rig.cloud.lag(seconds)

    @rule()
    def list(self) -> None:
        """Nothing is listed that was not asked for, and no intent twice."""
        found = [one for one in self.rig.backend.listed(self.owner) if one.state not in _OVER]
        intents = [one.intent for one in found]
        expect(
            len(intents) == len(set(intents)) and set(intents) <= self.ids.keys() | self.unsure,
            "list",
            "the listing has an intent twice, or one that nobody asked for",
            expected=f"some of {len(self.ids)} intents, each once",
            got=[str(one) for one in intents],
            cure="see the cases about creation and listing",
        )

    @invariant()
    def one_server_for_each_intent(self) -> None:
        """The cloud never has two servers of one intent, ended ones included."""
        if not TRUTH.met(self.rig):
            return
        intents = [server.intent for server in self.rig.new_servers() if server.owner == self.owner]
        expect(
            len(intents) == len(set(intents)) and set(intents) <= self.ids.keys() | self.unsure,
            "intent",
            "the cloud has more than one server of an intent, or one that nobody asked for",
            expected="one server for each intent",
            got=[str(one) for one in intents],
            cure="see the cases about creation",
        )

    def teardown(self) -> None:
        """Back to a cloud that works."""
        if LAG.met(self.rig):
            self.rig.cloud.lag(0)

    def _answered(self, request: InstanceRequest, instance: Instance) -> None:
        first = self.ids.setdefault(request.intent, instance.ref.id)
        self.known[request.intent] = instance
        self.rig.know(instance)
        expect(
            instance.ref.id == first,
            "create-once",
            "the same request was answered with another instance",
            expected=first,
            got=instance.ref.id,
            cure="see the cases about creation",
        )
