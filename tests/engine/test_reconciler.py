"""The loop's own bookkeeping of leases; what it does for runs is tested with the whole engine."""

from __future__ import annotations

import asyncio
from functools import partial

import pytest

from dstack_core._engine.reconciler import Reconciler, _Work
from dstack_core._store.store import Store
from tests.support.bench import Bench
from tests.support.cloud import ScriptedCloud

pytestmark = pytest.mark.anyio


@pytest.fixture
def bench(store: Store) -> Bench:
    """A handler, a store and a scripted cloud."""
    return Bench(store, ScriptedCloud())


async def test_renewal_leaves_alone_what_was_given_back_meanwhile(bench: Bench) -> None:
    """A row that its worker gives back while the renewal is on its way is nobody's, and can be taken at once."""
    intent = await bench.intend()
    lease = await bench.take()
    assert lease is not None
    task = asyncio.current_task()
    assert task is not None
    work = _Work(lease, task)
    while await bench.handler.advance(lease, work.woken):
        pass
    reconciler = Reconciler(bench.seams, bench.store, "server 1", {"instance": bench.handler})
    await bench.store.transact(partial(reconciler._renew, working=[work]))
    assert (await bench.row(intent)).lease_until is None
