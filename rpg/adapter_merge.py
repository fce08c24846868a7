"""Merging a LoRA adapter into the weights of its base: W + scale · B A, and DoRA's rescaling of that.

PEFT merges too, but into a network in memory, which needs the class that the base was saved from. Here
tensors are merged one by one, by their names in the files.
"""

import json
import math
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from rpg.errors import RPGError
from rpg.state_dicts import find_ties
from rpg.storage.files import is_number, read_json

_PREFIX = "base_model.model."
_PAIRS = {
    ".lora_A.weight": ".lora_B.weight",
    ".lora_embedding_A": ".lora_embedding_B",
}
"""The factor A and the factor B, by the ends of their names."""
_MAGNITUDES = (".lora_magnitude_vector", ".lora_magnitude_vector.weight")
_BIAS = ".lora_B.bias"
_KEEPS_BASE = (True, False, "gaussian", "orthogonal", "eva")
"""Values of `init_lora_weights` that leave the base's weights as they are. The others take a part of the base
into the adapter's first factors, and the base of such an adapter is no longer the one on the disk."""
_REFUSED = (
    "layer_replication",
    "target_parameters",
    "megatron_config",
    "use_qalora",
    "alora_invocation_tokens",
)
"""Keys that change what the factors mean."""

_WITH_OUTPUT_LAYER = ("ForCausalLM", "LMHeadModel", "ForMaskedLM", "ForConditionalGeneration")
"""How the names of Transformers' classes end that compute words from embeddings."""

Change = Callable[[Tensor], Tensor]
"""From a tensor of the base to the merged one, float32."""


@dataclass(frozen=True)
class _Scaling:
    alpha: float
    alphas: Sequence[tuple[re.Pattern[str], float]]
    uses_root: bool

    def of(self, module: str, rank: int) -> float:
        """The factor of a module's product, as PEFT computes it."""
        fits = (alpha for pattern, alpha in self.alphas if pattern.match(module))
        return next(fits, self.alpha) / (math.sqrt(rank) if self.uses_root else rank)


