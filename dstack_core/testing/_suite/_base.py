"""What all cases share: the fixtures, and the one way to set a case aside."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from difflib import get_close_matches
from importlib.metadata import EntryPoint
from pathlib import Path
from typing import Any, ClassVar

import pytest

from dstack_core.testing import _loading
from dstack_core.testing._clouds import Account, Cloud
from dstack_core.testing._suite import _money
from dstack_core.testing._suite._needs import missing
from dstack_core.testing._suite._owners import Owners
from dstack_core.testing._suite._rig import Rig


class Base:
    """See `BackendSuite`."""

    backend: ClassVar[str] = ""
    aside: ClassVar[Mapping[str, str]] = {}

    def __init_subclass__(cls, **options: Any) -> None:
        super().__init_subclass__(**options)
        for name, reason in cls.aside.items():
            _check_aside(cls, name, reason)
        for name in cls.__dict__:
            if name.startswith("test_") and any(hasattr(base, name) for base in cls.__bases__):
                _check_replaced(cls, name)

    @classmethod
    def entry_point(cls) -> EntryPoint:
        """The entry point that brings the backend: that of the installed package."""
        if not cls.backend:
            pytest.fail(
                f'{cls.__name__} does not say which backend it tests: write `backend = "yourname"`', pytrace=False
            )
        try:
            return _loading.find(cls.backend)
        except _loading.NotFound as problem:
            pytest.fail(str(problem), pytrace=False)

    def live(self) -> Mapping[str, Any]:
        """The configuration for a live account, without `type`. Used with `DSTACK_LIVE=1`, instead of `cloud`."""
        pytest.fail(
            f"{_money.LIVE}=1, but {type(self).__name__} has no method `live` that returns the configuration of a live "
            "account, as: def live(self): return {'token': os.environ['YOUR_TOKEN']}",
            pytrace=False,
        )

    @pytest.fixture
    def cloud(self) -> Cloud:
        """The cloud under test. Each author has one of their own."""
        pytest.fail(
            f"{type(self).__name__} has no fixture `cloud`: write one that yields the cloud under test, as "
            "NimbusServer() or Account({...})",
            pytrace=False,
        )

    @pytest.fixture
    def rig(self, request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Rig]:
        """The case's workplace. Afterwards everything that the case made is ended, also after Ctrl+C."""
        _set_aside(request, self.aside)
        meter = _meter() if _money.is_live() else None
        cloud = Account(self.live()) if meter is not None else request.getfixturevalue("cloud")
        folder: Path = tmp_path_factory.getbasetemp()
        rig = Rig(self.entry_point(), self.backend, cloud, folder, meter)
        try:
            reason = missing(getattr(request, "function", None), rig)
            if reason is not None:
                pytest.skip(reason)
            _check_paid(rig)
            owners = Owners(request.config, self.backend) if meter is not None else None
            if owners is not None:
                owners.note(rig)
            yield rig
        finally:
            rig.close()
        if owners is not None:
            owners.forget()


def _meter() -> _money.Meter:
    try:
        return _money.meter()
    except ValueError as problem:
        pytest.fail(str(problem), pytrace=False)


def _check_paid(rig: Rig) -> None:
    """An account that costs money is used only by somebody who said so."""
    if rig.meter is None and isinstance(rig.cloud, Account) and rig.offer.price > 0:
        pytest.fail(
            f"The cheapest offer of this account costs ${rig.offer.price:g} an hour. To spend money, define the method "
            f"`live` and set {_money.LIVE}=1 and {_money.CAP} (in USD).",
            pytrace=False,
        )


def _set_aside(request: pytest.FixtureRequest, aside: Mapping[str, str]) -> None:
    name = request.node.name
    reason = aside.get(name) or aside.get(name.partition("[")[0])
    if reason:
        request.node.add_marker(pytest.mark.xfail(reason=reason, strict=True))


def _check_aside(cls: type, name: str, reason: object) -> None:
    if not hasattr(cls, name.partition("[")[0]):
        near = get_close_matches(name, [one for one in dir(cls) if one.startswith("test_")], n=1)
        hint = f" Did you mean '{near[0]}'?" if near else ""
        raise TypeError(f"{cls.__name__}.aside names '{name}', and there is no such case.{hint}")
    if not isinstance(reason, str) or len(reason.strip()) < 3:
        raise TypeError(f"{cls.__name__}.aside sets '{name}' aside without a reason: say why, in words")


def _check_replaced(cls: type, name: str) -> None:
    """A case may be replaced only by one that is expected to fail, with the reason."""
    marks = getattr(getattr(cls, name), "pytestmark", [])
    if not any(mark.name == "xfail" and mark.kwargs.get("reason") for mark in marks):
        raise TypeError(
            f"{cls.__name__} replaces the case '{name}' of BackendSuite. If it cannot pass, set it aside and say why: "
            f'aside = {{"{name}": "reason"}}'
        )
