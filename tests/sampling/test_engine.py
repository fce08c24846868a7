"""The engine without anything around it: batches, writers, requests that are dropped or made twice."""

import errno
import os
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch

from rpg.collection.layout import Layout
from rpg.collection.statistics import LayoutStatistics
from rpg.config import Normalisation, RecurrentKind, SamplingConfig, Solver
from rpg.errors import RPGError
from rpg.generator.generator import Generator
from rpg.sampling.engine import Engine
from rpg.sampling.generate import run_job
from rpg.sampling.job import GenerationJob, JobPlan
from rpg.sampling.model_writer import ModelWriter
from rpg.sampling.request import FinishedModel, Request
from rpg.sampling.writers import LARGE_VALUES
from rpg.storage import small_files
from tests.sampling.test_model_directory import MODEL


@pytest.fixture(scope="module")
def generator(make_generator: Callable[..., Generator], make_layout: Callable[..., Layout]) -> Generator:
    return make_generator(make_layout(16), recurrent=RecurrentKind.lstm, dropout=0.1)


@pytest.fixture(params=[0, LARGE_VALUES], ids=["large", "small"])
def engine(generator: Generator, request: pytest.FixtureRequest) -> Iterator[Engine]:
    """One that runs in a thread; its models are written as large ones are, and as small ones."""
    with running(Engine(generator, large_values=request.param)) as engine:
        yield engine


@contextmanager
def running(engine: Engine) -> Iterator[Engine]:
    thread = threading.Thread(target=engine.run)
    thread.start()
    try:
        yield engine
    finally:
        engine.stop()
        thread.join(30)
        assert not thread.is_alive()


class Events(list[int | BaseException]):
    """What came of a request: finished models, and why it failed."""

    def __init__(self) -> None:
        super().__init__()
        self.news = threading.Condition()

    def report(self, event: int | BaseException) -> None:
        with self.news:
            self.append(event)
            self.news.notify_all()

    def wait(self, count: int) -> None:
        with self.news:
            assert self.news.wait_for(lambda: len(self) >= count, timeout=30), self


def request_for(
    generator: Generator,
    out: Path,
    events: Events,
    models: range,
    job: str = "a",
    seed: int = 0,
    **sampling: int,
) -> Request:
    settings = SamplingConfig(
        **{**vars(SamplingConfig(solver=Solver.ddim, steps=3, token_batch=32)), **sampling}
    )
    plan = JobPlan(generator, GenerationJob([[seed, 1.0, 2.0]], 1000, seed, settings))

    def finish(models: Sequence[FinishedModel]) -> None:
        for finished in models:
            if not request.dropped:
                events.report(finished.model)

    request = Request(plan, models, out, finish, events.report, job=job)
    return request


def test_jobs_of_other_seeds_and_conditions_share_batches(engine: Engine, tmp_path: Path) -> None:
    """A batch of 32 rows has room for two models of 15 tokens, and where models are written token by token
    for two tokens of a third."""
    everyone = [Events() for _ in range(40)]
    requests = [
        request_for(engine.generator, tmp_path / str(i), events, range(1), job=str(i), seed=i, steps=50)
        for i, events in enumerate(everyone)
    ]
    for each in requests:
        engine.submit(each)
    for events in everyone:
        events.wait(1)
    assert engine.statistics.tokens == 40 * 15
    # One may begin before the others are there.
    assert engine.statistics.batches <= 40 / 2 + 2
    assert all((tmp_path / str(i) / "model_000000.safetensors").is_file() for i in range(40))


def test_models_asked_for_twice_are_written_once(engine: Engine, tmp_path: Path) -> None:
    """A dispatcher that died has left its leases behind; the next one hands out the same models."""
    first, second = Events(), Events()
    engine.submit(request_for(engine.generator, tmp_path, first, range(100), steps=50))
    first.wait(5)
    engine.submit(request_for(engine.generator, tmp_path, second, range(90, 120), steps=50))
    second.wait(30)
    assert isinstance(first[-1], RuntimeError)
    assert {event for event in second if isinstance(event, int)} == set(range(90, 120))
    names = {path.name for path in tmp_path.iterdir()}
    assert not [name for name in names if name.endswith(".partial")]
    assert {f"model_{i:06d}.safetensors" for i in range(90, 120)} <= names


def test_a_dropped_request_leaves_no_half_files(engine: Engine, tmp_path: Path) -> None:
    events, others = Events(), Events()
    dropped = request_for(engine.generator, tmp_path, events, range(1000), steps=50)
    engine.submit(dropped)
    events.wait(3)
    engine.drop(dropped)
    engine.submit(request_for(engine.generator, tmp_path / "other", others, range(4), job="b"))
    others.wait(4)
    assert len(events) < 1000
    assert not list(tmp_path.glob(".*.partial"))


