"""Quantised weights are recognised, in the forms that libraries write, and other integers are not."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from rpg.collection.quantised import check_not_quantised
from rpg.collection.register import BadCheckpointsError, register
from rpg.errors import RPGError

PACKED = torch.zeros(64, 1, dtype=torch.uint8)
INT32 = torch.zeros(8, 32, dtype=torch.int32)
FORMS: dict[str, tuple[dict[str, Tensor], str]] = {
    # As bitsandbytes' documentation of 4-bit serialisation lists them.
    "bitsandbytes 4 bits": (
        {
            "l.weight": PACKED,
            "l.weight.absmax": torch.ones(4),
            "l.weight.quant_map": torch.ones(16),
            "l.weight.quant_state.bitsandbytes__nf4": torch.zeros(90, dtype=torch.uint8),
            "l.bias": torch.ones(8),
        },
        "bitsandbytes",
    ),
    "bitsandbytes 8 bits": (
        {
            "l.weight": torch.zeros(8, 16, dtype=torch.int8),
            "l.SCB": torch.ones(8),
            "l.weight_format": torch.zeros((), dtype=torch.uint8),
        },
        "bitsandbytes",
    ),
    "GPTQ": (
        {
            "l.qweight": INT32,
            "l.qzeros": torch.zeros(1, 4, dtype=torch.int32),
            "l.scales": torch.ones(1, 32).half(),
            "l.g_idx": torch.zeros(64, dtype=torch.int32),
        },
        "GPTQ",
    ),
    "AWQ": ({"l.qweight": INT32, "l.qzeros": INT32[:1].clone(), "l.scales": torch.ones(1, 32).half()}, "AWQ"),
    "compressed-tensors": ({"l.weight_packed": INT32, "l.weight_scale": torch.ones(8)}, "compressed-tensors"),
    "HQQ": ({"l.W_q": PACKED, "l.scale": torch.ones(8)}, "HQQ"),
    "unknown": ({"l.weight": torch.zeros(8, 8, dtype=torch.int8)}, ""),
}


@pytest.mark.parametrize("form", FORMS)
def test_packed_weights_are_refused_at_register(tmp_path: Path, form: str) -> None:
    tensors, whose = FORMS[form]
    for name in "ab":
        save_file(tensors, tmp_path / f"{name}.safetensors")
    with pytest.raises(BadCheckpointsError, match="2 of 2 checkpoints") as caught:
        register(tmp_path)
    for line in caught.value.problems:
        assert "weights quantised" in line
        assert whose in line
        assert "expected floating-point weights: dequantise the network" in line


def test_what_torchao_writes_as_safetensors_is_refused(tmp_path: Path) -> None:
    quantization = pytest.importorskip("torchao.quantization")
    support = pytest.importorskip("torchao.prototype.safetensors.safetensors_support")
    model = torch.nn.Sequential(torch.nn.Linear(64, 64))
    quantization.quantize_(model, quantization.Int8WeightOnlyConfig(version=2))
    tensors, _ = support.flatten_tensor_state_dict(model.state_dict())
    assert any(tensor.dtype == torch.int8 for tensor in tensors.values())
    with pytest.raises(RPGError, match="weights quantised"):
        check_not_quantised(tensors, None)


def test_a_model_whose_configuration_says_so_is_refused(tmp_path: Path) -> None:
    for name in "ab":
        (tmp_path / name).mkdir()
        save_file({"w": torch.ones(20)}, tmp_path / name / "model.safetensors")
        config = {"model_type": "llama", "quantization_config": {"quant_method": "fp8"}}
        (tmp_path / name / "config.json").write_text(json.dumps(config))
    with pytest.raises(BadCheckpointsError) as caught:
        register(tmp_path)
    assert all("quantization_config: the weights are quantised" in line for line in caught.value.problems)


def test_other_integers_are_no_quantised_weights() -> None:
    tensors = {
        "w": torch.ones(8, 8),
        "norm.num_batches_tracked": torch.tensor(3),
        "attention.relative_position_index": torch.zeros(49, 49, dtype=torch.int64),
        "mask": torch.zeros(100, 100, dtype=torch.bool),
        "table": torch.zeros(100, dtype=torch.int32),
        "image": torch.zeros(8, 8, dtype=torch.uint8),
        "scales": torch.ones(3),
        "weight_shape": torch.tensor([8, 8], dtype=torch.int32),
        "class_weight": torch.tensor([1, 2, 3], dtype=torch.int64),
    }
    check_not_quantised(tensors, {"model_type": "swin", "quantization_config": None})
