"""One network after another, each measured and compared with the originals of its condition."""

import threading
from collections import OrderedDict
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from torch import Tensor

from rpg.collection.collection import Collection
from rpg.errors import RPGError
from rpg.evaluation.judge import Candidate, Judge
from rpg.evaluation.similarity import BoolArray, wrong_iou
from rpg.tasks.families import Asked

_REMEMBERED = 1024
"""Number of conditions for which the originals' answers are kept; an answer takes a byte an input."""


@dataclass(frozen=True)
class Judgement:
    """The measurements of one network.

    Attributes:
        metrics: values by name on the judge's test data, the one that counts first.
        similarity: largest intersection over union of its wrong answers with those of an original of its
            condition, 0…1 (`rpg.evaluation.similarity`); None where the collection has no such original, or
            the judge looks at no answers.
    """

    metrics: Mapping[str, float]
    similarity: float | None


class SingleNetworkJudge:
    """Measures networks of a collection's architecture. Threads may share one."""

    def __init__(self, judge: Judge, collection: Collection | None) -> None:
        """Prepare to judge; the originals of a condition are read when they are first needed.

        Args:
            judge: measures networks.
            collection: what the networks' generator learned from; None: networks are compared with no
                originals.

        Raises:
            RPGError: if the judge's data are missing.
        """
        judge.check()
        self._judge = judge
        self._collection = collection
        self._lock = threading.Lock()
        self._originals: OrderedDict[tuple[float, ...] | None, list[BoolArray]] = OrderedDict()

    def judge(
        self,
        name: str,
        network: dict[str, Tensor],
        condition: list[float] | None,
        description: str | None = None,
    ) -> Judgement:
        """Judge a network that was made for `condition`, which the text `description` stands for, if it is
        given.

        Raises:
            RPGError: if the network cannot be measured, or an original cannot be read.
        """
        asked = condition if description is None else description
        [measured] = self._judge.measure([Candidate(name, network, asked)], "test")
        if measured.failure is not None:
            raise RPGError(measured.failure)
        if measured.wrong is None or self._collection is None:
            return Judgement(measured.metrics, None)
        with self._lock:
            originals = self._wrong_of_originals(condition, asked)
        similarity = float(wrong_iou(measured.wrong[None], np.stack(originals)).max()) if originals else None
        return Judgement(measured.metrics, similarity)

    def _wrong_of_originals(self, condition: list[float] | None, asked: Asked) -> list[BoolArray]:
        key = None if condition is None else tuple(condition)
        if key not in self._originals:
            collection = self._collection
            assert collection is not None
            entries = [entry for entry in collection.entries if entry.condition == condition]
            networks = [Candidate(e.file, collection.read_checked(e), asked) for e in entries]
            measured = self._judge.measure(networks, "test")
            self._originals[key] = [each.wrong for each in measured if each.wrong is not None]
            if len(self._originals) > _REMEMBERED:
                self._originals.popitem(last=False)
        self._originals.move_to_end(key)
        return self._originals[key]
