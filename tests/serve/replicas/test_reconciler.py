"""Generators that come and go with the configuration file, with a fake of Ray Serve."""

import asyncio
import logging
import os
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import ray
from ray import serve as ray_serve
from ray.serve.schema import ApplicationStatus

from rpg.config import save_config
from rpg.storage.errors import StorageError
from serve.config import ConfigFile, GeneratorEntry, ServeConfig, load_serve_config
from serve.dispatch.lease import Replicas
from serve.replicas import apps as generator_apps
from serve.replicas.apps import GeneratorApps
from serve.replicas.reconciler import Reconciler
from tests.serve.conftest import CONDITIONS, Service, bearer


@dataclass
class FakeServe:
    """In place of `ray.serve`: what runs, and how often ending something takes too long.

    Attributes:
        running: what each application's replicas are made with, by its name.
        ending: those that are being ended.
    """

    running: dict[str, tuple[Any, ...]] = field(default_factory=dict)
    ending: set[str] = field(default_factory=set)
    too_long: int = 0
    RunTarget = ray_serve.RunTarget
    deployment = staticmethod(ray_serve.deployment)

    def status(self) -> Any:
        def of(name: str) -> Any:
            ending = name in self.ending
            return SimpleNamespace(status=ApplicationStatus.DELETING if ending else ApplicationStatus.RUNNING)

        return SimpleNamespace(applications={name: of(name) for name in self.running})

    def delete(self, name: str) -> None:
        if self.too_long:
            self.too_long -= 1
            self.ending.add(name)
            raise TimeoutError(name)
        self.ending.discard(name)
        self.running.pop(name, None)

    def run_many(self, targets: list[Any], **options: Any) -> None:
        for each in targets:
            self.ending.discard(each.name)
            self.running[each.name] = each.target._bound_deployment.init_args

    def names(self) -> set[str]:
        """The generators whose applications run."""
        return {name.split(".")[1] for name in self.running}


class LocalApps(GeneratorApps):
    """Applications whose replicas are in this process."""

    def __init__(self, service: str, replicas: Replicas) -> None:
        super().__init__(service)
        self._replicas = replicas

    def replicas(self, application: str) -> Replicas:
        return self._replicas


@dataclass
class Followed:
    """A service that follows its file."""

    service: Service
    serve: FakeServe
    path: Path

    def write(self, config: ServeConfig) -> None:
        save_config(config, self.path)
        # Files that are written one soon after the other may have the same time.
        os.utime(self.path, ns=(0, self.path.stat().st_mtime_ns + 10**9))

    async def until(self, condition: Callable[[], bool]) -> None:
        async with asyncio.timeout(20):
            while not condition():
                await asyncio.sleep(0.01)

    async def makes_a_model(self) -> None:
        asked = {"generator": "small", "condition": CONDITIONS[0]}
        answer = await self.service.client.post("/v1/generate", json=asked, headers=bearer("alice"))
        assert answer.status_code == 200, answer.text


Following = Callable[[Callable[[Followed], Any]], None]


