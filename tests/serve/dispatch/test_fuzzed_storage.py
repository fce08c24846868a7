"""Whatever was done to a file of a storage, the service starts, names what is wrong, and serves all else."""

import asyncio
import resource
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from rpg.client.schema import JobState
from serve.config import LimitsConfig, RetentionConfig, ServeConfig
from serve.dispatch.api import DispatcherAPI
from serve.dispatch.dispatcher import Dispatcher
from serve.dispatch.records import JobProgress
from serve.dispatch.store import JobStore
from tests.mutations import LINKED_DIRECTORY, Mutation, mutations_of
from tests.serve.conftest import CONDITIONS, NoMetrics, bearer, caller

InProcess = Callable[..., Any]
KEPT = {"kept.txt": b"kept"}


@pytest.fixture(scope="module")
def storage(
    saved_config: ServeConfig,
    saved: Path,
    in_process: InProcess,
    tmp_path_factory: pytest.TempPathFactory,
) -> tuple[Path, dict[str, str]]:
    """A storage of four jobs: one that nobody touches, one that has ended, and two, one with its models in a
    pack, that are half made."""
    config = ServeConfig(
        storage=str(tmp_path_factory.mktemp("fuzzed") / "storage"),
        roots=[str(saved.parent)],
        tokens=saved_config.tokens,
    )
    config.generators = [saved_config.generators[0].__class__("small", str(saved), num_gpus=0)]
    ids: dict[str, str] = {}

    async def run() -> None:
        async with in_process(config) as service:
            for name in ("healthy", "ended", "half", "packed"):
                asked = {
                    "generator": "small",
                    "conditions": CONDITIONS[:1],
                    "number": 2,
                    "pack": name == "packed",
                }
                answer = await service.client.post("/v1/jobs", json=asked, headers=bearer("alice"))
                ids[name] = answer.json()["id"]
                await service.ended(ids[name])

    asyncio.run(run())
    store = JobStore(Path(config.storage))
    for name in ("half", "packed"):
        progress = store.progress(store.manifest(ids[name]))
        half = {0: progress.made[0]}
        store.save(ids[name], JobProgress(JobState.running, progress.digest, made=half))
    return Path(config.storage), ids


def places(storage: Path, ids: dict[str, str]) -> list[str]:
    """The files of the jobs that may be touched, relative to the storage."""
    return sorted(
        str(path.relative_to(storage))
        for name in ("ended", "half", "packed")
        for path in (storage / "jobs" / ids[name]).rglob("*")
        if path.is_file()
    )


@settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_a_mutated_file_harms_its_own_job_alone(
    storage: tuple[Path, dict[str, str]], tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
) -> None:
    original, ids = storage
    place = tmp_path_factory.mktemp("mutated")
    outside, copy = place / "outside", place / "storage"
    outside.mkdir()
    (outside / "kept.txt").write_bytes(KEPT["kept.txt"])
    shutil.copytree(original, copy)
    name = data.draw(st.sampled_from(places(original, ids)))
    mutation: Mutation = data.draw(st.one_of(mutations_of(name), st.just(LINKED_DIRECTORY)))
    mutation.apply(copy / name, outside)
    before = {path: path.stat().st_mtime_ns for path in outside.rglob("*")}
    memory, start = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.monotonic()
    asyncio.run(check(copy, original, ids))
    assert time.monotonic() - start < 20
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - memory < 1_500_000, "kilobytes"
    assert {path: path.stat().st_mtime_ns for path in outside.rglob("*")} == before
    shutil.rmtree(place)


async def check(storage: Path, original: Path, ids: dict[str, str]) -> None:
    """Start on a storage, list it, read what it serves, remove all, as the routes would."""
    store = JobStore(storage, retry_seconds=())
    dispatcher = Dispatcher(store, LimitsConfig(), RetentionConfig(), NoMetrics())
    api = DispatcherAPI(dispatcher)
    await dispatcher.start()
    try:
        page = await api.jobs(caller("root"), None, None, 1000, None)
        page.model_dump_json()
        known = {job.id for job in page.jobs}
        quarantined = {each.id: each.reason for each in page.quarantined}
        assert not any("\n" in reason for reason in quarantined.values())
        assert ids["healthy"] in known and known.isdisjoint(quarantined)
        assert known | quarantined.keys() <= set(ids.values())
        for id in known:
            models = await api.models(caller("root"), id, 0, 1000)
            for model in models.models:
                path = f"jobs/{id}/models/model_{model.index:06d}.safetensors"
                if model.pack is None:
                    opened = store.open_model(id, model.index)
                else:
                    opened = store.open_packed(id, model.pack, model.offset, model.bytes)
                with opened as file:
                    content = file.read(2**20)
                assert len(content) == model.bytes
                # Where a job has ended, or no state names a model, a start compares no digest.
                if id == ids["healthy"] or (id == ids["half"] and model.index == 0):
                    assert content == (original / path).read_bytes()
        assert (await api.models(caller("root"), ids["healthy"], 0, 9)).models[1].index == 1
        for id in known | quarantined.keys():
            if await api.cancel_or_remove(caller("root"), id) is not None:
                assert await api.cancel_or_remove(caller("root"), id) is None
        assert not list((storage / "jobs").iterdir())
    finally:
        await dispatcher.stop()
