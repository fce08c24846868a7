"""An encoder cut in two embeds as the whole one does, and its upper part learns what the whole one would."""

from pathlib import Path

import pytest
import torch

from rpg.text_encoder import TextEncoder
from rpg.words.embedding import embeddings, padded
from rpg.words.layers import embed_states, lower_outputs, number_of_layers, upper_layers
from tests.text_encoders import LAYERS, save_encoder

TEXTS = ["cat", "is it a cat, or any of two dogs?", "a truck", "three trucks or one dog"]
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_encoder(tmp_path_factory.mktemp("layers") / "encoder", positions=64)


@pytest.mark.parametrize("first", range(LAYERS + 1))
def test_both_parts_together_embed_as_the_encoder_does(base: Path, first: int) -> None:
    whole = TextEncoder(base)
    assert number_of_layers(whole) == LAYERS
    states = lower_outputs(base, first, TEXTS)
    assert [len(row) for row in states] == [len(whole.tokens(text)) for text in TEXTS]
    assert all(row.dtype == torch.float16 for row in states)
    found = embed_states(upper_layers(base, first), states, CPU)
    # What is in half precision differs in the fourth digit.
    torch.testing.assert_close(found, embeddings(whole, TEXTS), atol=2e-3, rtol=0)


def test_gradients_of_the_upper_part_are_those_of_the_encoder(base: Path) -> None:
    whole, upper = TextEncoder(base), upper_layers(base, 1)
    direction = torch.randn(whole.size, generator=torch.Generator().manual_seed(0))
    (whole.embed(*padded(whole, TEXTS)) @ direction).sum().backward()
    (embed_states(upper, lower_outputs(base, 1, TEXTS), CPU) @ direction).sum().backward()
    gradients = {name: each.grad for name, each in whole.network.named_parameters()}
    trained = dict(upper.network.named_parameters())
    assert {name for name in trained if "encoder.layer" in name} == {
        name for name in gradients if "encoder.layer.1." in name
    }
    for name, each in trained.items():
        if "encoder.layer" in name:
            assert each.grad is not None
            torch.testing.assert_close(each.grad, gradients[name], atol=2e-2, rtol=2e-2)
