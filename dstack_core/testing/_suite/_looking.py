"""Cases about looking: what is known of one instance, and the listing that nothing escapes."""

from __future__ import annotations

import contextlib
from uuid import uuid4

import pytest

from dstack_core.plugin import BackendError, InstanceRef, InstanceState, NoCapacityError, QuotaExceededError
from dstack_core.testing._suite._base import Base
from dstack_core.testing._suite._calls import together
from dstack_core.testing._suite._creating import first_listed, one_in_each_region
from dstack_core.testing._suite._messages import expect
from dstack_core.testing._suite._needs import FAULTS, LAG, MARKED, STOCK, TO_ORDER, TRUTH, UNMARK, needs
from dstack_core.testing._suite._rig import Rig

MANY = 200
_SOME = 12
STRANGE = {
    "a plausible id": "no-such-instance-0123456789",
    "a UUID": "00000000-0000-4000-8000-000000000000",
    "odd characters": "no such/../instance?x=1&y#z",
}


def unknown(rig: Rig, id: str) -> InstanceRef:
    """A reference to nothing."""
    offer = rig.offer
    return InstanceRef(backend=rig.name, id=id, region=offer.region, zone=offer.zone)


class LookCases(Base):
    """What is asked about is found, by any process; what is listed is complete, and ours alone."""

    def test_get_agrees_with_create(self, rig: Rig) -> None:
        """Has what dstack_get_instance returns the id, intent, owner and time that creation returned?"""
        made = rig.start()
        known = rig.backend.get(made.ref)
        had = known and (known.ref.id, known.intent, known.owner, known.ref.region)
        expect(
            had == (made.ref.id, made.intent, made.owner, made.ref.region),
            "get",
            "get and create disagree",
            expected=(made.ref.id, made.intent, made.owner, made.ref.region),
            got=had,
            cure="describe a server by one function, wherever it comes from",
        )

    def test_a_stored_reference_is_enough(self, rig: Rig) -> None:
        """Does another process that has only the stored reference find the instance?"""
        made = rig.start()
        ref = InstanceRef.model_validate_json(made.ref.model_dump_json())
        known = rig.another().get(ref)
        expect(
            known is not None and known.intent == made.intent,
            "ref",
            "another object of the backend does not find the instance",
            expected=made.ref.id,
            got=known,
            cure="keep nothing about instances in the object: what finds one again goes into `ref`",
        )

    @pytest.mark.parametrize("id", STRANGE)
    def test_get_of_the_unknown_is_none(self, rig: Rig, id: str) -> None:
        """Is `None` the answer for an instance that never was, whatever its id looks like?"""
        known = rig.backend.get(unknown(rig, STRANGE[id]))
        expect(
            known is None,
            "get-none",
            "an instance that never was is described",
            expected="None",
            got=known,
            cure="turn the cloud's 404 into None, and quote the id where it becomes part of an address",
        )

    @needs(UNMARK, TRUTH)
    def test_lost_tags_are_no_end(self, rig: Rig) -> None:
        """Is an instance whose tags somebody removed still there for whoever asks for it by its id?"""
        made = rig.running(rig.start())
        rig.cloud.unmark(made.ref.id)
        known: object = None
        try:
            known = rig.backend.get(made.ref)
        except Exception as error:  # noqa: BLE001  # whatever it is, nobody takes it for an end
            known = error
        over = known is None or getattr(known, "state", None) is InstanceState.TERMINATED
        rig.end_unmarked(made)
        expect(
            not over,
            "get-unmarked",
            "an instance that runs without its tags is taken for gone, and nobody would end it",
            expected="UnknownOutcomeError, or the instance",
            got=known,
            cure="answer None only where the cloud does not know the id; where it does, read the tags after that",
        )

    def test_get_again_and_again_changes_nothing(self, rig: Rig) -> None:
        """Do ten questions at once about one instance get one answer?"""
        made = rig.start()
        answers = [outcome.get() for outcome in together([lambda: rig.backend.get(made.ref)] * 10)]
        expect(
            all(one is not None and one.ref.id == made.ref.id and one.intent == made.intent for one in answers),
            "threads",
            "dstack_get_instance: threads that ask about one instance get different answers",
            expected=f"{made.ref.id} ten times",
            got=[one and one.ref.id for one in answers],
            cure="keep nothing of one call in the object",
        )

    # -- listing ----------------------------------------------------------------------------------------------------

    @needs(MARKED)
    def test_a_new_instance_is_listed_in_time(self, rig: Rig) -> None:
        """Does a new instance appear in the listing within `visibility_window`?"""
        first_listed(rig, rig.start())

    @needs(MARKED)
    def test_list_agrees_with_get(self, rig: Rig) -> None:
        """Has what is listed the id, intent, owner, place and time that dstack_get_instance says?"""
        made = rig.start()
        listed, known = first_listed(rig, made), rig.backend.get(made.ref)
        facts = [one and (one.ref.id, one.intent, one.owner, one.ref.region, one.created_at) for one in (listed, known)]
        expect(
            facts[0] == facts[1],
            "list",
            "list and get disagree",
            expected=facts[1],
            got=facts[0],
            cure="describe a server by one function, wherever it comes from",
        )

    @needs(MARKED)
    def test_a_listed_reference_is_as_good_as_a_created_one(self, rig: Rig) -> None:
        """Can an instance be looked at and ended by the reference from a listing alone?"""
        listed = first_listed(rig, rig.start())
        known = rig.another().get(listed.ref)
        expect(
            known is not None and known.intent == listed.intent,
            "ref",
            "a reference from a listing does not find its instance",
            expected=listed.ref.id,
            got=known,
            cure="fill in all of `ref` in a listing, too: this is how an orphan is ended",
        )
        rig.end(listed)

    def test_the_listing_of_a_new_owner_is_empty(self, rig: Rig) -> None:
        """Is there nothing for an owner that never made anything?"""
        rig.start()
        found = rig.backend.listed(uuid4())
        expect(
            not found,
            "list-others",
            "an owner that made nothing has instances",
            expected="[]",
            got=[one.ref.id for one in found],
            cure="filter by the owner's tag",
        )

    @needs(MARKED)
    def test_other_owners_are_left_out(self, rig: Rig) -> None:
        """Has each of two owners its own instances in its listing, and only those?"""
        ours, theirs = rig.start(), rig.start(owner=uuid4())
        first_listed(rig, ours)
        for owner, own in ((ours.owner, ours), (theirs.owner, theirs)):
            found = {one.ref.id for one in rig.backend.listed(owner)}
            expect(
                found <= {own.ref.id},
                "list-others",
                "the listing has instances of another owner",
                expected=own.ref.id,
                got=sorted(found),
                cure="filter by the owner's tag, not by `managed-by`",
            )

    @needs(MARKED, STOCK)
    def test_servers_of_others_do_no_harm(self, rig: Rig) -> None:
        """Is the listing right in an account with servers that others made, with odd tags or none?"""
        rig.cloud.stock(60)
        made = rig.start()
        found = [one.ref.id for one in rig.backend.listed(rig.owner)]
        expect(
            found == [made.ref.id],
            "list-others",
            "servers of other people are in the listing, or hide ours",
            expected=made.ref.id,
            got=found,
            cure="filter by the owner's tag; pass over servers whose tags cannot be read",
        )

    @needs(MARKED)
    def test_many_instances_are_listed_all(self, rig: Rig) -> None:
        """Are 200 instances in all regions listed, each once, or 12 where machines exist already?"""
        count = _SOME if rig.info.existing_machines else MANY
        rig.afford(count)
        places = list(one_in_each_region(rig)) or [rig.offer]
        requests = [rig.request(places[number % len(places)]) for number in range(count)]
        rig.expect_to_end(*requests)
        try:
            made = {rig.create(request).ref.id for request in requests}
        except (NoCapacityError, QuotaExceededError) as refusal:
            pytest.skip(f"the account cannot have {count} instances: {refusal}")

        found: list[str] = []

        def complete() -> bool:
            found[:] = [
                one.ref.id for one in rig.backend.listed(rig.owner) if one.state is not InstanceState.TERMINATED
            ]
            return len(found) >= len(made)

        rig.until(
            lambda: complete() or len(found) > len(made),
            "list",
            f"of {count} instances the listing does not show all",
            expected=f"{len(made)} instances, of {len(places)} regions",
            cure="follow the pages to the last one, in each region",
        )
        expect(
            sorted(found) == sorted(made),
            "list",
            f"the listing of {count} instances is not that of the instances",
            expected=f"each of the {len(made)} once",
            got=f"{len(found)} entries, {len(set(found))} different ones",
            cure="follow the pages to the last one, in each region, and add none twice",
        )

    @needs(MARKED, TO_ORDER)
    def test_every_region_is_listed(self, rig: Rig) -> None:
        """Does the listing show an instance in each region where something is offered?"""
        made = {rig.start(offer).ref.id for offer in one_in_each_region(rig)}
        rig.until(
            lambda: {one.ref.id for one in rig.backend.listed(rig.owner)} >= made,
            "list",
            "instances of some regions are not listed",
            expected=f"{len(made)} instances, one in each region",
            cure="list every region that the cloud has, one after the other, if one call covers one region",
        )

    @needs(MARKED, TO_ORDER)
    def test_a_region_that_is_no_longer_configured_is_listed(self, rig: Rig) -> None:
        """Is an instance still listed after its region was taken out of the configuration?"""
        if "regions" not in rig.info.config.model_fields:
            pytest.skip("the configuration has no field `regions`")
        offers = list(one_in_each_region(rig))
        made = {rig.start(offer).ref.id for offer in offers}
        narrow = rig.config.model_copy(update={"regions": (offers[0].region,)})
        backend = rig.another(narrow)
        rig.until(
            lambda: {one.ref.id for one in backend.listed(rig.owner)} >= made,
            "list",
            "instances in a region that is no longer configured are not listed, so nobody would find and end them",
            expected=f"{len(made)} instances",
            cure="let `regions` limit the offers, and list in all regions of the cloud",
        )

    @needs(MARKED, LAG)
    def test_an_instance_that_is_not_listed_yet_is_known(self, rig: Rig) -> None:
        """Is an instance found by its reference while the listing lags?"""
        rig.cloud.lag(3600)
        made = rig.start()
        known = rig.backend.get(made.ref)
        rig.cloud.lag(0)
        expect(
            known is not None,
            "get",
            "an instance is not found while the listing lags",
            expected=made.ref.id,
            got="None",
            cure="ask for the instance itself, and do not look for it in a listing",
        )

    @needs(MARKED, FAULTS, TO_ORDER)
    @pytest.mark.parametrize("fault", ["server error", "throttle", "drop", "forbidden"])
    def test_a_partial_listing_is_no_listing(self, rig: Rig, fault: str) -> None:
        """Does a listing whose later pages or regions fail raise, instead of returning the first ones?"""
        made = {rig.start(offer).ref.id for offer in one_in_each_region(rig)}
        for skip in (1, 2, 3):
            with rig.failing(fault, 1000, skip=skip):
                try:
                    found = {one.ref.id for one in rig.backend.listed(rig.owner)}
                except BackendError:
                    continue
            expect(
                found == made,
                "list-partial",
                f"after {skip} calls that went well, '{fault}' made the listing shorter instead of raising",
                expected=f"an error, or all {len(made)} instances",
                got=f"{len(found)} instances",
                cure="let the error out of the loop over pages and regions: what a listing lacks counts as gone",
            )

    @needs(MARKED, FAULTS)
    def test_a_listing_that_failed_is_whole_the_next_time(self, rig: Rig) -> None:
        """Is the listing complete again, as soon as the cloud answers?"""
        made = rig.start()
        with rig.failing("server error", 1000), contextlib.suppress(BackendError):
            rig.backend.listed(rig.owner)
        found = [one.ref.id for one in rig.backend.listed(rig.owner)]
        expect(
            found == [made.ref.id],
            "list-errors",
            "after an error the listing is not complete",
            expected=made.ref.id,
            got=found,
            cure="keep nothing of a failed call",
        )
