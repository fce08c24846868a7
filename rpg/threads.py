"""Threads: how many PyTorch uses, so that results do not depend on it, and their priority."""

import os
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress

import torch


@contextmanager
def one_thread() -> Iterator[None]:
    """Run a block's CPU operations on one thread."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def lower_priority() -> None:
    """Give the calling thread the lowest priority, where threads have one of their own."""
    if sys.platform == "linux":
        with suppress(OSError):
            os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), 19)
