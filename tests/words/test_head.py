"""The head's formulas, its file, and what is refused."""

import math
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from rpg.errors import RPGError
from rpg.words.head import HEAD_FILE, Calibration, ClassHead, Memory
from rpg.words.sentences import sureness_of


def made(seed: int = 0) -> ClassHead:
    torch.manual_seed(seed)
    head = ClassHead(size=16, hidden=8, dropout=0.5).eval()
    head.calibration = Calibration(2.0, 4.0, 1.5, 0.8)
    head.encoder = "abc"
    return head


def test_a_saved_head_answers_as_it_did_and_takes_half_the_bytes(tmp_path: Path) -> None:
    head, path = made(), tmp_path / HEAD_FILE
    head.save(path)
    loaded = ClassHead.load(path)
    embeddings = torch.nn.functional.normalize(torch.randn(5, 16), dim=1)
    for found, expected in zip(loaded.probabilities(embeddings), head.probabilities(embeddings), strict=True):
        torch.testing.assert_close(found, expected, atol=2e-3, rtol=0)
    assert (loaded.calibration, loaded.encoder) == (head.calibration, "abc")
    assert all(tensor.dtype == torch.float16 for tensor in load_file(path).values())
    assert not loaded.training, "dropout is off"


def test_probabilities_are_those_of_the_formulas() -> None:
    head = made()
    embedding = torch.nn.functional.normalize(torch.randn(1, 16), dim=1)
    weights = {name: tensor.double() for name, tensor in head.layers.state_dict().items()}
    inner = (4.0 * embedding.double()) @ weights["1.weight"].T + weights["1.bias"]
    inner = inner * 0.5 * (1 + torch.erf(inner / math.sqrt(2)))
    logits = (inner @ weights["4.weight"].T + weights["4.bias"])[0]
    classes, scope = head.probabilities(embedding)
    torch.testing.assert_close(classes[0].double(), 1 / (1 + torch.exp(-logits[:10] / 2)), atol=1e-5, rtol=0)
    assert float(scope) == pytest.approx(1 / (1 + math.exp(-(float(logits[10]) + 1.5) / 4)), abs=1e-5)


def known(number: int = 40) -> tuple[torch.Tensor, torch.Tensor]:
    """Embeddings and bits of descriptions."""
    embeddings = torch.nn.functional.normalize(torch.randn(number, 16), dim=1)
    return embeddings, (torch.rand(number, 10) > 0.5).float()


def test_the_memory_answers_with_the_nearest_descriptions() -> None:
    torch.manual_seed(1)
    embeddings, bits = known()
    memory = Memory.of(embeddings, bits)
    asked = torch.nn.functional.normalize(torch.randn(3, 16), dim=1)
    for text, found in zip(asked, memory.logits(asked).tolist(), strict=True):
        cosines = sorted(((float(row @ text), i) for i, row in enumerate(embeddings)), reverse=True)[:20]
        weights = [math.exp((cosine - cosines[0][0]) / 0.03) for cosine, _ in cosines]
        for j in range(10):
            share = sum(w * float(bits[i, j]) for w, (_, i) in zip(weights, cosines, strict=True)) / sum(
                weights
            )
            share = min(max(share, 0.02), 0.98)
            # int8 moves a cosine by about 0.003, and so a share by a few hundredths.
            assert 1 / (1 + math.exp(-found[j])) == pytest.approx(share, abs=0.08)
    # Of a description that it knows it says what it knows, as far as the clamp lets it.
    itself = memory.logits(embeddings)
    assert (((itself > 0).float() == bits).float().mean()) > 0.97
    assert float(itself.abs().max()) <= math.log(0.98 / 0.02) + 1e-3


def test_a_saved_memory_is_added_to_the_logits_as_before(tmp_path: Path) -> None:
    head, plain, path = made(), made(), tmp_path / HEAD_FILE
    head.memory = Memory.of(*known())
    embeddings, _ = known(5)
    torch.testing.assert_close(
        head(embeddings)[0], plain(embeddings)[0] + head.memory.logits(embeddings), atol=1e-5, rtol=0
    )
    torch.testing.assert_close(head(embeddings)[1], plain(embeddings)[1])
    head.save(path)
    loaded = ClassHead.load(path)
    for found, expected in zip(loaded.probabilities(embeddings), head.probabilities(embeddings), strict=True):
        torch.testing.assert_close(found, expected, atol=2e-3, rtol=0)
    tensors = load_file(path)
    del tensors["memory.bits"]
    with safe_open(path, framework="pt") as file:
        metadata = file.metadata()
    save_file(tensors, path, metadata)
    with pytest.raises(
        RPGError, match=r"head.safetensors: not the head of a sentence encoder: .*memory.bits"
    ):
        ClassHead.load(path)


def test_sureness_is_a_guess_where_nothing_is_known() -> None:
    sure, torn = torch.tensor([0.0] * 5 + [1.0] * 5), torch.full((10,), 0.5)
    assert float(sureness_of(sure, torch.tensor(1.0))) == 1
    assert float(sureness_of(torn, torch.tensor(1.0))) == 0.5
    assert float(sureness_of(sure, torch.tensor(0.0))) == 0.5
    assert float(sureness_of(sure, torch.tensor(0.5))) == 0.75


def test_a_missing_or_foreign_file_is_named(tmp_path: Path) -> None:
    path = tmp_path / HEAD_FILE
    with pytest.raises(RPGError, match=r"head.safetensors: not found"):
        ClassHead.load(path)
    save_file({"w": torch.zeros(3)}, path)
    with pytest.raises(RPGError, match=r"head.safetensors: not the head of a sentence encoder"):
        ClassHead.load(path)
    torch.save({"w": torch.zeros(3)}, path)
    with pytest.raises(RPGError, match=r"head.safetensors: not the head of a sentence encoder"):
        ClassHead.load(path)


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_nan_and_infinite_values_are_refused(tmp_path: Path, value: float) -> None:
    path = tmp_path / HEAD_FILE
    made().save(path)
    with safe_open(path, "pt") as file:
        metadata = file.metadata()
    tensors = load_file(path)
    tensors["1.weight"][2, 3] = value
    save_file(tensors, path, metadata)
    with pytest.raises(RPGError, match="holds NaN or infinite values"):
        ClassHead.load(path)


@settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.data())
def test_changed_bytes_are_an_error_in_one_line_or_another_head(tmp_path: Path, data: st.DataObject) -> None:
    path = tmp_path / HEAD_FILE
    made().save(path)
    content = bytearray(path.read_bytes())
    # The first bytes say what the file holds; those of the weights may be any.
    place = data.draw(st.integers(0, 700))
    content[place] = data.draw(st.integers(0, 255))
    path.write_bytes(content[: data.draw(st.sampled_from([len(content), len(content) // 2]))])
    try:
        ClassHead.load(path)
    except RPGError as error:
        assert "\n" not in str(error) and HEAD_FILE in str(error)