def test_a_full_disk_fails_the_request_and_leaves_no_half_files(
    generator: Generator, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    put, write = ModelWriter._put, small_files._write

    def limited(file: ModelWriter, position: int, data: memoryview) -> None:
        if file.path == tmp_path / "model_000002.safetensors" and position > file.size // 2:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        put(file, position, data)

    def limited_whole(directory: int, path: Path, content: bytes) -> None:
        if path == tmp_path / "model_000002.safetensors":
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        write(directory, path, content)

    monkeypatch.setattr(ModelWriter, "_put", limited)
    monkeypatch.setattr(small_files, "_write", limited_whole)
    for large_values in (0, LARGE_VALUES):
        events, others = Events(), Events()
        with running(Engine(generator, large_values=large_values)) as engine:
            engine.submit(request_for(generator, tmp_path, events, range(50), steps=50))
            engine.submit(request_for(generator, tmp_path / "other", others, range(50), job="b", steps=50))
            others.wait(50)
        assert sorted(others) == list(range(50))
        [reason] = [str(event) for event in events if not isinstance(event, int)]
        assert reason == f"{tmp_path}/model_000002.safetensors: cannot be written: No space left on device"
        assert not list(tmp_path.glob(".*.partial"))


def test_an_engine_that_is_stopped_leaves_no_half_files(generator: Generator, tmp_path: Path) -> None:
    events = Events()
    with running(Engine(generator)) as engine:
        engine.submit(request_for(generator, tmp_path, events, range(1000), steps=50))
        events.wait(3)
    names = {path.name for path in tmp_path.iterdir()}
    assert names == {f"model_{index:06d}.safetensors" for index in events if isinstance(index, int)}
    assert 3 <= len(names) < 1000


def test_models_that_are_there_are_not_sampled(generator: Generator, tmp_path: Path) -> None:
    events = Events()
    asked = request_for(generator, tmp_path, events, range(10))
    asked.is_there = lambda index: index % 2 == 0
    with Engine(generator) as engine:
        engine.submit(asked)
        while engine.step():
            pass
    assert sorted(events) == [1, 3, 5, 7, 9]
    assert engine.statistics.tokens == 5 * generator.layout.tokens


def test_a_model_is_the_same_whatever_it_is_packed_with(generator: Generator, tmp_path: Path) -> None:
    """Alone, stepped and written by several threads, or among other jobs in a thread."""
    alone, stepped, among = (tmp_path / name for name in ("alone", "stepped", "among"))
    for index in range(5):
        run_job(generator, request_for(generator, alone, Events(), range(1)).plan.job, [index], alone)
    with Engine(generator, large_values=0) as engine:
        engine.submit(request_for(generator, stepped, Events(), range(5)))
        while engine.step():
            pass
    with running(Engine(generator)) as engine:
        everyone = [Events() for _ in range(4)]
        for seed, events in enumerate(everyone):
            out = among if seed == 0 else tmp_path / f"other{seed}"
            engine.submit(request_for(generator, out, events, range(5), job=str(seed), seed=seed))
        for events in everyone:
            events.wait(5)
    for path in alone.iterdir():
        assert path.read_bytes() == (stepped / path.name).read_bytes() == (among / path.name).read_bytes()
    assert len(list(alone.iterdir())) == 5


def test_a_layout_of_constants_alone(make_generator: Callable[..., Generator], tmp_path: Path) -> None:
    same = {"weight": torch.ones(3)}
    statistics = LayoutStatistics(same)
    for _ in range(2):
        statistics.update(same)
    generator = make_generator(statistics.layout(8, Normalisation.residual))
    events = Events()
    with running(Engine(generator)) as engine:
        engine.submit(request_for(generator, tmp_path, events, range(3)))
        events.wait(3)
    assert len(list(tmp_path.iterdir())) == 3


def test_a_network_of_one_token_may_be_a_directory(
    make_generator: Callable[..., Generator], make_layout: Callable[..., Layout], tmp_path: Path
) -> None:
    """All of it is in one row, and it is no small file for all that."""
    layout = make_layout(8, {"weight": torch.zeros(5)}).with_companions(MODEL)
    assert layout.tokens == 1
    events = Events()
    with running(Engine(make_generator(layout))) as engine:
        engine.submit(request_for(engine.generator, tmp_path, events, range(3)))
        events.wait(3)
    assert sorted(events) == [0, 1, 2]
    for index in range(3):
        found = {path.name for path in (tmp_path / f"model_{index:06d}").iterdir()}
        assert found == {MODEL.weights_name, *MODEL.files}


def test_a_broken_sampler_is_told_to_all(engine: Engine, tmp_path: Path) -> None:
    events = Events()
    engine.generator.denoiser.prepare, kept = None, engine.generator.denoiser.prepare  # type: ignore[assignment]
    try:
        engine.submit(request_for(engine.generator, tmp_path, events, range(3)))
        events.wait(1)
    finally:
        engine.generator.denoiser.prepare = kept  # type: ignore[assignment]
    assert not isinstance(events[0], int | RPGError)
    assert engine.broken is not None
    with pytest.raises(RuntimeError, match="the engine has stopped"):
        engine.submit(request_for(engine.generator, tmp_path, events, range(3)))
