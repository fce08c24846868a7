"""Whose turn it is: the highest priority first, and among equals whoever was served least.

The engine takes rows of its jobs in this order, and the service's dispatcher hands out models so.
"""

import time
from collections.abc import Callable
from typing import Generic, TypeVar

K = TypeVar("K")

AGEING_SECONDS = 10.0
"""A member gains one priority for every so many seconds without a turn, so that nobody waits for ever."""


class FairQueue(Generic[K]):
    """Members that take turns; `served` counts what a turn was worth.

    A member that joins counts as served as much as the least served of its priority, so it neither waits for
    the others to catch up nor makes them wait for what it missed.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._priority: dict[K, int] = {}
        self._served: dict[K, float] = {}
        self._since: dict[K, float] = {}

    def __len__(self) -> int:
        return len(self._priority)

    def __contains__(self, member: K) -> bool:
        return member in self._priority

    def join(self, member: K, priority: int) -> None:
        """Add a member; nothing happens if it is there."""
        if member not in self._priority:
            peers = [self._served[m] for m, p in self._priority.items() if p == priority]
            self._priority[member] = priority
            self._served[member] = min(peers, default=0.0)
            self._since[member] = self._clock()

    def leave(self, member: K) -> None:
        """Remove a member, if it is there."""
        for known in (self._priority, self._served, self._since):
            known.pop(member, None)

    def served(self, member: K, amount: float) -> None:
        """Count what a member was given."""
        if member in self._served:
            self._served[member] += amount
            self._since[member] = self._clock()

    def order(self, eligible: Callable[[K], bool] = lambda member: True) -> list[K]:
        """The eligible members, whose turn it is first."""
        now = self._clock()
        members = [m for m in self._priority if eligible(m)]
        return sorted(members, key=lambda m: (-self._aged(m, now), self._served[m]))

    def shares(self, first: K, eligible: Callable[[K], bool]) -> list[K]:
        """The eligible members of `first`'s priority, whose turn it is first: they share what there is."""
        now = self._clock()
        priority = self._aged(first, now)
        return [m for m in self.order(eligible) if self._aged(m, now) == priority]

    def _aged(self, member: K, now: float) -> int:
        return self._priority[member] + int((now - self._since[member]) / AGEING_SECONDS)
