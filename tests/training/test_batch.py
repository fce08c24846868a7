"""Batches: a function of seed and step, every checkpoint once an epoch, only sampled tokens read."""

from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
from torch import Tensor

from rpg.collection.shards import ShardedCollection
from rpg.config import TrainConfig
from rpg.errors import RPGError
from rpg.generator.generator import Batch
from rpg.seeds import derived_seed
from rpg.training.batch import _ROWS_TOGETHER, BatchSource, epoch_order
from rpg.training.workers import Workers

COUNT = 10
ONE = Workers()


@pytest.fixture
def shards(tmp_path: Path, make_collection: Callable[..., ShardedCollection]) -> ShardedCollection:
    return make_collection(tmp_path, count=COUNT)


def source(
    shards: ShardedCollection,
    checkpoints: int = 4,
    tokens: int = 3,
    seed: int = 5,
    dropout: float = 0.0,
    workers: Workers = ONE,
) -> BatchSource:
    config = TrainConfig(checkpoints_per_step=checkpoints, tokens_per_checkpoint=tokens)
    assert shards.conditions is not None
    return BatchSource(shards, shards.conditions, config, seed, 1000, dropout, workers, torch.device("cpu"))


def same(one: Batch, other: Batch) -> bool:
    return all(
        torch.equal(a, b) if isinstance(a, Tensor) else a is b
        for a, b in zip(vars(one).values(), vars(other).values(), strict=True)
    )


def test_a_batch_is_a_function_of_seed_and_step(shards: ShardedCollection) -> None:
    first = [source(shards, dropout=0.3).batch(step) for step in range(6)]
    torch.manual_seed(99)
    other = source(shards, dropout=0.3)
    for step in (5, 0, 3, 3):
        assert same(other.batch(step), first[step])
    assert not same(first[0], first[1])
    assert not same(source(shards, seed=6, dropout=0.3).batch(0), first[0])


