"""BERT in plain PyTorch against that of transformers."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import BertModel

from rpg.errors import RPGError
from rpg.text_encoder import TextEncoder
from rpg.words.bert import Bert, BertConfig
from tests.text_encoders import save_encoder


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_encoder(tmp_path_factory.mktemp("bert") / "encoder")


def opened(directory: Path, change: Callable[[dict[str, Tensor]], object] = lambda weights: None) -> Bert:
    weights = load_file(directory / "model.safetensors")
    change(weights)
    return Bert(BertConfig.read(directory / "config.json"), weights, directory / "model.safetensors")


@torch.inference_mode()
def test_outputs_are_those_of_transformers(base: Path) -> None:
    ids, mask = (
        torch.tensor([[2, 11, 8, 12, 13, 3], [2, 14, 3, 0, 0, 0]]),
        torch.ones(2, 6, dtype=torch.int64),
    )
    mask[1, 3:] = 0
    expected = BertModel.from_pretrained(base).eval()(input_ids=ids, attention_mask=mask).last_hidden_state
    found = opened(base)(input_ids=ids, attention_mask=mask).last_hidden_state
    torch.testing.assert_close(found[mask > 0], expected[mask > 0], atol=1e-5, rtol=1e-5)


def test_minilm_embeds_as_transformers_does(minilm_directory: Path, minilm: TextEncoder) -> None:
    plain = TextEncoder(minilm_directory, opened(minilm_directory))
    for text in ("Select all things that can fly", "x", "no " * 300):
        assert plain.encode(text) == pytest.approx(minilm.encode(text), abs=1e-5)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"model_type": "roberta"}, 'config.json: model_type: expected bert, found "roberta"'),
        ({"hidden_act": "relu"}, 'config.json: hidden_act: expected gelu, found "relu"'),
        ({"position_embedding_type": "relative_key"}, "position_embedding_type: expected absolute"),
        ({"num_hidden_layers": 0}, "num_hidden_layers: expected a positive number, found 0"),
        ({"hidden_size": "32"}, 'hidden_size: expected a positive number, found "32"'),
        ({"layer_norm_eps": None}, "layer_norm_eps: expected a positive number, found null"),
        ({"num_attention_heads": 5}, "num_attention_heads: expected a divisor of hidden_size"),
        ({"num_hidden_layers": 3}, "tensor 'encoder.layer.2.attention.self.query.weight' is missing"),
    ],
)
def test_another_configuration_is_refused(base: Path, tmp_path: Path, change: Any, words: str) -> None:
    config = json.loads((base / "config.json").read_text()) | change
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(RPGError) as refusal:
        Bert(BertConfig.read(tmp_path / "config.json"), load_file(base / "model.safetensors"), base)
    assert words in str(refusal.value)


NAME = "encoder.layer.1.output.dense.weight"


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda w: w.pop(NAME), f"tensor '{NAME}' is missing"),
        (lambda w: w.update({NAME: torch.ones(3, 3)}), f"tensor '{NAME}' is missing, or not of the shape"),
        (lambda w: w[NAME].fill_(torch.nan), f"tensor '{NAME}' holds NaN"),
    ],
)
def test_weights_that_do_not_fit_are_named(
    base: Path, change: Callable[[dict[str, Tensor]], object], words: str
) -> None:
    with pytest.raises(RPGError, match=words):
        opened(base, change)
