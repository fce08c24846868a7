"""Threads that do things in order in each lane, and side by side in different ones."""

import signal
import threading
import time
from functools import partial

import pytest

from rpg.sampling.lanes import Lanes


def test_a_lane_keeps_its_order() -> None:
    done: dict[int, list[int]] = {0: [], 1: [], 2: []}
    with Lanes(3, waiting=5) as lanes:
        for group in range(20):
            lanes.do((lane, partial(done[lane].append, group)) for lane in done)
    assert list(done.values()) == [list(range(20))] * 3


def test_lanes_work_side_by_side() -> None:
    together = threading.Barrier(4, timeout=20)
    with Lanes(4, waiting=1) as lanes:
        lanes.do((lane, lambda: together.wait() and None) for lane in range(4))


def test_numbers_beyond_the_lanes_share_them() -> None:
    threads = {}

    def note(number: int) -> None:
        threads[number] = threading.current_thread().name

    with Lanes(2, waiting=1) as lanes:
        lanes.do((number, partial(note, number)) for number in range(6))
    assert threads[0] == threads[2] == threads[4] != threads[1] == threads[3] == threads[5]


def test_whoever_asks_for_more_than_may_wait_waits() -> None:
    go = threading.Event()
    asked = []

    def ask() -> None:
        with Lanes(2, waiting=2) as lanes:
            for group in range(4):
                lanes.do([(group, lambda: go.wait(20) and None)])
                asked.append(group)

    thread = threading.Thread(target=ask)
    thread.start()
    time.sleep(0.3)
    assert asked == [0, 1]
    go.set()
    thread.join(20)
    assert asked == [0, 1, 2, 3]


def test_after_a_failure_nothing_more_is_done_in_any_lane() -> None:
    done: list[str] = []
    failed = threading.Event()

    def fail() -> None:
        failed.set()
        raise ValueError("the disk is full")

    with pytest.raises(ValueError, match="the disk is full"), Lanes(2, waiting=10) as lanes:
        lanes.do([(0, fail)])
        failed.wait(20)
        time.sleep(0.1)
        lanes.do([(1, lambda: done.append("more"))])
        lanes.do([(0, lambda: done.append("and more"))])
    assert not done


def test_an_error_in_the_block_is_what_is_raised() -> None:
    began, go = threading.Event(), threading.Event()
    done: list[str] = []

    def slow() -> None:
        began.set()
        go.wait(20)
        done.append("what had begun")

    with pytest.raises(KeyError), Lanes(1, waiting=10) as lanes:
        lanes.do([(0, slow), (0, lambda: done.append("the next"))])
        began.wait(20)
        threading.Timer(0.2, go.set).start()
        raise KeyError
    assert done == ["what had begun"]


def test_an_interrupt_at_the_end_leaves_no_lane_at_work() -> None:
    go = threading.Event()
    done: list[str] = []

    def slow() -> None:
        go.wait(20)
        done.append("what had begun")

    with pytest.raises(KeyboardInterrupt), Lanes(2, waiting=10) as lanes:
        lanes.do([(0, slow), (0, lambda: done.append("the next"))])
        # To this thread: another's signal does not end its waiting.
        here = threading.get_ident()
        threading.Timer(0.3, signal.pthread_kill, [here, signal.SIGINT]).start()
        threading.Timer(0.6, go.set).start()
    assert done == ["what had begun"]