@pytest.mark.parametrize("count", [2, 3, 4, 7])
@pytest.mark.parametrize("together", [1, 2, 3, 16])
def test_workers_together_see_the_batch_that_one_worker_sees(
    shards: ShardedCollection, count: int, together: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(_ROWS_TOGETHER, "cpu", together)
    whole = source(shards, checkpoints=7, dropout=0.3)
    shares = [
        source(shards, checkpoints=7, dropout=0.3, workers=Workers(rank, count)) for rank in range(count)
    ]
    for step in (0, 3):
        parts = [vars(share.batch(step)) for share in shares]
        assert max(len(part["t"]) for part in parts) - min(len(part["t"]) for part in parts) <= 1
        for name, value in vars(whole.batch(step)).items():
            assert torch.equal(torch.cat([part[name] for part in parts]), value), name


def test_more_workers_than_rows_are_refused(shards: ShardedCollection) -> None:
    with pytest.raises(RPGError, match=r"train\.checkpoints_per_step: expected at least one for each of 5"):
        source(shards, checkpoints=4, workers=Workers(0, 5))


def test_a_batch_holds_the_sampled_tokens_and_what_belongs_to_them(shards: ShardedCollection) -> None:
    batch = source(shards).batch(2)
    layout = shards.layout
    assert batch.tokens.shape == (4, 3, layout.token_size)
    assert shards.conditions is not None
    for b in range(4):
        (checkpoint,) = (shards.conditions == batch.condition[b]).all(1).nonzero().flatten().tolist()
        indices = batch.indices[b]
        assert len(torch.unique(indices)) == 3
        assert torch.equal(batch.tokens[b], shards.read(checkpoint, indices))
        assert torch.equal(batch.mask[b], layout.mask()[indices])
    assert batch.noise.shape == batch.tokens.shape
    assert batch.dropped is None


def test_there_are_no_more_tokens_than_the_layout_has(shards: ShardedCollection) -> None:
    batch = source(shards, tokens=1000).batch(0)
    everything = torch.arange(shards.layout.tokens)
    for indices in batch.indices:
        assert torch.equal(indices.sort().values, everything)


def test_only_sampled_tokens_are_read(shards: ShardedCollection, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple[list[int], npt.NDArray[np.int64]]] = []
    read = ShardedCollection.read_batch

    def spy(
        self: ShardedCollection, checkpoints: list[int], tokens: npt.NDArray[np.int64], pinned: bool
    ) -> Tensor:
        asked.append((checkpoints, tokens))
        return read(self, checkpoints, tokens, pinned)

    def refuse(*arguments: Any) -> None:
        raise AssertionError("reads more than a batch")

    monkeypatch.setattr(ShardedCollection, "read_batch", spy)
    monkeypatch.setattr(ShardedCollection, "read", refuse)
    batch = source(shards).batch(0)
    ((checkpoints, tokens),) = asked
    assert len(checkpoints) == 4
    assert tokens.shape == (4, 3)
    assert np.array_equal(tokens, batch.indices.numpy())


def seen(shards: ShardedCollection, checkpoints: int, steps: int, seed: int = 5) -> list[int]:
    """The checkpoints of the first steps, by their conditions."""
    assert shards.conditions is not None
    chosen = source(shards, checkpoints, seed=seed)
    conditions = torch.cat([chosen.batch(step).condition for step in range(steps)])
    return [int((shards.conditions == row).all(1).nonzero()) for row in conditions]


@pytest.mark.parametrize("checkpoints", [1, 3, 5, 10, 24])
def test_every_checkpoint_comes_once_an_epoch(shards: ShardedCollection, checkpoints: int) -> None:
    steps = 30 // checkpoints + 1
    found = seen(shards, checkpoints, steps)
    for step in range(1, steps + 1):
        counts = Counter(found[: step * checkpoints])
        most, least = max(counts.values()), min(counts[i] for i in range(COUNT))
        # In the middle of an epoch some are one ahead.
        assert most - least <= 1
    assert seen(shards, checkpoints, steps, seed=6) != found


def test_epochs_have_different_orders() -> None:
    orders = [epoch_order(1, epoch, 50) for epoch in range(6)]
    assert all(torch.equal(order.sort().values, torch.arange(50)) for order in orders)
    assert len({tuple(order.tolist()) for order in orders}) == 6
    assert torch.equal(epoch_order(1, 0, 50), orders[0])


def test_batches_follow_a_new_order_in_every_epoch(shards: ShardedCollection) -> None:
    found = seen(shards, checkpoints=1, steps=30)
    assert found[:10] != found[10:20] != found[20:]
    assert found[10:20] == epoch_order(5, 1, COUNT).tolist()


def test_timesteps_are_spread_evenly_at_every_step(shards: ShardedCollection) -> None:
    chosen = source(shards, checkpoints=20)
    levels = []
    for step in range(100):
        t = chosen.batch(step).t
        assert t.dtype == torch.int64
        assert torch.equal((t * 20 // 1000).sort().values, torch.arange(20))
        levels.append(t)
    inside = torch.cat(levels) % 50
    assert inside.double().mean().item() == pytest.approx(24.5, abs=5 * 14.4 / 2000**0.5)


@pytest.mark.parametrize("together", [1, 16])
def test_noise_is_standard_normal_and_new_at_every_step(
    shards: ShardedCollection, together: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(_ROWS_TOGETHER, "cpu", together)
    noise = torch.stack([source(shards, 64, 4).batch(step).noise.flatten() for step in range(8)]).double()
    count = noise.numel()
    assert noise.mean().abs() < 5 / count**0.5
    assert (noise.var() - 1).abs() < 5 * (2 / count) ** 0.5
    correlation = torch.corrcoef(noise) - torch.eye(8)
    assert correlation.abs().max() < 5 / noise.shape[1] ** 0.5


def test_conditions_are_dropped_at_the_asked_rate(shards: ShardedCollection) -> None:
    chosen = source(shards, checkpoints=50, dropout=0.2)
    drops = [chosen.batch(step).dropped for step in range(60)]
    dropped = torch.cat([d for d in drops if d is not None])
    assert dropped.dtype == torch.bool
    assert dropped.double().mean().item() == pytest.approx(0.2, abs=5 * (0.16 / 3000) ** 0.5)


def test_seeds_for_different_purposes_differ() -> None:
    seeds = {derived_seed(s, p, n) for s in range(5) for p in ("step", "epoch") for n in range(100)}
    assert len(seeds) == 1000
    assert all(0 <= seed < 2**63 for seed in seeds)
