"""The engine without anything around it: batches, writers, works that are dropped or handed out twice."""

import errno
import os
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor

from rpg.collection.statistics import LayoutStatistics
from rpg.config import Normalisation, SamplingConfig
from rpg.errors import RPGError
from rpg.generator.generator import Generator
from rpg.sampling import job as job_module
from rpg.sampling.fair_queue import FairQueue
from rpg.sampling.job import GenerationJob, JobPlan
from rpg.sampling.model_writer import ModelFile
from serve.dispatch.records import Made
from serve.replicas.engine import Engine
from serve.replicas.work import Work


@pytest.fixture(params=[0, 2**20], ids=["large", "small"])
def engine(
    generator: Generator, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch
) -> Iterator[Engine]:
    """Its models are written as large ones are, and as small ones."""
    monkeypatch.setattr(job_module, "_LARGE_VALUES", request.param)
    engine = Engine(generator)
    yield engine
    engine.close()


class Events(list[Made | Exception]):
    """What a work reported."""

    def __init__(self) -> None:
        super().__init__()
        self.news = threading.Condition()

    def report(self, event: Made | Exception) -> None:
        with self.news:
            self.append(event)
            self.news.notify_all()

    def wait(self, count: int) -> None:
        with self.news:
            assert self.news.wait_for(lambda: len(self) >= count, timeout=30), self


def work(
    generator: Generator,
    out: Path,
    events: Events,
    models: range,
    job: str = "a",
    seed: int = 0,
    **sampling: int,
) -> Work:
    settings = SamplingConfig(**{**vars(generator.config.sampling), **sampling})
    conditions = [[seed, 1.0, 2.0]]
    plan = JobPlan(generator, GenerationJob(conditions, 1000, seed, settings))
    return Work(job, 0, plan, models, out, events.report)


def test_jobs_of_other_seeds_and_conditions_share_batches(engine: Engine, tmp_path: Path) -> None:
    """A batch of 32 rows has room for two models of 15 tokens, and for two tokens of a third."""
    everyone = [Events() for _ in range(40)]
    works = [
        work(engine.generator, tmp_path / str(i), events, range(1), job=str(i), seed=i, steps=50)
        for i, events in enumerate(everyone)
    ]
    for each in works:
        engine.submit(each)
    for events in everyone:
        events.wait(1)
    assert engine.statistics.tokens == 40 * 15
    # One may begin before the others are there.
    assert engine.statistics.batches <= 40 * 15 / 32 + 2
    assert all((tmp_path / str(i) / "model_000000.safetensors").is_file() for i in range(40))


def test_models_asked_for_twice_are_written_once(engine: Engine, tmp_path: Path) -> None:
    """A dispatcher that died has left its leases behind; the next one hands out the same models."""
    first, second = Events(), Events()
    engine.submit(work(engine.generator, tmp_path, first, range(100), steps=50))
    first.wait(5)
    engine.submit(work(engine.generator, tmp_path, second, range(90, 120), steps=50))
    second.wait(30)
    assert isinstance(first[-1], RuntimeError)
    assert {event.model for event in second if isinstance(event, Made)} == set(range(90, 120))
    names = {path.name for path in tmp_path.iterdir()}
    assert not [name for name in names if name.endswith(".partial")]
    assert {f"model_{i:06d}.safetensors" for i in range(90, 120)} <= names


def test_a_dropped_work_leaves_no_half_files(engine: Engine, tmp_path: Path) -> None:
    events, others = Events(), Events()
    dropped = work(engine.generator, tmp_path, events, range(1000), steps=50)
    engine.submit(dropped)
    events.wait(3)
    engine.drop(dropped)
    engine.submit(work(engine.generator, tmp_path / "other", others, range(4), job="b"))
    others.wait(4)
    assert len(events) < 1000
    assert not list(tmp_path.glob(".*.partial"))


def test_a_full_disk_fails_the_work_and_leaves_no_half_files(
    engine: Engine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_token = ModelFile.write_token

    def full(file: ModelFile, index: int, values: Tensor) -> None:
        if file.path == tmp_path / "model_000002.safetensors" and index == 7:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        write_token(file, index, values)

    monkeypatch.setattr(ModelFile, "write_token", full)
    events, others = Events(), Events()
    engine.submit(work(engine.generator, tmp_path, events, range(50), steps=50))
    engine.submit(work(engine.generator, tmp_path / "other", others, range(50), job="b", steps=50))
    others.wait(50)
    assert all(isinstance(event, Made) for event in others)
    reason = str(events[-1])
    assert reason == f"{tmp_path}/model_000002.safetensors: cannot be written: No space left on device"
    engine.close()
    assert not list(tmp_path.glob(".*.partial"))


def test_a_layout_of_constants_alone(make_generator: Callable[..., Generator], tmp_path: Path) -> None:
    same = {"weight": torch.ones(3)}
    statistics = LayoutStatistics(same)
    for _ in range(2):
        statistics.update(same)
    generator = make_generator(statistics.layout(8, Normalisation.residual))
    engine, events = Engine(generator), Events()
    engine.submit(work(generator, tmp_path, events, range(3)))
    events.wait(3)
    engine.close()
    assert len(list(tmp_path.iterdir())) == 3


def test_a_broken_sampler_is_told_to_all(engine: Engine, tmp_path: Path) -> None:
    events = Events()
    engine.generator.denoiser.prepare, kept = None, engine.generator.denoiser.prepare  # type: ignore[assignment]
    try:
        engine.submit(work(engine.generator, tmp_path, events, range(3)))
        events.wait(1)
    finally:
        engine.generator.denoiser.prepare = kept  # type: ignore[assignment]
    assert not isinstance(events[0], Made | RPGError)
    assert engine.broken is not None
    with pytest.raises(RuntimeError, match="the engine has stopped"):
        engine.submit(work(engine.generator, tmp_path, events, range(3)))


class TestFairQueue:
    def test_the_least_served_is_next(self) -> None:
        queue: FairQueue[str] = FairQueue()
        for name in "abc":
            queue.join(name, 0)
        queue.served("a", 5)
        queue.served("b", 2)
        assert queue.order() == ["c", "b", "a"]
        assert queue.order(lambda name: name != "c") == ["b", "a"]

    def test_who_joins_late_neither_waits_nor_catches_up(self) -> None:
        queue: FairQueue[str] = FairQueue()
        queue.join("old", 0)
        queue.served("old", 1000)
        queue.join("new", 0)
        queue.served("new", 1)
        assert queue.order() == ["old", "new"]

    def test_nobody_waits_for_ever(self) -> None:
        """One priority for every ten seconds without a turn: 5 below is 50 seconds at most, then once."""
        now = 0.0
        queue: FairQueue[str] = FairQueue(lambda: now)
        queue.join("low", -5)
        queue.join("high", 0)
        turns = []
        for second in range(130):
            now = float(second)
            turns.append(queue.order()[0])
            queue.served(turns[-1], 1)
        assert [i for i, turn in enumerate(turns) if turn == "low"] == [50, 100]

    def test_priority_goes_before_all(self) -> None:
        queue: FairQueue[str] = FairQueue()
        queue.join("low", -1)
        queue.join("high", 1)
        queue.join("higher", 1)
        queue.served("high", 1e9)
        assert queue.order() == ["higher", "high", "low"]
        assert queue.shares("high", lambda name: True) == ["higher", "high"]
        queue.leave("high")
        assert "high" not in queue and len(queue) == 2
