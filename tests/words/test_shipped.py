"""The words that come with the project, on the real encoder: what they understand, and how sure they are."""

from pathlib import Path

import pytest
import torch

from rpg.errors import RPGError
from rpg.storage.files import sha256
from rpg.text_encoder import TextEncoder
from rpg.words.descriptions import DescriptionWriter
from rpg.words.measuring import described, measure
from rpg.words.properties import Part, bits_of, class_names, out_of_scope, published
from rpg.words.sentences import SentenceUnderstanding

SHIPPED = Path(__file__).parents[2] / "models" / "cifar10-words"


@pytest.fixture(scope="module")
def understanding(minilm_directory: Path) -> SentenceUnderstanding:
    return SentenceUnderstanding.load(SHIPPED, minilm_directory)


def test_the_card_says_what_the_files_are() -> None:
    card = (SHIPPED / "README.md").read_text()
    files = [path for path in SHIPPED.iterdir() if path.name != "README.md"]
    assert len(files) == 3
    for path in files:
        assert f"| `{path.name}` | {path.stat().st_size:,} | `{sha256(path)}` |" in card
    assert sum(path.stat().st_size for path in files) < 3 * 2**20


@pytest.mark.parametrize(
    ("description", "classes"),
    [
        ("Select all images of cats or trucks", "cat truck"),
        ("lorries and planes, please", "airplane truck"),
        ("vehicles", "airplane automobile ship truck"),
        ("machines with an engine", "airplane automobile ship truck"),
        ("things with feathers", "bird"),
        ("animals that bark", "dog"),
        ("a frog or a horse", "frog horse"),
        ("animals", "bird cat deer dog frog horse"),
        ("everything but ships", "airplane automobile bird cat deer dog frog horse truck"),
        ("anything except birds", "airplane automobile cat deer dog frog horse ship truck"),
    ],
)
def test_plain_descriptions_are_understood_as_anyone_would(
    understanding: SentenceUnderstanding, description: str, classes: str
) -> None:
    understood = understanding.understand(description)
    assert understood.bits == bits_of(classes)
    assert understood.classes == tuple(classes.split())
    assert understood.is_sure


def test_lists_of_classes_are_understood(understanding: SentenceUnderstanding) -> None:
    writer = DescriptionWriter(class_names(), [])
    tasks = [tuple(int(bit) for bit in f"{1 + 53 * i % 1022:010b}") for i in range(60)]
    texts = [writer.of_task(bits, 1, 77)[0] for bits in tasks]
    bits = torch.tensor(tasks, dtype=torch.float32)
    found = measure(understanding.encoder, understanding.head, texts, bits)
    assert found.share_right() > 0.92


@pytest.mark.slow
def test_properties_that_were_not_trained_on_are_understood(understanding: SentenceUnderstanding) -> None:
    found = measure(understanding.encoder, understanding.head, *described(Part.test))
    assert found.share_right() > 0.85
    texts, bits = zip(*published(), strict=True)
    found = measure(understanding.encoder, understanding.head, texts, torch.tensor(bits, dtype=torch.float32))
    assert found.share_right() > 0.8


@pytest.mark.slow
def test_other_texts_are_seldom_sure(understanding: SentenceUnderstanding) -> None:
    kinds = out_of_scope(Part.test)
    shares = {
        kind: sum(understanding.understand(text).is_sure for text in texts) / len(texts)
        for kind, texts in kinds.items()
    }
    assert max(shares.values()) < 0.35, shares
    assert sum(shares.values()) / len(shares) < 0.15, shares


@pytest.mark.parametrize(
    ("description", "message"),
    [
        ("x" * 10_000, "expected at most 2000 characters, got 10000"),
        ("", "expected words"),
        (" \n\t ", "expected words"),
        ("a " * 900, "expected at most 512 tokens"),
    ],
)
def test_what_cannot_be_read_is_one_line(
    understanding: SentenceUnderstanding, description: str, message: str
) -> None:
    with pytest.raises(RPGError, match=message):
        understanding.understand(description)


def test_equal_descriptions_are_understood_equally(
    understanding: SentenceUnderstanding, minilm_directory: Path
) -> None:
    again = SentenceUnderstanding.load(SHIPPED, minilm_directory)
    assert understanding.understand("things with hooves") == again.understand("things with hooves")
    plain = TextEncoder(minilm_directory)
    assert plain.encode("things with hooves") != understanding.encoder.encode("things with hooves")
