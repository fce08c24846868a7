"""Encoder and head together: fitted, saved, loaded and exported, with tiny encoders and with the real one."""

import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from transformers import BertModel

from rpg.commands.main import main
from rpg.errors import RPGError
from rpg.text_encoder import TextEncoder
from rpg.words.embedding import embeddings
from rpg.words.fitting import FitSettings, fit
from rpg.words.head import HEAD_FILE, Calibration, ClassHead
from rpg.words.sentences import SentenceUnderstanding, adapted_encoder, sureness_of
from tests.text_encoders import save_encoder

SETTINGS = FitSettings(
    steps=6,
    pool=60,
    descriptions=6,
    others=2,
    first_layer=1,
    rank=2,
    adapter_rate=1e-2,
    hidden=16,
    head_descriptions=50,
    head_epochs=2,
)


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_encoder(tmp_path_factory.mktemp("base") / "encoder", positions=128)


@pytest.fixture(scope="module")
def fitted(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with an adapter and a head."""
    out = tmp_path_factory.mktemp("fitted") / "words"
    _, head = fit(base, out, 0, SETTINGS, lambda step, loss: None)
    head.calibration = Calibration(1.5, 2.0, 0.5, 0.6)
    head.save(out / HEAD_FILE)
    return out


def test_the_adapted_encoder_embeds_as_peft_does(base: Path, fitted: Path) -> None:
    text = "is it a cat or a dog?"
    adapted, plain = adapted_encoder(base, fitted), TextEncoder(base)
    peft = PeftModel.from_pretrained(BertModel.from_pretrained(base), fitted).eval()
    with torch.inference_mode():
        outputs = peft(input_ids=torch.tensor([plain.tokens(text)])).last_hidden_state[0].mean(0)
    expected = (outputs / outputs.norm()).tolist()
    assert adapted.encode(text) == pytest.approx(expected, abs=1e-5)
    assert adapted.encode(text) != pytest.approx(plain.encode(text), abs=1e-3), "fitting changed the encoder"


def test_what_is_understood_is_what_the_head_says_of_the_embedding(base: Path, fitted: Path) -> None:
    understanding = SentenceUnderstanding.load(fitted, base)
    understood = understanding.understand("a cat or a truck")
    head = ClassHead.load(fitted / HEAD_FILE)
    embedding = torch.tensor([adapted_encoder(base, fitted).encode("a cat or a truck")])
    classes, scope = head.probabilities(embedding)
    assert understood.probabilities == pytest.approx(classes[0].tolist())
    assert understood.sureness == pytest.approx(float(sureness_of(classes, scope)[0]))
    assert understood == understanding.understand("a cat or a truck")


@pytest.mark.parametrize(("bound", "is_sure"), [(0.5, True), (1.0, False)])
def test_less_than_the_bound_is_not_sure(base: Path, fitted: Path, bound: float, is_sure: bool) -> None:
    understanding = SentenceUnderstanding.load(fitted, base)
    understanding.head.calibration = replace(understanding.head.calibration, least_sureness=bound)
    assert understanding.understand("a dog").is_sure == is_sure


def test_equal_seeds_fit_the_same(base: Path, fitted: Path, tmp_path: Path) -> None:
    weights = "adapter_model.safetensors"
    for seed, is_equal in ((0, True), (1, False)):
        fit(base, tmp_path / str(seed), seed, SETTINGS, lambda step, loss: None)
        same = (tmp_path / str(seed) / weights).read_bytes() == (fitted / weights).read_bytes()
        assert same == is_equal


def test_export_writes_the_fine_tuned_encoder(base: Path, fitted: Path, tmp_path: Path) -> None:
    out = tmp_path / "encoder"
    main(["export", str(fitted), str(out), "--base", str(base)])
    text = "one or two dogs"
    assert TextEncoder(out).encode(text) == pytest.approx(
        adapted_encoder(base, fitted).encode(text), abs=1e-5
    )


def test_padding_changes_no_embedding(base: Path) -> None:
    encoder = TextEncoder(base)
    texts = ["cat", "is it a cat, or any of two dogs?"]
    together = embeddings(encoder, texts)
    for row, text in zip(together.tolist(), texts, strict=True):
        assert row == pytest.approx(encoder.encode(text), abs=1e-5)


def test_another_encoder_is_refused(fitted: Path, tmp_path: Path) -> None:
    other = save_encoder(tmp_path / "other", seed=1, positions=128)
    with pytest.raises(RPGError, match="other: not the text encoder that the conditions came from"):
        SentenceUnderstanding.load(fitted, other)


@pytest.mark.parametrize("name", ["adapter_config.json", "adapter_model.safetensors", HEAD_FILE])
def test_a_missing_or_broken_file_is_named(base: Path, fitted: Path, tmp_path: Path, name: str) -> None:
    directory = tmp_path / "words"
    shutil.copytree(fitted, directory)
    (directory / name).write_bytes(b"nothing")
    with pytest.raises(RPGError, match=name):
        SentenceUnderstanding.load(directory, base)
    (directory / name).unlink()
    with pytest.raises(RPGError, match=name):
        SentenceUnderstanding.load(directory, base)
