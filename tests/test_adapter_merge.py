"""Merging adapters that somebody else wrote: whatever their files say, it is one line or a result."""

import json
import tempfile
from pathlib import Path
from typing import Any

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from rpg.adapter_merge import AdapterMerge
from rpg.errors import RPGError

BASE = {"net.linear.weight": torch.ones(4, 3), "net.linear.bias": torch.zeros(4), "words": torch.ones(5, 2)}
VALUES = st.recursive(
    st.none() | st.booleans() | st.integers(-3, 9) | st.floats() | st.sampled_from(["", "LORA", "linear"]),
    lambda inner: (
        st.lists(inner, max_size=2) | st.dictionaries(st.sampled_from(["linear", "("]), inner, max_size=2)
    ),
    max_leaves=4,
)  # fmt: skip
KEYS = (
    "peft_type", "lora_alpha", "alpha_pattern", "modules_to_save", "init_lora_weights", "fan_in_fan_out",
    "use_rslora", "target_parameters",
)  # fmt: skip
NAMES = [
    f"base_model.model.{module}{end}"
    for module in ("linear", "net.linear", "words", "other")
    for end in (
        ".lora_A.weight", ".lora_B.weight", ".lora_embedding_A", ".lora_embedding_B",
        ".lora_magnitude_vector", ".lora_B.bias", ".bias", ".base_layer.weight", "",
    )
]  # fmt: skip
SHAPES = st.sampled_from([(), (0,), (4,), (2, 3), (4, 2), (0, 3), (4, 0), (2, 3, 1), (4, 2, 1, 1), (4, 3)])


@settings(max_examples=300, deadline=None, derandomize=True)
@given(
    changes=st.dictionaries(st.sampled_from(KEYS), VALUES, max_size=3),
    shapes=st.dictionaries(st.sampled_from(NAMES), SHAPES, min_size=1, max_size=4),
)
def test_any_adapter_is_merged_or_refused_in_one_line(
    changes: dict[str, Any], shapes: dict[str, tuple[int, ...]]
) -> None:
    config = {"peft_type": "LORA", "lora_alpha": 2, **changes}
    adapter: dict[str, Tensor] = {name: torch.ones(shape) for name, shape in shapes.items()}
    with tempfile.TemporaryDirectory() as directory:
        path = Path(directory) / "adapter_config.json"
        path.write_text(json.dumps(config))
        try:
            merged = dict(AdapterMerge(BASE, adapter, path, "base"))
        except RPGError as error:
            assert "\n" not in str(error)
            return
    assert merged.keys() >= BASE.keys()
    assert all(merged[name].shape == tensor.shape for name, tensor in BASE.items())


def test_the_product_is_scaled_and_added(tmp_path: Path) -> None:
    """W + alpha / r · B A, or alpha / √r with rank stabilisation, of numbers that a hand can check."""
    a, b = torch.tensor([[1.0, 2, 3], [0, 1, 0], [0, 0, 0], [0, 0, 0]]), torch.zeros(4, 4)
    b[0, 0], b[3, 1] = 2, 5
    adapter = {
        "base_model.model.linear.lora_A.weight": a,
        "base_model.model.linear.lora_B.weight": b,
    }
    cases: list[tuple[dict[str, Any], float]] = [
        ({}, 0.5),
        ({"use_rslora": True}, 1.0),
        ({"alpha_pattern": {"li.*": 8}}, 2.0),
    ]
    path = tmp_path / "adapter_config.json"
    for changes, scale in cases:
        path.write_text(json.dumps({"peft_type": "LORA", "lora_alpha": 2, **changes}))
        merged = dict(AdapterMerge(BASE, adapter, path, "base"))
        change = torch.tensor([[2.0, 4, 6], [0, 0, 0], [0, 0, 0], [0, 5, 0]])
        assert torch.equal(merged["net.linear.weight"], 1 + scale * change)
        assert torch.equal(merged["words"], BASE["words"])
