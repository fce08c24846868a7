"""Whose turn it is: priorities, shares, and nobody waits for ever."""

from rpg.sampling.fair_queue import FairQueue


class TestFairQueue:
    def test_the_least_served_is_next(self) -> None:
        queue: FairQueue[str] = FairQueue()
        for name in "abc":
            queue.join(name, 0)
        queue.served("a", 5)
        queue.served("b", 2)
        assert queue.order() == ["c", "b", "a"]
        assert queue.order(lambda name: name != "c") == ["b", "a"]

    def test_who_joins_late_neither_waits_nor_catches_up(self) -> None:
        queue: FairQueue[str] = FairQueue()
        queue.join("old", 0)
        queue.served("old", 1000)
        queue.join("new", 0)
        queue.served("new", 1)
        assert queue.order() == ["old", "new"]

    def test_nobody_waits_for_ever(self) -> None:
        """One priority for every ten seconds without a turn: 5 below is 50 seconds at most, then once."""
        now = 0.0
        queue: FairQueue[str] = FairQueue(lambda: now)
        queue.join("low", -5)
        queue.join("high", 0)
        turns = []
        for second in range(130):
            now = float(second)
            turns.append(queue.order()[0])
            queue.served(turns[-1], 1)
        assert [i for i, turn in enumerate(turns) if turn == "low"] == [50, 100]

    def test_priority_goes_before_all(self) -> None:
        queue: FairQueue[str] = FairQueue()
        queue.join("low", -1)
        queue.join("high", 1)
        queue.join("higher", 1)
        queue.served("high", 1e9)
        assert queue.order() == ["higher", "high", "low"]
        assert queue.shares("high", lambda name: True) == ["higher", "high"]
        queue.leave("high")
        assert "high" not in queue and len(queue) == 2