class AdapterMerge:
    """The weights of a base with an adapter merged into them.

    Attributes:
        tensors: dtype and shape of every merged tensor, by name: the base's, and modules that the adapter
            adds.
    """

    def __init__(
        self,
        base: Mapping[str, Tensor],
        adapter: Mapping[str, Tensor],
        config: Path,
        base_path: str,
        base_config: bytes = b"{}",
    ) -> None:
        """Find the base's tensor for every tensor of the adapter; nothing is computed yet.

        Args:
            base: the base's weights, by the names in its file.
            adapter: the adapter's, by the names in its file.
            config: the file `adapter_config.json`.
            base_path: what messages call the base.
            base_config: content of the base's `config.json`, where it has one.

        Raises:
            RPGError: naming the key of the configuration, or the tensor, that cannot be merged.
        """
        self._base = base
        self._base_path = base_path
        self._source = config.parent
        settings = _read_settings(config)
        self._transposed = bool(settings.get("fan_in_fan_out"))
        self._saved = tuple(settings["modules_to_save"])
        self._scaling = _Scaling(
            settings["lora_alpha"], settings["alpha_pattern"], bool(settings.get("use_rslora"))
        )
        self._ties = find_ties(base)
        self._base_config = base_config
        self._changes: dict[str, Change] = {}
        self._replaced: dict[str, Tensor] = {}
        self._added: dict[str, Tensor] = {}
        self._read(adapter)
        self.tensors = {
            name: (tensor.dtype, tuple(tensor.shape)) for name, tensor in {**base, **self._added}.items()
        }

    def __iter__(self) -> Iterator[tuple[str, Tensor]]:
        """Every tensor by name, computed when its turn comes, in the base's dtype."""
        for name, tensor in self._base.items():
            first = self._ties.get(name, name)
            value, change = self._replaced.get(first, tensor), self._changes.get(first)
            yield name, (value if change is None else change(value.float())).to(tensor.dtype)
        yield from self._added.items()

    def _read(self, adapter: Mapping[str, Tensor]) -> None:
        left = dict(adapter)
        for name in adapter:
            end = next((end for end in _PAIRS if name.endswith(end)), None)
            if end is None:
                continue
            module = name.removesuffix(end)
            a, b = left.pop(name), left.pop(module + _PAIRS[end], None)
            if b is None:
                raise RPGError(f"{self._source}: tensor '{module + _PAIRS[end]}' is missing beside '{name}'")
            magnitude = next((left.pop(module + key) for key in _MAGNITUDES if module + key in left), None)
            if a.ndim < 2 or b.ndim < 2 or a.shape[0] == 0:
                raise RPGError(
                    f"{self._source}: tensor '{name}': expected factors of shapes [r, in] and [out, r], "
                    f"found {list(a.shape)} and {list(b.shape)}"
                )
            own = module.removeprefix(_PREFIX)
            scale = self._scaling.of(own, a.shape[0])
            target = self._target(f"{own}.weight", name)
            by_columns = self._transposed or "embedding" in end
            self._check(a, b, by_columns, target, name)
            delta = partial(_product, a, b, scale, by_columns)
            outputs = self._base[target].shape[-1 if by_columns else 0]
            if magnitude is not None and magnitude.numel() != outputs:
                raise self._misfit(f"{module}{_MAGNITUDES[0]}", magnitude.shape, target)
            if "embedding" in end and self._is_tied(target):
                raise RPGError(
                    f"{self._base_path}: its output layer is tied to '{target}', which '{name}' of "
                    f"{self._source} changes alone; merged, both would change"
                )
            self._change(target, partial(_changed, delta, magnitude, by_columns), name)
            if (bias := left.pop(module + _BIAS, None)) is not None:
                self._change(self._target(f"{own}.bias", name), partial(_shifted, bias, scale), name)
        for name, tensor in left.items():
            self._replace(name, tensor)

    def _is_tied(self, embedding: str) -> bool:
        """Whether the network uses an embedding in its output layer as well, as far as the files tell."""
        if embedding in self._ties.values():
            return True
        try:
            config = json.loads(self._base_config)
            stated, classes = config.get("tie_word_embeddings"), config.get("architectures") or []
        except (ValueError, AttributeError, RecursionError):
            return False
        if stated is not None:
            return bool(stated)
        # Each class has a default of its own. A file without an output layer's weight says that it is tied.
        shape = self._base[embedding].shape
        has_output = any(
            name != embedding and tensor.shape == shape and tensor.ndim == 2
            for name, tensor in self._base.items()
        )
        return not has_output and any(str(each).endswith(_WITH_OUTPUT_LAYER) for each in classes)

    def _replace(self, name: str, tensor: Tensor) -> None:
        """Take over a tensor that the adapter has in place of the base's: a bias, or a saved module's."""
        # PEFT wraps a layer that has factors as well.
        own = name.removeprefix(_PREFIX).replace(".base_layer.", ".")
        if ".lora_" in own:
            raise RPGError(f"{self._source}: tensor '{name}': cannot be merged; expected factors A and B")
        is_saved = any(f".{module}." in f".{own}" for module in self._saved)
        if is_saved and not self._candidates(own):
            self._added[own] = tensor
            return
        target = self._target(own, name)
        if self._base[target].shape != tensor.shape:
            raise self._misfit(name, tensor.shape, target)
        self._replaced[target] = tensor

    def _candidates(self, name: str) -> list[str]:
        """Tensors of the base that `name` may mean: the classes of one network differ in a prefix."""
        if name in self._base:
            return [name]
        return [other for other in self._base if other.endswith(f".{name}") or name.endswith(f".{other}")]

    def _target(self, name: str, source: str) -> str:
        found = self._candidates(name)
        if len(found) != 1:
            said = f"has both '{found[0]}' and '{found[1]}'" if found else f"has no tensor '{name}'"
            raise RPGError(f"{self._base_path}: {said}, which '{source}' of {self._source} is to change")
        target = self._ties.get(found[0], found[0])
        if not self._base[target].is_floating_point():
            raise RPGError(
                f"{self._base_path}: tensor '{target}' is {self._base[target].dtype}; expected floating "
                "point, as quantised weights cannot be merged"
            )
        return target

    def _change(self, target: str, change: Change, source: str) -> None:
        if target in self._changes:
            raise RPGError(f"{self._source}: tensor '{source}': another one changes '{target}' already")
        self._changes[target] = change

    def _check(self, a: Tensor, b: Tensor, by_columns: bool, target: str, source: str) -> None:
        if b.flatten(1).shape[1] != a.shape[0]:
            raise RPGError(
                f"{self._source}: tensor '{source}': A and B do not fit: "
                f"their shapes are {list(a.shape)} and {list(b.shape)}"
            )
        like = self._base[target].shape
        found = (b.shape[0], a.flatten(1).shape[1])
        if len(like) > 2:
            found = (b.shape[0], *a.shape[1:])
        elif by_columns:
            found = found[::-1]
        if found != tuple(like):
            raise self._misfit(source, torch.Size(found), target)

    def _misfit(self, source: str, found: torch.Size, target: str) -> RPGError:
        return RPGError(
            f"{self._source}: tensor '{source}': expected a change of shape "
            f"{list(self._base[target].shape)}, as '{target}' of {self._base_path} has, found {list(found)}"
        )


