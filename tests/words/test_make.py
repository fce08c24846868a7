"""The command that makes adapter, head and card."""

import sys
from dataclasses import dataclass
from pathlib import Path

import pytest

from rpg.storage.files import sha256
from rpg.words import make
from rpg.words.fitting import FitSettings
from rpg.words.measuring import described, measure
from rpg.words.properties import Part
from rpg.words.sentences import SentenceUnderstanding
from tests.text_encoders import save_encoder


@dataclass(frozen=True)
class Settings(FitSettings):
    """A short fit of small batches."""

    pool: int = 60
    descriptions: int = 6
    others: int = 2
    first_layer: int = 1
    rank: int = 2
    hidden: int = 16
    head_descriptions: int = 50
    head_epochs: int = 2


def run(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> None:
    monkeypatch.setattr(make, "FitSettings", Settings)
    monkeypatch.setattr(sys, "argv", ["make", *arguments])
    make.main()


def test_what_is_made_loads_and_its_card_says_what_it_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    base, out = save_encoder(tmp_path / "encoder", positions=256), tmp_path / "words"
    run(monkeypatch, str(out), "--encoder", str(base), "--seed", "3", "--steps", "4")
    assert "4/4 loss" in capsys.readouterr().err
    understanding = SentenceUnderstanding.load(out, base)
    card = (out / "README.md").read_text()
    for name in ("adapter_config.json", "adapter_model.safetensors", "head.safetensors"):
        assert f"| `{name}` | {(out / name).stat().st_size:,} | `{sha256(out / name)}` |" in card
        assert str(tmp_path).encode() not in (out / name).read_bytes(), "no path of this machine"
    share = measure(understanding.encoder, understanding.head, *described(Part.validation)).share_right()
    assert f"is\n{share:.3f}." in card or f"is {share:.3f}." in card or f"chosen, is {share:.3f}" in card
    assert "seed 3" in card and str(tmp_path) not in card


def test_a_missing_encoder_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(SystemExit, match=r"error: .*nowhere/config.json: not found"):
        run(monkeypatch, str(tmp_path / "out"), "--encoder", str(tmp_path / "nowhere"))