@pytest.fixture
def following(
    config: ServeConfig, in_process: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Following:
    """`following(run)`: calls `run` with a service of `config` that looks at its file all the time."""
    monkeypatch.setattr(ray, "cluster_resources", lambda: {"CPU": 4.0})
    fake = FakeServe()
    monkeypatch.setattr(generator_apps, "ray_serve", fake)

    @asynccontextmanager
    async def followed() -> AsyncIterator[Followed]:
        path = tmp_path / "serve.yaml"
        save_config(config, path)
        async with in_process(config) as service:
            file = ConfigFile.here(path)
            apps = LocalApps("rpg", service.replica)
            reconciler = Reconciler(
                service.dispatcher, apps, file, load_serve_config(path), poll_seconds=0.02
            )
            await reconciler.start()
            assert reconciler.task is not None
            try:
                yield Followed(service, fake, path)
            finally:
                reconciler.task.cancel()

    def call(run: Callable[[Followed], Any]) -> None:
        async def whole() -> None:
            async with followed() as each:
                await run(each)

        asyncio.run(whole())

    return call


def with_other(config: ServeConfig) -> ServeConfig:
    path = config.generators[0].path
    config.generators.append(GeneratorEntry("other", path, num_gpus=0))
    return config


def test_of_a_changed_file_only_the_generators_are_taken_up(
    config: ServeConfig, following: Following, tmp_path: Path
) -> None:
    storage = config.storage

    async def run(followed: Followed) -> None:
        (before,) = followed.serve.running
        scheduler = followed.service.dispatcher.schedulers["small"]
        config.storage = str(tmp_path / "elsewhere")
        config.cache.directory = str(tmp_path / "cache")
        followed.write(with_other(config))
        await followed.until(lambda: "other" in followed.serve.names())
        assert before in followed.serve.running
        assert {arguments[1] for arguments in followed.serve.running.values()} == {storage}
        assert {arguments[2].directory for arguments in followed.serve.running.values()} == {"~/.cache/rpg"}
        assert followed.service.dispatcher.schedulers["small"] is scheduler
        await followed.makes_a_model()

    following(run)


def test_a_change_that_ended_half_way_is_completed(config: ServeConfig, following: Following) -> None:
    with_other(config)

    async def run(followed: Followed) -> None:
        assert followed.serve.names() == {"small", "other"}
        followed.serve.too_long = 3
        del config.generators[1]
        followed.write(config)
        await followed.until(lambda: followed.serve.names() == {"small"})
        assert followed.serve.too_long == 0
        assert followed.service.dispatcher.schedulers.keys() == {"small"}
        await followed.makes_a_model()
        followed.write(with_other(config))
        await followed.until(lambda: followed.serve.names() == {"small", "other"})

    following(run)


def test_a_change_that_is_taken_back_half_way_leaves_the_generator_running(
    config: ServeConfig, following: Following
) -> None:
    """The old version takes long to end, and is then wanted again."""

    async def run(followed: Followed) -> None:
        (before,) = followed.serve.running
        followed.serve.too_long = 10**6
        config.generators[0].max_replicas = 2
        followed.write(config)
        await followed.until(lambda: bool(followed.serve.ending))
        config.generators[0].max_replicas = 0
        followed.write(config)
        await followed.until(lambda: not followed.serve.ending)
        assert set(followed.serve.running) == {before}
        await followed.makes_a_model()

    following(run)


def test_a_storage_that_cannot_be_asked_changes_nothing_and_is_asked_again(
    config: ServeConfig, following: Following, monkeypatch: pytest.MonkeyPatch
) -> None:
    identity, failures = generator_apps.identity, 5

    def failing(path: Any) -> object:
        nonlocal failures
        if failures:
            failures -= 1
            raise StorageError(f"{path}: cannot be read: the storage cannot be reached")
        return identity(path)

    async def run(followed: Followed) -> None:
        scheduler = followed.service.dispatcher.schedulers["small"]
        monkeypatch.setattr(generator_apps, "identity", failing)
        followed.write(with_other(config))
        async with asyncio.timeout(20):
            while failures:
                assert followed.service.dispatcher.schedulers == {"small": scheduler}
                await asyncio.sleep(0.005)
        await followed.until(lambda: followed.serve.names() == {"small", "other"})
        assert followed.service.dispatcher.schedulers["small"] is scheduler

    following(run)


def test_a_generator_that_is_not_there_changes_nothing(
    config: ServeConfig, following: Following, caplog: pytest.LogCaptureFixture, saved: Path
) -> None:
    async def run(followed: Followed) -> None:
        scheduler = followed.service.dispatcher.schedulers["small"]
        config.generators.append(GeneratorEntry("other", str(saved.parent / "none"), num_gpus=0))
        with caplog.at_level(logging.ERROR, "ray.serve"):
            followed.write(config)
            await followed.until(lambda: "the generators stay as they are" in caplog.text)
        assert followed.service.dispatcher.schedulers == {"small": scheduler}
        await followed.makes_a_model()

    following(run)
