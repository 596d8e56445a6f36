"""What an author reads when a case fails: what was expected, what came, what the contract says, what to do."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NoReturn

from dstack_core.testing._suite._contract import CONTRACT

_HOOKS = {
    "BackendInfo": "dstack_register_backends",
    "BackendConfig": "dstack_register_backends",
    "Offer": "dstack_list_offers",
    "MachineResources": "dstack_list_offers",
    "Gpu": "dstack_list_offers",
    "InstanceRequest": "dstack_create_instance",
    "NoCapacityError": "dstack_create_instance",
    "QuotaExceededError": "dstack_create_instance",
    "Instance": "dstack_get_instance",
    "InstanceRef": "dstack_get_instance",
    "InstanceState": "dstack_get_instance",
}
"""The hook that an author looks at first, for the sentences that stand at a class."""


@dataclass(frozen=True)
class Clause:
    """A sentence of the contract.

    Attributes:
        where: the hook or class in whose docstring it stands.
        text: the sentence, word for word.
    """

    where: str
    text: str


def clause(key: str) -> Clause:
    """The sentence with this key."""
    return Clause(*CONTRACT[key])


def fail(key: str, what: str, *, expected: object, got: object, cure: str) -> NoReturn:
    """Fails the case.

    Args:
        key: which sentence of the contract is broken; names the hook, too.
        what: what is wrong, in one sentence.
        expected: what should have come.
        got: what came.
        cure: what the author may have to do.
    """
    __tracebackhide__ = True
    raise AssertionError(message(key, what, expected=expected, got=got, cure=cure))


def message(key: str, what: str, *, expected: object, got: object, cure: str) -> str:
    """What is read. It begins with the hook, unless `what` names it already."""
    said = clause(key)
    lines = (
        what if "dstack_" in what else f"{_HOOKS.get(said.where, said.where)}: {what}",
        f"  expected: {expected}",
        f"  got:      {got}",
        f'  contract: "{said.text}" ({said.where})',
        f"  to do:    {cure}",
    )
    return "\n".join(lines)


def expect(holds: object, key: str, what: str, *, expected: object, got: object, cure: str) -> None:
    """Fails the case unless `holds`. See `fail`."""
    __tracebackhide__ = True
    if not holds:
        fail(key, what, expected=expected, got=got, cure=cure)
