"""Whether the checkpoints of a folder are of one architecture, and what there is to say about them all."""

from collections.abc import Hashable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from rpg.collection.adapter import check_same_function, factor_pairs, product_distances
from rpg.collection.checkpoint import ExaminedCheckpoint, check_finite
from rpg.collection.quantised import check_not_quantised
from rpg.collection.wrappers import WRAPPERS, one_sided_prefix
from rpg.errors import RPGError
from rpg.state_dicts import check_structure, check_ties, find_ties
from rpg.storage.locations import AnyPath

_NO_WEIGHTS = (
    "position_ids",
    "token_type_ids",
    "num_batches_tracked",
    "inv_freq",
    "masked_bias",
    "attn_mask",
    "relative_position_index",
    "relative_coords_table",
    "total_ops",
    "total_params",
    "n_averaged",
)
"""Last parts of the names of buffers that networks compute or count, which some checkpoints lack."""
_EQUAL_FUNCTION = (
    "_name_or_path",
    "dtype",
    "dropout",
    "2label",
    "label2id",
    "use_cache",
    "transformers_version",
)
"""Parts of the keys of a model's configuration that change nothing of what it computes."""
_COMPARED = 16
"""Adapters, of different conditions, that others are compared with."""


@dataclass(frozen=True)
class _Reference:
    """The first good checkpoint, to which all others must be equal in structure."""

    file: str
    form: dict[str, tuple[tuple[int, ...], torch.dtype]]
    ties: dict[str, str]
    config: dict[str, Any] | None


class Uniformity:
    """Compares the checkpoints of a folder with the first good one, in order, and remembers what to tell."""

    def __init__(self) -> None:
        self._reference: _Reference | None = None
        self._adapters: dict[Hashable, tuple[str, dict[str, Tensor]]] = {}
        self._disagreement: tuple[float, float, str, str] | None = None
        self._total = 0
        self._unwrapped: dict[str, list[str]] = {}
        self._left_out: dict[str, list[str]] = {}
        self._configs: dict[str, str] = {}
        self.ignored: set[str] = set()
        """The patterns of `Reading.ignore` that were of use."""

    @property
    def wrappers(self) -> tuple[str, ...]:
        """The wrappers whose marks were removed from the names of any checkpoint."""
        return tuple(sorted(self._unwrapped))

    def add(self, examined: ExaminedCheckpoint, path: AnyPath, condition: Hashable) -> None:
        """Check a checkpoint; the first good one becomes the reference.

        Args:
            examined: the checkpoint, whose names are without wrappers.
            path: where it is, for messages.
            condition: what it is for; adapters are compared with others of their condition.

        Raises:
            RPGError: naming file and tensor or key, if it is quantised, not finite, or unlike the reference.
        """
        state_dict = examined.state_dict
        reference = self._reference
        # A pattern is of use even if the checkpoint is refused for another reason.
        self.ignored |= examined.ignored
        try:
            check_not_quantised(state_dict, examined.config)
            if reference is not None:
                _compare(examined, reference)
        except RPGError as error:
            raise RPGError(f"{path}: {error}") from error
        check_finite(state_dict, path)
        if reference is None:
            form = {name: (tuple(tensor.shape), tensor.dtype) for name, tensor in state_dict.items()}
            self._reference = _Reference(path.name, form, find_ties(state_dict), examined.config)
        self._remember(examined, path.name, condition)

    def notes(self) -> list[str]:
        """A line for everything that is true of the good checkpoints and that their user should know."""
        lines = [
            f"names without '{wrapper}.', which {WRAPPERS[wrapper]} had added{self._where(files)}"
            for wrapper, files in sorted(self._unwrapped.items())
        ]
        lines += [
            f"left out '{name}', which is no tensor{self._where(files)}"
            for name, files in self._left_out.items()
        ]
        lines += list(self._configs.values())
        if self._disagreement is not None:
            products, factors, file, other = self._disagreement
            lines.append(
                f"{file} and {other}: the factors of these adapters differ more ({factors:.2f}) than the "
                f"products B A ({products:.2f}; 0 is equal, 1.41 unrelated), so their mean says little; "
                "--canonical-factors makes them comparable"
            )
        return lines

    def _remember(self, examined: ExaminedCheckpoint, file: str, condition: Hashable) -> None:
        self._total += 1
        for wrapper in examined.wrappers:
            self._unwrapped.setdefault(wrapper, []).append(file)
        for name in examined.left_out:
            self._left_out.setdefault(name, []).append(file)
        assert self._reference is not None
        expected = self._reference.config or {}
        if "peft_type" not in expected:
            self._compare_models(examined.config or expected, expected, file)
        if not factor_pairs(examined.state_dict):
            return
        if condition in self._adapters:
            other, state_dict = self._adapters[condition]
            products, factors = product_distances(examined.state_dict, state_dict)
            worst = self._disagreement
            if products < factors / 2 and factors > 0.3 and (worst is None or factors > worst[1]):
                self._disagreement = (products, factors, file, other)
        elif len(self._adapters) < _COMPARED:
            self._adapters[condition] = (file, examined.state_dict)

    def _compare_models(self, config: Mapping[str, Any], expected: Mapping[str, Any], file: str) -> None:
        assert self._reference is not None
        for key in sorted({*config, *expected}):
            is_known = any(part in key for part in _EQUAL_FUNCTION)
            if config.get(key) != expected.get(key) and not is_known and key not in self._configs:
                self._configs[key] = (
                    f"config.json: '{key}' is {config.get(key)!r:.60} in {file} and "
                    f"{expected.get(key)!r:.60} in {self._reference.file}; generated networks get the latter"
                )

    def _where(self, files: list[str]) -> str:
        if len(files) == self._total:
            return ""
        rest = len(files) - 1
        more = f" and {rest} other{'s' if rest > 1 else ''}" if rest else " only"
        return f", in {files[0]}{more} of {self._total}"


def _compare(examined: ExaminedCheckpoint, reference: _Reference) -> None:
    state_dict, config = examined.state_dict, examined.config
    try:
        if state_dict.keys() != reference.form.keys():
            _explain_names(state_dict, reference)
        check_structure(state_dict, reference.form)
        check_ties(state_dict, reference.ties.items())
        if config is not None and reference.config is not None and "peft_type" in reference.config:
            check_same_function(config, reference.config)
    except RPGError as error:
        raise RPGError(f"{error} (as in {reference.file})") from error


def _explain_names(state_dict: Mapping[str, Tensor], reference: _Reference) -> None:
    """Refuse names that differ from the reference's in a way that can be told.

    Raises:
        RPGError: saying which prefix only one of them has, or which buffers may be left out.
    """
    if prefix := one_sided_prefix(state_dict.keys(), reference.form.keys()):
        raise RPGError(f"every name begins with '{prefix}'; expected the names without it")
    if prefix := one_sided_prefix(reference.form.keys(), state_dict.keys()):
        raise RPGError(f"no name begins with '{prefix}'; expected it before every name")
    differing = sorted(state_dict.keys() ^ reference.form.keys())
    endings = {name.rpartition(".")[2] for name in differing}
    if endings <= set(_NO_WEIGHTS):
        says = "is missing" if differing[0] in reference.form else "is unexpected"
        options = " ".join(f"--ignore '*{ending}'" for ending in sorted(endings))
        raise RPGError(f"tensor '{differing[0]}' {says}; it is no weight: {options} leaves it out of all")
