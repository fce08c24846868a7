"""Reading ahead: batches come in order, one is read ahead, errors are raised at their step."""

import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from rpg.collection.shards import ShardedCollection
from rpg.config import TrainConfig
from rpg.errors import RPGError
from rpg.generator.generator import Batch
from rpg.training.batch import BatchSource, Prefetch
from rpg.training.workers import Workers


@pytest.fixture
def source(tmp_path: Path, make_collection: Callable[..., ShardedCollection]) -> BatchSource:
    shards = make_collection(tmp_path)
    config = TrainConfig(checkpoints_per_step=4, tokens_per_checkpoint=3)
    assert shards.conditions is not None
    return BatchSource(shards, shards.conditions, config, 5, 1000, 0.3, Workers(), torch.device("cpu"))


def test_batches_come_in_order(source: BatchSource) -> None:
    with Prefetch(source, 3, 8) as batches:
        found = [batches.next() for _ in range(5)]
    for step, batch in zip(range(3, 8), found, strict=True):
        for one, other in zip(batch.tensors(), source.batch(step).tensors(), strict=True):
            assert torch.equal(one, other)


def test_one_batch_is_read_ahead_and_no_more(source: BatchSource, monkeypatch: pytest.MonkeyPatch) -> None:
    read = source.batch
    begun: list[int] = []
    second = threading.Event()

    def batch(step: int) -> Batch:
        begun.append(step)
        if step == 1:
            second.set()
        return read(step)

    monkeypatch.setattr(source, "batch", batch)
    with Prefetch(source, 0, 9) as batches:
        batches.next()
        assert second.wait(10)
        time.sleep(0.05)
        assert begun == [0, 1]


def test_time_spent_waiting_is_counted(source: BatchSource, monkeypatch: pytest.MonkeyPatch) -> None:
    read = source.batch

    def slow(step: int) -> Batch:
        time.sleep(0.2)
        return read(step)

    monkeypatch.setattr(source, "batch", slow)
    with Prefetch(source, 0, 2) as batches:
        batches.next()
        assert 0.1 < batches.waited < 5
        waited = batches.waited
        time.sleep(0.5)
        batches.next()
        assert batches.waited - waited < 0.1


def test_an_error_of_reading_is_raised_at_the_step_of_its_batch(
    source: BatchSource, monkeypatch: pytest.MonkeyPatch
) -> None:
    read = source.batch

    def broken(step: int) -> Batch:
        if step == 1:
            raise RPGError("shard: damaged")
        return read(step)

    monkeypatch.setattr(source, "batch", broken)
    with Prefetch(source, 0, 5) as batches:
        batches.next()
        with pytest.raises(RPGError, match="shard: damaged"):
            batches.next()
