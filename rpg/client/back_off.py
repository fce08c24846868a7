"""How long to wait before a call is tried again."""

import logging
import random
import time
from dataclasses import dataclass

from rpg.client.errors import CallError

_log = logging.getLogger("rpg.client")


@dataclass(frozen=True)
class Patience:
    """How a call that failed for now is tried again: waits that double, each cut by up to half at random.

    All are seconds.
    """

    first: float = 0.5
    largest: float = 10.0
    total: float = 60.0
    """Counted from the first failure; a call that cannot be tried again within it is given up."""


class BackOff:
    """The waits of one call."""

    def __init__(self, patience: Patience) -> None:
        self._patience = patience
        self._next = patience.first
        self._failing_since: float | None = None

    def seconds(self, error: CallError) -> float:
        """How long to wait after `error`.

        Raises:
            CallError: the error itself, if it is not temporary or patience is at its end.
        """
        if not error.is_temporary:
            raise error
        now = time.monotonic()
        is_first = self._failing_since is None
        since = now if self._failing_since is None else self._failing_since
        self._failing_since = since
        wait = self._next * random.uniform(0.5, 1.0)
        self._next = min(2 * self._next, self._patience.largest)
        if error.retry_after is not None:
            # The wait is never shorter than asked, and a little longer so that not all callers come at once.
            wait = error.retry_after + 0.1 * wait
        if now + wait - since > self._patience.total:
            raise error
        if is_first:
            # Without a word, whoever sits before a terminal would think that the command hangs.
            _log.warning("%s; trying again for up to %.0f s", error, self._patience.total)
        return wait

    def reset(self) -> None:
        """Count the next failure as the first one, since something was achieved."""
        self._next = self._patience.first
        self._failing_since = None
