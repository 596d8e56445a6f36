"""Many who ask, few requests: with one request a second, what several want to know is asked for once."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Generic, TypeVar

T = TypeVar("T")


@dataclass(frozen=True)
class Outcome(Generic[T]):
    """What came of a call.

    Attributes:
        value: the answer, if there is one.
        error: what was raised instead.
    """

    value: T | None = None
    error: BaseException | None = None

    @classmethod
    def of(cls, call: Callable[[], T]) -> Outcome[T]:
        """Makes the call."""
        try:
            return cls(call())
        except BaseException as error:  # noqa: BLE001  # whoever waits for it gets it
            return cls(error=error)

    def get(self) -> T:
        """The answer.

        Raises:
            BaseException: the error of the call.
        """
        if self.error is not None:
            raise self.error
        return self.value  # type: ignore[return-value]  # there is no error, so it is the answer


class Shared(Generic[T]):
    """A question that many ask. Everybody gets an answer that was asked for after they came, or not long before.

    Args:
        ask: the question.
        fresh: seconds for which an answer will do for those who come later.
        clock: seconds, from any beginning.
    """

    def __init__(self, ask: Callable[[], T], fresh: float, clock: Callable[[], float] = time.monotonic) -> None:
        self._ask = ask
        self._fresh = fresh
        self._clock = clock
        self._changed = threading.Condition()
        self._began = 0
        self._ended = 0
        self._last: Outcome[T] = Outcome(error=LookupError("nobody has asked yet"))
        self._at = float("-inf")

    def now(self) -> T:
        """An answer that was asked for from now on."""
        with self._changed:
            wanted = self._began + 1
            while self._ended < wanted:
                if self._began == self._ended:
                    self._began += 1
                    break
                self._changed.wait()
            else:
                return self._last.get()
        at, outcome = self._clock(), Outcome.of(self._ask)
        with self._changed:
            self._last, self._at, self._ended = outcome, at, self._began
            self._changed.notify_all()
        return outcome.get()

    def lately(self) -> T:
        """An answer, perhaps one that is a little older."""
        with self._changed:
            if self._last.error is None and self._clock() - self._at < self._fresh:
                return self._last.get()
        return self.now()

    def forget(self) -> None:
        """What was answered so far is not true any more."""
        with self._changed:
            self._at = float("-inf")


class _Ticket:
    def __init__(self, wish: str) -> None:
        self.wish = wish
        self.outcome: Outcome[None] | None = None


class Gathered:
    """Wishes that are granted together: those that come while a call is under way go into the next one.

    Args:
        grant: grants some of them, and says what came of each.
    """

    def __init__(self, grant: Callable[[Sequence[str]], Sequence[Outcome[None]]]) -> None:
        self._grant = grant
        self._changed = threading.Condition()
        self._waiting: list[_Ticket] = []
        self._busy = False

    def wish(self, wish: str) -> None:
        """Returns when it was granted, and raises if it was not."""
        ticket = _Ticket(wish)
        with self._changed:
            self._waiting.append(ticket)
            while self._busy and ticket.outcome is None:
                self._changed.wait()
            if ticket.outcome is not None:
                return ticket.outcome.get()
            self._busy = True
            batch, self._waiting = self._waiting, []
        self._serve(batch)
        assert ticket.outcome is not None  # noqa: S101  # for type checkers: it was in the batch
        return ticket.outcome.get()

    def _serve(self, batch: list[_Ticket]) -> None:
        try:
            outcomes = self._grant(list(dict.fromkeys(ticket.wish for ticket in batch)))
            by_wish = dict(zip(dict.fromkeys(ticket.wish for ticket in batch), outcomes, strict=True))
        except BaseException as error:  # noqa: BLE001  # whoever waits for it gets it
            by_wish = {ticket.wish: Outcome(error=error) for ticket in batch}
        with self._changed:
            for ticket in batch:
                ticket.outcome = by_wish[ticket.wish]
            self._busy = False
            self._changed.notify_all()
