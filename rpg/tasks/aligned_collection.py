"""A collection whose networks have their hidden units in the order of its first training checkpoint's."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import PurePosixPath
from typing import Any

import torch
from torch import Tensor, nn

from rpg.collection.alignment import aligned
from rpg.collection.checkpoint import write_checkpoint
from rpg.collection.collection import Collection, Entry
from rpg.collection.permutation_groups import PermutationGroup, permutation_groups
from rpg.errors import RPGError
from rpg.seeds import derived_seed
from rpg.storage.directories import replacing_directory
from rpg.storage.files import replacing_file, sha256
from rpg.storage.locations import AnyPath
from rpg.tasks.families import calling, load_family
from rpg.tasks.predictions import load_network
from rpg.text_encoder import ENCODER_DIRECTORY, copy_encoder

_SAMPLES = 4
_LARGEST_ERROR = 1e-3


@dataclass(frozen=True)
class Alignment:
    """What `align_collection` did.

    Attributes:
        checkpoints: how many were aligned.
        groups: of axes, whose units were permuted.
        reference: file of the checkpoint that the others were aligned to.
        distance_before: mean euclidean distance of the parameters to those of the reference.
        distance_after: the same of the aligned checkpoints.
    """

    checkpoints: int
    groups: list[PermutationGroup]
    reference: str
    distance_before: float
    distance_after: float


def align_collection(
    collection: Collection,
    out: AnyPath,
    family: str,
    images: str = "",
    progress: Callable[[int, int], None] | None = None,
) -> Alignment:
    """Write the checkpoints of a collection to another, where their units are in the order of the first's.

    What each network computes stays the same, which is checked on training data.

    Args:
        collection: whose checkpoints are files of one network of the family.
        out: directory or URI of the new collection; an existing directory is replaced.
        family: the task family, as the setting `tasks` names it; it has `batch`.
        images: directory or URI of images, for families that take some.
        progress: called with (checkpoints done, checkpoints in all).

    Raises:
        RPGError: if the network cannot be followed or has no hidden units whose order is free, if a
            checkpoint is not of this network, or if a file cannot be read or written.
    """
    report = progress or (lambda done, asked: None)
    names, example = _names(collection), _Example(family, images)
    groups = permutation_groups(example.network, example.run)
    if not groups:
        raise RPGError(f"{family}: no hidden units were found whose order is free")
    parameters = [name for name, _ in example.network.named_parameters()]
    first = (collection.splits["train"] or collection.entries)[0]
    reference = collection.read_checked(first)
    entries: list[Entry] = []
    before = after = 0.0
    with replacing_directory(out) as directory:
        for index, (entry, name) in enumerate(zip(collection.entries, names, strict=True)):
            report(index, len(names))
            original = collection.read_checked(entry)
            try:
                found = aligned(original, reference, groups, parameters, derived_seed(0, "alignment", index))
            except RPGError as error:
                raise RPGError(f"{collection.path(entry)}: {error}") from error
            answers, others = example.answers(original), example.answers(found)
            difference = float((answers - others).abs().max() / answers.abs().max().clamp(min=1e-12))
            if not difference < _LARGEST_ERROR:
                raise RPGError(
                    f"{collection.path(entry)}: answers otherwise when its units move, by {difference:.2g}"
                )
            before += _distance(original, reference, parameters)
            after += _distance(found, reference, parameters)
            with replacing_file(directory / name) as temporary:
                write_checkpoint(temporary, found, {"format": "pt"})
                digest = sha256(temporary)
            entries.append(replace(entry, file=name, sha256=digest))
        if collection.encoder is not None:
            copy_encoder(collection.encoder_directory, directory / ENCODER_DIRECTORY)
        Collection(directory, collection.architecture, entries, collection.encoder).save()
    report(len(names), len(names))
    return Alignment(len(names), groups, first.file, before / len(names), after / len(names))


class _Example:
    """A family's network, and training data that it is run on."""

    def __init__(self, name: str, images: str) -> None:
        self._name = name
        self._family = load_family(name, images)
        if not callable(getattr(self._family, "batch", None)):
            raise RPGError(f"tasks: '{name}' has no method batch, whose data its network could be run on")
        with calling(name, "build_network"):
            self.network: nn.Module = self._family.build_network().eval()
        with calling(name, "batch"):
            self._batch = self._family.batch(_SAMPLES, torch.Generator().manual_seed(0))

    def run(self, network: nn.Module) -> Any:
        """What a network answers."""
        with calling(self._name, "outputs"):
            if callable(getattr(self._family, "outputs", None)):
                return self._family.outputs(network, self._batch)
            return network(self._batch[0])

    @torch.no_grad()
    def answers(self, state_dict: Mapping[str, Tensor]) -> Tensor:
        """What the network with these weights answers."""
        load_network(self._family, self._name, self.network, dict(state_dict))
        answers: Tensor = self.run(self.network)
        return answers.float()


def _names(collection: Collection) -> list[str]:
    """The files of the new collection, by entry."""
    names = []
    for entry in collection.entries:
        if collection.path(entry).is_dir():
            raise RPGError(
                f"{collection.path(entry)}: a directory; only checkpoints that are files can be aligned"
            )
        names.append(str(PurePosixPath(entry.file).with_suffix(".safetensors")))
    if len(set(names)) < len(names):
        raise RPGError(
            f"{collection.root}: files that differ in the ends of their names alone cannot be aligned"
        )
    return names


def _distance(one: Mapping[str, Tensor], other: Mapping[str, Tensor], names: Sequence[str]) -> float:
    squares = [(one[name].float() - other[name].float()).square().sum() for name in names]
    return float(torch.stack(squares).sum().sqrt())