def _product(a: Tensor, b: Tensor, scale: float, by_columns: bool, like: Tensor) -> Tensor:
    """scale · B A in the form of the weight `like`; of a convolution, A has the kernel and B is pointwise."""
    product: Tensor = scale * (b.float().flatten(1) @ a.float().flatten(1))
    if like.ndim > 2:
        return product.reshape(b.shape[0], *a.shape[1:])
    return product.T if by_columns else product


def _changed(
    delta: Callable[[Tensor], Tensor], magnitude: Tensor | None, by_columns: bool, weight: Tensor
) -> Tensor:
    """W + delta; with DoRA's magnitude m, m · (W + delta) / |W + delta| for each output."""
    merged = weight + delta(weight)
    if magnitude is None:
        return merged
    rows = merged.T if by_columns else merged
    norms = rows.flatten(1).norm(dim=1)
    rescaled: Tensor = rows * (magnitude.float().reshape(-1) / norms).reshape(-1, *[1] * (rows.ndim - 1))
    return rescaled.T if by_columns else rescaled


def _shifted(bias: Tensor, scale: float, weight: Tensor) -> Tensor:
    return weight + scale * bias.float()


def _read_settings(path: Path) -> dict[str, Any]:
    """A LoRA adapter's configuration, as far as it can be merged."""
    settings = read_json(path, "an adapter's configuration")
    if not isinstance(settings, dict) or settings.get("peft_type") != "LORA":
        kind = settings.get("peft_type") if isinstance(settings, dict) else None
        raise RPGError(f"{path}: peft_type: expected LORA, got {json.dumps(kind):.80}")
    alphas = settings.get("alpha_pattern") or {}
    if not isinstance(alphas, dict) or not all(
        map(is_number, [settings.get("lora_alpha"), *alphas.values()])
    ):
        raise RPGError(f"{path}: lora_alpha, alpha_pattern: expected finite numbers")
    try:
        patterns = [(re.compile(rf"(.*\.)?({key})$"), float(alpha)) for key, alpha in alphas.items()]
    except (re.error, RecursionError, OverflowError) as error:
        raise RPGError(f"{path}: alpha_pattern: not a regular expression: {error}") from error
    saved = settings.get("modules_to_save") or []
    if not (isinstance(saved, list) and all(isinstance(module, str) for module in saved)):
        raise RPGError(f"{path}: modules_to_save: expected a list of names, got {saved!r:.80}")
    if (init := settings.get("init_lora_weights", True)) not in _KEEPS_BASE:
        raise RPGError(
            f"{path}: init_lora_weights: '{init}' changes the base as well; expected an adapter that was "
            "converted to plain LoRA when it was saved"
        )
    for key in _REFUSED:
        if settings.get(key):
            raise RPGError(f"{path}: {key}: cannot be merged; expected an adapter without it")
    return {**settings, "alpha_pattern": patterns, "modules_to_save": saved}
