"""Reconciling: what is served is made to agree with the configuration file, whenever that changes."""

import asyncio
import logging
from dataclasses import dataclass, replace

import ray

from rpg.config import GeneratorConfig, generator_config_from_yaml
from rpg.errors import RPGError
from rpg.generator.saving import CONFIG_FILE
from rpg.storage.errors import StorageError
from rpg.storage.locations import fetched, identity, location
from serve.config import ConfigFile, GeneratorEntry, ServeConfig
from serve.dispatch.dispatcher import Dispatcher
from serve.dispatch.served_generator import ServedGenerator
from serve.replicas.apps import GeneratorApps, check_capacity

_log = logging.getLogger("ray.serve")


@dataclass(frozen=True)
class DesiredState:
    """What is to be served. All of it is known here, so that nothing can be wrong while it is brought about.

    Attributes:
        config: what the service was started with, but with the generators to serve.
        served: these generators, by name.
        apps: the names of their applications, by the same names.
    """

    config: ServeConfig
    served: dict[str, ServedGenerator]
    apps: dict[str, str]


class Reconciler:
    """Keeps a dispatcher's generators and their applications as the configuration file names them.

    A file that cannot be read, is not valid, or asks for more than the cluster has changes nothing. Only the
    generators of a changed file are taken up: all else in it waits for the service to be started again.
    """

    def __init__(
        self,
        dispatcher: Dispatcher,
        apps: GeneratorApps,
        file: ConfigFile,
        config: ServeConfig,
        *,
        poll_seconds: float = 2.0,
    ) -> None:
        """`config` is what the service was started with; `file` is looked at every `poll_seconds`."""
        self._dispatcher = dispatcher
        self._apps = apps
        self._file = file
        self._config = config
        self._poll_seconds = poll_seconds
        self._seen: object | None = None
        self._served: dict[str, str] = {}
        self.task: asyncio.Task[None] | None = None

    async def start(self) -> None:
        """Serve the generators that the file names now, and follow its changes from here on."""
        generators = self._config.generators
        try:
            self._seen = identity(self._file.path)
            generators = self._file.read().generators
        except RPGError as error:
            # The file may lie on another node, or somebody may be editing it. What the service was started
            # with is valid.
            _log.warning("%s", error)
        await self.reconcile(await asyncio.to_thread(self.desired_state, generators))
        self.task = asyncio.create_task(self._watch())

    def desired_state(self, generators: list[GeneratorEntry]) -> DesiredState:
        """What it takes to serve these generators and no others. Blocks, and changes nothing.

        Raises:
            RPGError: naming the file of a generator that does not exist, or a storage that does not answer.
        """
        config = replace(self._config, generators=generators)
        configs = generator_configs(config)
        served = {
            entry.name: ServedGenerator(
                entry.name,
                configs[entry.name],
                max(entry.replicas, entry.max_replicas),
                has_collection=bool(entry.collection),
                has_test=bool(entry.tasks or entry.evaluate.command),
            )
            for entry in generators
        }
        return DesiredState(config, served, self._apps.wanted(config))

    async def reconcile(self, desired: DesiredState) -> None:
        """Serve what is desired and nothing else; generators that have not changed are not touched.

        Where this ends half way, the next call goes on from what it finds.
        """
        for name in self._dispatcher.schedulers.keys() - desired.served.keys():
            self._served.pop(name, None)
            await self._dispatcher.remove_generator(name)
        for name, served in desired.served.items():
            if self._served.get(name) != desired.apps[name]:
                await self._dispatcher.add_generator(served)
                self._served[name] = desired.apps[name]
        # Applications are ended first, because the new ones may need their GPUs.
        await asyncio.to_thread(self._apps.remove_others, desired.apps.values())
        await asyncio.to_thread(self._apps.add, desired.config, desired.apps)
        for name, app in desired.apps.items():
            scheduler = self._dispatcher.schedulers[name]
            if scheduler.replicas is None:
                scheduler.start(await asyncio.to_thread(self._apps.replicas, app))

    async def _watch(self) -> None:
        while True:
            await asyncio.sleep(self._poll_seconds)
            try:
                now = await asyncio.to_thread(identity, self._file.path)
                if now in (None, self._seen):
                    continue
                self._seen = now
                desired = await self._desired_by_file()
                if desired is not None:
                    await self.reconcile(desired)
            except StorageError as error:
                _log.error("the generators stay as they are for now: %s", error)
                self._seen = None
            except Exception:
                _log.exception("%s could not be taken up; it is tried again", self._file.path)
                self._seen = None

    async def _desired_by_file(self) -> DesiredState | None:
        """What the file asks for; None if it asks for what cannot be served.

        Raises:
            StorageError: if a storage does not answer, in which case another attempt may go well.
        """
        try:
            generators = (await asyncio.to_thread(self._file.read)).generators
            check_capacity(
                replace(self._config, generators=generators),
                ray.cluster_resources(),  # type: ignore[no-untyped-call]
            )
            return await asyncio.to_thread(self.desired_state, generators)
        except RPGError as error:
            if isinstance(error, StorageError) and not isinstance(error.__cause__, FileNotFoundError):
                raise
            _log.error("the generators stay as they are: %s", error)
            return None


def generator_configs(config: ServeConfig) -> dict[str, GeneratorConfig]:
    """The configurations of the generators to serve, by name.

    Raises:
        RPGError: naming the file of a generator that does not exist.
    """
    configs = {}
    for entry in config.generators:
        with fetched(location(entry.path) / CONFIG_FILE) as local:
            configs[entry.name] = generator_config_from_yaml(local)
    return configs
