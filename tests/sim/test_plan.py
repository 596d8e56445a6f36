"""Plans: what a history may have in store."""

from __future__ import annotations

import random

from tests.sim.plan import Plan


def test_no_plan_has_what_nobody_can_mend() -> None:
    """Steering a seed does not bring together what no system could survive: seeds 536, 1065 and 2600 had such plans."""
    for seed in range(2700):
        plan = Plan.draw(random.Random(f"{seed} plan"))
        assert not (plan.idempotency == "tags" and plan.hook_twice), seed
        assert plan.vanish is None or not (plan.restore or plan.hook_twice), seed
