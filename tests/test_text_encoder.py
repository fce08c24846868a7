"""Text encoders: embeddings against BERT's formulas, and the messages for what is refused."""

import json
import math
import os
import pickle
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import RobertaConfig, RobertaModel

from rpg.config import LONGEST_DESCRIPTION
from rpg.encoders import load_encoder
from rpg.errors import RPGError
from rpg.text_encoder import (
    TextEncoder,
    check_encoder,
    copy_encoder,
    encoder_digest,
)
from tests.text_encoders import HEADS, LAYERS, SIZE, save_encoder, token_ids


@pytest.fixture
def encoder(tmp_path: Path) -> Path:
    """An encoder that a test may change."""
    return save_encoder(tmp_path / "words")


def bert(weights: dict[str, Tensor], ids: list[int]) -> Tensor:
    """The last layer's outputs [tokens, size], by the formulas of arXiv 1810.04805 and 1706.03762."""

    def norm(x: Tensor, name: str) -> Tensor:
        centred = x - x.mean(-1, keepdim=True)
        scaled = centred / (centred.pow(2).mean(-1, keepdim=True) + 1e-12).sqrt()
        return scaled * weights[f"{name}.weight"] + weights[f"{name}.bias"]

    def linear(x: Tensor, name: str) -> Tensor:
        return x @ weights[f"{name}.weight"].T + weights[f"{name}.bias"]

    places = range(len(ids))
    x = norm(
        weights["embeddings.word_embeddings.weight"][ids]
        + weights["embeddings.position_embeddings.weight"][places]
        + weights["embeddings.token_type_embeddings.weight"][0],
        "embeddings.LayerNorm",
    )
    for i in range(LAYERS):
        layer = f"encoder.layer.{i}"
        query, key, value = (
            linear(x, f"{layer}.attention.self.{each}").view(len(ids), HEADS, -1).transpose(0, 1)
            for each in ("query", "key", "value")
        )
        attention = (query @ key.transpose(1, 2) / math.sqrt(query.shape[-1])).softmax(-1)
        seen = (attention @ value).transpose(0, 1).reshape(len(ids), -1)
        x = norm(linear(seen, f"{layer}.attention.output.dense") + x, f"{layer}.attention.output.LayerNorm")
        inner = linear(x, f"{layer}.intermediate.dense")
        inner = inner * 0.5 * (1 + torch.erf(inner / math.sqrt(2)))
        x = norm(linear(inner, f"{layer}.output.dense") + x, f"{layer}.output.LayerNorm")
    return x


@pytest.mark.parametrize(
    "description", ["cat", "Is it a cat, or any of two dogs?", "one one one two two two three three three"]
)
def test_an_embedding_is_the_normalised_mean_of_berts_outputs(text_encoder: Path, description: str) -> None:
    encoder = TextEncoder(text_encoder)
    weights = load_file(text_encoder / "model.safetensors")
    outputs = bert({name: tensor.double() for name, tensor in weights.items()}, token_ids(description))
    mean = outputs.mean(0)
    embedding = encoder.encode(description)
    assert encoder.size == len(embedding) == SIZE
    assert embedding == pytest.approx((mean / mean.norm()).tolist(), abs=1e-6)
    assert torch.tensor(embedding).double().tolist() == embedding, "float32 values"


def test_the_number_of_threads_does_not_change_embeddings(text_encoder: Path) -> None:
    encoder = TextEncoder(text_encoder)
    alone = encoder.encode("two dogs")
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        assert encoder.encode("two dogs") == alone
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize(
    ("description", "words"),
    [
        ("", "description '': expected words"),
        (" \n", r"description ' \n': expected words"),
        ("\x00", r"description '\x00': expected words"),
        ("cat " * 15, "expected at most 16 tokens, as the encoder reads, got 17"),
        ("x" * (LONGEST_DESCRIPTION + 1), "expected at most 2000 characters, got 2001"),
        ("\ud800", r"description '\ud800': expected Unicode text"),
    ],
)
def test_descriptions_that_cannot_be_read_are_refused(
    text_encoder: Path, description: str, words: str
) -> None:
    with pytest.raises(RPGError) as refusal:
        TextEncoder(text_encoder).encode(description)
    assert words in str(refusal.value)


def change_config(directory: Path, **changes: Any) -> None:
    config = json.loads((directory / "config.json").read_text())
    (directory / "config.json").write_text(json.dumps({**config, **changes}))


def change_weights(directory: Path, change: Callable[[dict[str, Tensor]], object]) -> None:
    weights = load_file(directory / "model.safetensors")
    change(weights)
    save_file(weights, directory / "model.safetensors", {"format": "pt"})


NAME = "encoder.layer.1.output.dense.weight"


