"""Which generators are served: as the configuration file says, now and whenever it changes."""

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
from serve.dispatch.proxies import HandleMaker
from serve.dispatch.scheduler import Served
from serve.replicas.apps import GeneratorApps
from serve.replicas.capacity import check_room

_LOOK_SECONDS = 2.0

_log = logging.getLogger("ray.serve")


@dataclass(frozen=True)
class Plan:
    """What is to be served, all of it known: nothing is left to find out while it is brought about.

    Attributes:
        config: what the service was started with, with the generators to serve.
        served: these, by name.
        apps: the names of their applications, by theirs.
    """

    config: ServeConfig
    served: dict[str, Served]
    apps: dict[str, str]


class Roster:
    """Keeps a dispatcher's generators and their applications as the configuration file names them.

    A file that cannot be read, is not valid, or asks for more than the cluster has changes nothing. Only its
    generators are taken up: whatever else is changed in it waits for the service to be started again.
    """

    def __init__(
        self, dispatcher: Dispatcher, apps: GeneratorApps, file: ConfigFile, config: ServeConfig
    ) -> None:
        """`config` is what the service was started with."""
        self._dispatcher = dispatcher
        self._apps = apps
        self._file = file
        self._config = config
        self._seen: object | None = None
        self._served: dict[str, str] = {}
        self.task: asyncio.Task[None] | None = None

    async def start(self) -> None:
        """Serve the generators that the file names now, and follow it from here on."""
        generators = self._config.generators
        try:
            self._seen = identity(self._file.path)
            generators = self._file.read().generators
        except RPGError as error:
            # It is another node's, or was being edited: what the service was started with is good.
            _log.warning("%s", error)
        await self.change(await asyncio.to_thread(self.plan, generators))
        self.task = asyncio.create_task(self._follow())

    def plan(self, generators: list[GeneratorEntry]) -> Plan:
        """How to serve these generators and no others. Blocks, and changes nothing.

        Raises:
            RPGError: naming the file of one that is not there, or a storage that cannot be asked.
        """
        config = replace(self._config, generators=generators)
        configs = generator_configs(config)
        served = {
            entry.name: Served(
                entry.name,
                configs[entry.name],
                max(entry.replicas, entry.max_replicas),
                has_collection=bool(entry.collection),
            )
            for entry in generators
        }
        return Plan(config, served, self._apps.wanted(config))

    async def change(self, plan: Plan) -> None:
        """Serve what is planned and nothing else; generators that have not changed are not touched.

        Where it ends half way, the next change goes on from what is there.
        """
        for name in self._dispatcher.feeds.keys() - plan.served.keys():
            self._served.pop(name, None)
            await self._dispatcher.withdraw(name)
        for name, served in plan.served.items():
            if self._served.get(name) != plan.apps[name]:
                await self._dispatcher.announce(served)
                self._served[name] = plan.apps[name]
        # First those that go: the others may need their GPUs.
        await asyncio.to_thread(self._apps.remove_others, plan.apps.values())
        await asyncio.to_thread(self._apps.add, plan.config, plan.apps)
        for name, app in plan.apps.items():
            feed = self._dispatcher.feeds[name]
            if feed.maker is None:
                feed.start(HandleMaker(await asyncio.to_thread(self._apps.handle, app)))

    async def _follow(self) -> None:
        while True:
            await asyncio.sleep(_LOOK_SECONDS)
            try:
                now = await asyncio.to_thread(identity, self._file.path)
                if now in (None, self._seen):
                    continue
                self._seen = now
                plan = await self._asked()
                if plan is not None:
                    await self.change(plan)
            except StorageError as error:
                _log.error("the generators stay as they are for now: %s", error)
                self._seen = None
            except Exception:
                _log.exception("%s could not be taken up; it is tried again", self._file.path)
                self._seen = None

    async def _asked(self) -> Plan | None:
        """What the file asks for; None if it cannot be had.

        Raises:
            StorageError: if a storage cannot be asked: another attempt may go well.
        """
        try:
            generators = (await asyncio.to_thread(self._file.read)).generators
            check_room(
                replace(self._config, generators=generators),
                ray.cluster_resources(),  # type: ignore[no-untyped-call]
            )
            return await asyncio.to_thread(self.plan, generators)
        except RPGError as error:
            if isinstance(error, StorageError) and not isinstance(error.__cause__, FileNotFoundError):
                raise
            _log.error("the generators stay as they are: %s", error)
            return None


def generator_configs(config: ServeConfig) -> dict[str, GeneratorConfig]:
    """The configurations of the generators to serve, by name.

    Raises:
        RPGError: naming the file of a generator that is not there.
    """
    configs = {}
    for entry in config.generators:
        with fetched(location(entry.path) / CONFIG_FILE) as local:
            configs[entry.name] = generator_config_from_yaml(local)
    return configs
