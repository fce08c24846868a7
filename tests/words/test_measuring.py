"""Measuring and calibration against sums written out, with a tiny encoder and a head of random weights."""

from dataclasses import replace

import pytest
import torch

from rpg.text_encoder import TextEncoder
from rpg.words.embedding import embeddings
from rpg.words.head import Calibration, ClassHead
from rpg.words.measuring import Measured, calibrated, described, measure, nearest_training
from rpg.words.properties import Part, out_of_scope, properties
from rpg.words.sentences import sureness_of
from tests.text_encoders import save_encoder


@pytest.fixture(scope="module")
def encoder(tmp_path_factory: pytest.TempPathFactory) -> TextEncoder:
    return TextEncoder(save_encoder(tmp_path_factory.mktemp("words") / "encoder", positions=256))


@pytest.fixture(scope="module")
def head(encoder: TextEncoder) -> ClassHead:
    torch.manual_seed(0)
    return ClassHead(encoder.size, 16).eval()


def test_every_phrase_is_asked_for_once_and_every_property_counts_the_same() -> None:
    texts, bits, weights = described(Part.test)
    table = properties(Part.test)
    assert len(texts) == len(bits) == len(weights) == sum(len(each.phrases) for each in table)
    assert float(weights.sum()) == pytest.approx(len(table))
    phrases = [(phrase, each.bits) for each in table for phrase in each.phrases]
    for text, row, (phrase, expected) in zip(texts, bits.tolist(), phrases, strict=True):
        assert text.lower().endswith(phrase.lower()) and tuple(row) == expected
    assert len({text.split()[0] for text in texts}) >= 4, "in several ways"


def test_shares_are_weighted_means_of_right_bits() -> None:
    bits = torch.tensor([[1.0] * 5 + [0.0] * 5] * 3)
    classes = bits * 0.8 + 0.1
    classes[1, :2] = 0.4
    classes[2] = 1 - classes[2]
    found = Measured(("a", "b", "c"), torch.tensor([0.5, 0.5, 1.0]), bits, classes, torch.ones(3))
    assert found.right.tolist() == pytest.approx([1.0, 0.8, 0.0])
    assert found.share_right() == pytest.approx((0.5 * 1.0 + 0.5 * 0.8 + 1.0 * 0.0) / 2)
    assert found.share_right(torch.tensor([1.0, 1.0, 0.0])) == pytest.approx(0.9)


def test_measured_probabilities_are_the_heads(encoder: TextEncoder, head: ClassHead) -> None:
    texts = ["cat", "one or two dogs"]
    found = measure(encoder, head, texts, torch.zeros(2, 10))
    for i, text in enumerate(texts):
        classes, scope = head.probabilities(torch.tensor([encoder.encode(text)]))
        torch.testing.assert_close(found.classes[i], classes[0])
        assert float(found.sureness[i]) == pytest.approx(float(sureness_of(classes, scope)[0]))


def test_calibration_is_the_likeliest_and_its_bound_the_best(encoder: TextEncoder, head: ClassHead) -> None:
    found = calibrated(encoder, head)
    texts, bits, _ = described(Part.validation)
    kinds = out_of_scope(Part.validation)
    others = [text for kind in kinds.values() for text in kind]
    things = torch.tensor([text in kinds["other_things"] for text in others])

    def mean_of_others(values: torch.Tensor) -> float:
        """The mean over other things counts as much as that over all the rest."""
        return float(values[things].mean() + values[~things].mean()) / 2

    with torch.inference_mode():
        logits, about = (each.double() for each in head(embeddings(encoder, texts)))
        _, other_about = (each.double() for each in head(embeddings(encoder, others)))

    def loss(of: Calibration) -> float:
        chances = torch.sigmoid(logits / of.class_temperature)
        classes = -(bits * chances.log() + (1 - bits) * (1 - chances).log()).mean()
        inside = torch.sigmoid((about + of.scope_shift) / of.scope_temperature)
        outside = torch.sigmoid((other_about + of.scope_shift) / of.scope_temperature)
        return float(classes - inside.log().mean()) - mean_of_others((1 - outside).log())

    best = loss(found)
    assert best < loss(Calibration())
    for name in ("class_temperature", "scope_temperature", "scope_shift"):
        for factor in (0.9, 1.1):
            assert best <= loss(replace(found, **{name: getattr(found, name) * factor})) + 1e-5

    head.calibration = found
    inside, outside = (
        measure(encoder, head, texts, bits),
        measure(encoder, head, others, torch.zeros(len(others), 10)),
    )
    head.calibration = Calibration()

    def gained(bound: float) -> float:
        sure = inside.sureness >= bound
        understood, misunderstood = inside.right >= 0.85, inside.right <= 0.75
        kept_back = [mean_of_others((outside.sureness < bound).float())]
        kept_back += [float((~sure)[misunderstood].float().mean())] if misunderstood.any() else [0.0]
        acted_on = float(sure[understood].float().mean()) if understood.any() else 0.0
        return acted_on + sum(kept_back) / 2

    assert gained(found.least_sureness) == pytest.approx(
        max(gained(i / 200) for i in range(100, 201)), abs=0.01
    )


def test_the_nearest_training_phrase_of_one_is_itself(encoder: TextEncoder) -> None:
    phrase = properties(Part.training)[0].phrases[0]
    near = nearest_training([f"Find all {phrase}"], encoder)
    assert float(near) == pytest.approx(1, abs=1e-5)
