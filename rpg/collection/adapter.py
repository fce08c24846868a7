"""LoRA adapters: which may share a collection, and the canonical factors of what they add to a network.

An adapter adds (alpha / r) B A to a weight. B A stays the same if B is multiplied by any invertible M, and A
by its inverse. So equal adapters may have unequal factors, and the mean of factors means nothing.
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from rpg.errors import RPGError

_PAIRS = (("lora_A", "lora_B"), ("lora_embedding_A", "lora_embedding_B"), ("lora_down", "lora_up"))
"""Parts of the names of A [r, in, ...] and B [out, r, ...]: PEFT's of layers and embeddings, kohya's."""
_EQUAL_FUNCTION = frozenset(
    {
        "arrow_config",
        "auto_mapping",
        "corda_config",
        "ensure_weight_tying",
        "eva_config",
        "inference_mode",
        "init_lora_weights",
        "loftq_config",
        "lora_dropout",
        "lora_ga_config",
        "megatron_config",
        "megatron_core",
        "peft_version",
        "qalora_group_size",
        "runtime_config",
        "task_type",
    }
)
"""Keys of an adapter's configuration that change how it is trained or loaded, but not what it computes."""


def check_same_function(config: Mapping[str, Any], expected: Mapping[str, Any]) -> None:
    """Check that adapters with these configurations do the same with equal weights.

    Raises:
        RPGError: naming the key whose value differs: the scale, the rank, the layers, the base model.
    """
    for key in sorted({*config, *expected} - _EQUAL_FUNCTION):
        found, wanted = _normalised(config.get(key)), _normalised(expected.get(key))
        if found != wanted:
            hint = ": another scale" if key in ("lora_alpha", "alpha_pattern", "use_rslora") else ""
            raise RPGError(f"{key}: expected {wanted!r:.80}, found {found!r:.80}{hint}")


def factor_pairs(state_dict: Mapping[str, Tensor]) -> list[tuple[str, str]]:
    """The names of A and B of every layer that a LoRA adapter changes."""
    found = []
    for name in state_dict:
        parts = name.split(".")
        for a, b in _PAIRS:
            if a in parts:
                other = ".".join(b if part == a else part for part in parts)
                if other in state_dict:
                    found.append((name, other))
    return found


def canonical_factors(
    state_dict: Mapping[str, Tensor], config: Mapping[str, Any] | None
) -> dict[str, Tensor]:
    """The adapter with factors that depend on the products B A alone: B = U √S and A = √S Vᵀ.

    U S Vᵀ is the singular value decomposition of B A, largest values first. The sign of each column of U is
    such that its largest entry is positive. Shapes, dtypes and other tensors stay.

    Raises:
        RPGError: if there are no factors, or a layer's do not fit each other.
    """
    if config is not None and config.get("target_parameters"):
        raise RPGError("target_parameters: canonical factors are not defined for stacks of factors")
    pairs = factor_pairs(state_dict)
    if not pairs:
        raise RPGError("canonical factors need tensors lora_A and lora_B; found none")
    result = dict(state_dict)
    for name_a, name_b in pairs:
        a, b = _matrices(state_dict, name_a, name_b)
        # A decomposition of the r×r core is cheap, and as exact as one of the product itself.
        q_b, r_b = torch.linalg.qr(b)
        q_a, r_a = torch.linalg.qr(a.T)
        u, s, vt = torch.linalg.svd(r_b @ r_a.T, full_matrices=False)
        left, right = q_b @ u, vt @ q_a.T
        largest = left.abs().argmax(dim=0, keepdim=True)
        sign = torch.where(left.gather(0, largest) < 0, -1.0, 1.0)
        root = s.sqrt()
        pad = a.shape[0] - len(root)
        new_b = torch.nn.functional.pad(left * sign * root, (0, pad))
        new_a = torch.nn.functional.pad(right * sign.T * root[:, None], (0, 0, 0, pad))
        for name, values in ((name_a, new_a), (name_b, new_b)):
            old = state_dict[name]
            result[name] = values.reshape(old.shape).to(old.dtype)
    return result


def product_distances(state_dict: Mapping[str, Tensor], other: Mapping[str, Tensor]) -> tuple[float, float]:
    """Distance of two adapters in their products B A and in their factors, each relative to the size of both.

    0 says that they are equal, √2 that they have nothing in common. The products are not computed.
    """
    products, factors = [0.0, 0.0], [0.0, 0.0]
    for name_a, name_b in factor_pairs(state_dict):
        a, b = _matrices(state_dict, name_a, name_b)
        c, d = _matrices(other, name_a, name_b)
        own, others = _inner(b, a, b, a), _inner(d, c, d, c)
        products[0] += own + others - 2 * _inner(b, a, d, c)
        products[1] += own + others
        factors[0] += float((a - c).square().sum() + (b - d).square().sum())
        factors[1] += float(sum(matrix.square().sum() for matrix in (a, b, c, d)))
    return _relative(*products), _relative(*factors)


def _inner(b: Tensor, a: Tensor, d: Tensor, c: Tensor) -> float:
    """Inner product of the matrices B A and D C."""
    return float(((b.T @ d) * (a @ c.T)).sum())


def _relative(square: float, size: float) -> float:
    return float((max(square, 0.0) / size * 2) ** 0.5) if size > 0 else 0.0


def _matrices(state_dict: Mapping[str, Tensor], name_a: str, name_b: str) -> tuple[Tensor, Tensor]:
    a, b = state_dict[name_a], state_dict[name_b]
    if a.dim() < 2 or b.dim() < 2 or b.shape[1:].numel() != a.shape[0]:
        raise RPGError(
            f"tensors '{name_a}' {list(a.shape)} and '{name_b}' {list(b.shape)}: "
            "expected [r, in] and [out, r]"
        )
    for name, tensor in ((name_a, a), (name_b, b)):
        if not bool(torch.isfinite(tensor).all()):
            raise RPGError(f"tensor '{name}' holds NaN or Inf; expected finite values")
    return a.detach().double().flatten(1), b.detach().double().flatten(1)


def _normalised(value: Any) -> Any:
    """A value of a configuration so that equal meanings compare equal."""
    if isinstance(value, list):
        return sorted((_normalised(item) for item in value), key=repr) or None
    if isinstance(value, dict):
        return {key: _normalised(item) for key, item in value.items()} or None
    # Older versions of PEFT lack keys that newer ones write as false or empty.
    return None if value is False or value == "" else value
