"""Batches that come from a GPU, written in parts by several threads, against token by token."""

import threading
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

from rpg.collection.layout import Layout
from rpg.generation import sampled
from rpg.generation.model_file import ModelFile, NotFiniteError
from rpg.generation.sampled import ArrivingBatch, SampledBatch

MakeLayout = Callable[..., Layout]


class Arrived:
    """Stands for an event of a GPU."""

    def synchronize(self) -> None:
        """Nothing to wait for."""


def decoded(layout: Layout, tokens: Tensor) -> ArrivingBatch:
    """What a GPU's decoder would bring of them."""
    weights = torch.zeros_like(tokens)
    for index, values in enumerate(tokens):
        _, _, found = layout.decode_token(index, values)
        weights[index, : len(found)] = found.float()
    return ArrivingBatch(weights, weights.isfinite().all(1), Arrived())  # type: ignore[arg-type]


@pytest.fixture
def layout(make_layout: MakeLayout) -> Layout:
    network = torch.nn.Sequential(torch.nn.Linear(40, 30), torch.nn.BatchNorm1d(30), torch.nn.Linear(30, 3))
    return make_layout(16, template=network.state_dict())


@pytest.fixture
def tokens(layout: Layout) -> Tensor:
    return torch.randn(layout.tokens, 16, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("part_rows", [1, 7, 1000])
def test_same_file_as_token_by_token(
    layout: Layout, tokens: Tensor, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, part_rows: int
) -> None:
    monkeypatch.setattr(sampled, "_PART_BYTES", part_rows * 16 * 4)
    threads = set()
    write_weights = ModelFile.write_weights

    def seen(file: ModelFile, *given: object) -> None:
        threads.add(threading.current_thread())
        write_weights(file, *given)  # type: ignore[arg-type]

    monkeypatch.setattr(ModelFile, "write_weights", seen)
    batch = decoded(layout, tokens)
    with ModelFile(tmp_path / "parts", layout, {}) as file:
        # In two batches, as a network that is larger than one comes.
        batch.write(slice(0, 20), file, 0)
        batch.write(slice(20, None), file, 20)
        digest = file.sha256()
    with ModelFile(tmp_path / "tokens", layout, {}) as file:
        SampledBatch(tokens).write(slice(None), file, 0)
        assert file.sha256() == digest
    assert (tmp_path / "parts").read_bytes() == (tmp_path / "tokens").read_bytes()
    assert (threading.current_thread() in threads) == (part_rows == 1000)


def test_values_that_are_not_finite_in_one_part(
    layout: Layout, tokens: Tensor, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sampled, "_PART_BYTES", 3 * 16 * 4)
    batch = decoded(layout, tokens)
    batch.finite[11] = False
    name = layout.spec_of(11).name
    with (
        pytest.raises(NotFiniteError, match=rf"model: tensor '{name}': NaN or infinite"),
        ModelFile(tmp_path / "model", layout, {}) as file,
    ):
        batch.write(slice(None), file, 0)
    assert not list(tmp_path.iterdir())