@pytest.mark.parametrize(
    ("spoil", "words"),
    [
        (lambda d: (d / "config.json").unlink(), "config.json: not found"),
        (lambda d: (d / "tokenizer.json").unlink(), "tokenizer.json: not found"),
        (lambda d: (d / "model.safetensors").unlink(), "model.safetensors: not found; expected"),
        (lambda d: (d / "config.json").write_text("{"), "config.json: not the configuration of an encoder"),
        (lambda d: change_config(d, model_type="none"), "config.json: not the configuration of an encoder"),
        (lambda d: change_config(d, is_encoder_decoder=True), "config.json: expected an encoder alone"),
        (lambda d: change_config(d, vocab_size=7), "tensor 'embeddings.word_embeddings.weight'"),
        (lambda d: (d / "tokenizer.json").write_text("{}"), "tokenizer.json: not a tokenizer"),
        (lambda d: (d / "model.safetensors").write_bytes(b"junk"), "model.safetensors: cannot be loaded"),
        (lambda d: change_weights(d, lambda w: w.pop(NAME)), f"tensor '{NAME}' is missing"),
        (
            lambda d: change_weights(d, lambda w: w.update({NAME: torch.ones(3, 3)})),
            f"model.safetensors: tensor '{NAME}' is missing, or not of the shape",
        ),
        (
            lambda d: change_weights(d, lambda w: w[NAME].fill_(torch.nan)),
            f"model.safetensors: tensor '{NAME}' holds NaN",
        ),
        (lambda d: (d / "adapter_config.json").write_text("{}"), "adapter_config.json: expected"),
    ],
)  # fmt: skip
def test_encoders_that_cannot_be_used_are_refused(
    encoder: Path, spoil: Callable[[Path], object], words: str, capfd: pytest.CaptureFixture[str]
) -> None:
    spoil(encoder)
    with pytest.raises(RPGError) as refusal:
        TextEncoder(encoder)
    assert str(refusal.value).startswith(str(encoder))
    assert words in str(refusal.value)
    assert "\n" not in str(refusal.value)
    assert capfd.readouterr().err == ""


def test_a_tokenizer_with_more_words_than_the_network_is_refused(encoder: Path) -> None:
    content = json.loads((encoder / "tokenizer.json").read_text())
    content["model"]["vocab"]["extra"] = 20
    (encoder / "tokenizer.json").write_text(json.dumps(content))
    with pytest.raises(RPGError, match=r"tokenizer\.json: expected at most the 20 tokens .* found 21"):
        TextEncoder(encoder)


def test_the_pooler_may_be_missing(encoder: Path) -> None:
    before = TextEncoder(encoder).encode("cat")
    change_weights(encoder, lambda w: [w.pop(name) for name in list(w) if name.startswith("pooler")])
    assert TextEncoder(encoder).encode("cat") == before


def test_positions_that_do_not_start_at_0_limit_the_tokens(encoder: Path) -> None:
    """RoBERTa does not use the first two of its 16 positions."""
    config = RobertaConfig(
        vocab_size=20, hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=48,
        max_position_embeddings=16, pad_token_id=1,
    )  # fmt: skip
    RobertaModel(config).save_pretrained(encoder)
    loaded = TextEncoder(encoder)
    assert len(loaded.encode("cat " * 12)) == 32
    with pytest.raises(RPGError, match="expected at most 14 tokens, as the encoder reads, got 15"):
        loaded.encode("cat " * 13)


class Bomb:
    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return os.mkdir, (str(self.path),)


def test_neither_pickles_nor_code_are_run(encoder: Path, tmp_path: Path) -> None:
    (encoder / "model.safetensors").rename(encoder / "kept")
    (encoder / "pytorch_model.bin").write_bytes(pickle.dumps(Bomb(tmp_path / "exploded")))
    with pytest.raises(RPGError, match=r"model\.safetensors: not found.*never executes a pickle"):
        TextEncoder(encoder)
    (encoder / "kept").rename(encoder / "model.safetensors")
    TextEncoder(encoder)
    (encoder / "modeling.py").write_text(f"import os; os.mkdir({str(tmp_path / 'exploded')!r})")
    own = {"AutoConfig": "modeling.Config", "AutoModel": "modeling.Model"}
    change_config(encoder, model_type="own", auto_map=own)
    with pytest.raises(RPGError, match=r"config\.json: not the configuration of an encoder"):
        TextEncoder(encoder)
    assert not (tmp_path / "exploded").exists()


def test_missing_packages_are_named(text_encoder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(RPGError, match=r"not installed: pip install 'rpg\[text\]'"):
        TextEncoder(text_encoder)


def test_a_copy_is_the_same_and_another_is_refused(text_encoder: Path, encoder: Path, tmp_path: Path) -> None:
    digest = encoder_digest(text_encoder)
    copy_encoder(text_encoder, tmp_path / "copy")
    assert sorted(path.name for path in (tmp_path / "copy").iterdir()) == [
        "config.json", "model.safetensors", "tokenizer.json",
    ]  # fmt: skip
    check_encoder(tmp_path / "copy", digest)
    assert load_encoder(tmp_path / "copy", digest).encode("cat") == TextEncoder(text_encoder).encode("cat")
    for name in ("config.json", "model.safetensors", "tokenizer.json"):
        path = tmp_path / "copy" / name
        before = path.read_bytes()
        path.write_bytes(before + b" ")
        with pytest.raises(RPGError, match=f"copy: not the text encoder .*expected digest {digest}, got"):
            check_encoder(tmp_path / "copy", digest)
        path.write_bytes(before)
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "notes.txt").touch()
    with pytest.raises(RPGError, match="mine: holds other files"):
        copy_encoder(encoder, tmp_path / "mine")
