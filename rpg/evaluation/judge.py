"""Accuracy and similarity of single networks, measured against the collection of their generator."""

import threading
from collections import OrderedDict
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from rpg.collection.collection import Collection
from rpg.evaluation.similarity import BoolArray, wrong_iou
from rpg.tasks.families import family_of, task_family

_REMEMBERED = 1024
"""Number of conditions for which the originals' answers are kept; an answer takes a byte an image."""


@dataclass(frozen=True)
class Judgement:
    """The measurements of one network.

    Attributes:
        accuracy: share of right answers on the task family's test images, 0…1.
        similarity: largest intersection over union of its wrong answers with those of an original of its
            condition, 0…1 (`rpg.evaluation.similarity`); None where the collection has no such original.
    """

    accuracy: float
    similarity: float | None


class Judge:
    """Judges networks of a collection's architecture by the task family that the collection names.

    Threads may share one.
    """

    def __init__(self, collection: Collection, images: str = "", device: torch.device | None = None) -> None:
        """Prepare to judge; the originals of a condition are read when they are first needed.

        Args:
            collection: what the networks' generator learned from.
            images: where the task family's images lie (`rpg.tasks.families.task_family`).
            device: where networks run, for families that use GPUs; None: the CPU.

        Raises:
            RPGError: if the collection names no task family, its conditions are not such a family's, or the
                images are not there.
        """
        self._family = task_family(family_of(collection), images, device)
        self._family.check_images()
        self._collection = collection
        self._lock = threading.Lock()
        self._originals: OrderedDict[tuple[float, ...], BoolArray] = OrderedDict()

    def judge(self, network: dict[str, Tensor], condition: list[float]) -> Judgement:
        """Judge a network that was made for `condition`.

        Raises:
            RPGError: if an original cannot be read.
        """
        wrong = self._wrong([network], condition)
        originals = self._wrong_of_originals(tuple(condition))
        similarity = float(wrong_iou(wrong, originals).max()) if len(originals) else None
        return Judgement(1 - float(wrong.mean()), similarity)

    def _wrong_of_originals(self, condition: tuple[float, ...]) -> BoolArray:
        with self._lock:
            if condition not in self._originals:
                entries = [e for e in self._collection.entries if tuple(e.condition or ()) == condition]
                networks = [self._collection.read_checked(entry) for entry in entries]
                self._originals[condition] = self._wrong(networks, list(condition))
                if len(self._originals) > _REMEMBERED:
                    self._originals.popitem(last=False)
            self._originals.move_to_end(condition)
            return self._originals[condition]

    def _wrong(self, networks: list[dict[str, Tensor]], condition: list[float]) -> BoolArray:
        right = self._family.labels([condition], "test")
        plain = [
            {name: value.float() if value.is_floating_point() else value for name, value in each.items()}
            for each in networks
        ]
        wrong: BoolArray = np.asarray((self._family.predict(plain, "test") != right).numpy(), dtype=np.bool_)
        return wrong
