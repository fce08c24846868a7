"""Which generators are served: as the configuration file says, now and whenever it changes."""

import asyncio
import logging

import ray

from rpg.config import GeneratorConfig, generator_config_from_yaml
from rpg.errors import RPGError
from rpg.generator.generator import CONFIG_FILE
from rpg.storage import fetched, identity, location
from serve.config import ConfigFile, ServeConfig
from serve.dispatcher import Dispatcher
from serve.feed import Served
from serve.generator_apps import GeneratorApps
from serve.handles import HandleMaker
from serve.placement import check_room

_LOOK_SECONDS = 2.0

_log = logging.getLogger("ray.serve")


class Roster:
    """Keeps a dispatcher's generators and their applications as the configuration file names them.

    A file that cannot be read, is not valid, or asks for more than the cluster has changes nothing. Only its
    generators are taken up: whatever else is changed in it waits for the service to be started again.
    """

    def __init__(self, dispatcher: Dispatcher, apps: GeneratorApps, file: ConfigFile) -> None:
        self._dispatcher = dispatcher
        self._apps = apps
        self._file = file
        self._seen: object | None = None
        self._served: dict[str, str] = {}
        self.task: asyncio.Task[None] | None = None

    async def start(self, config: ServeConfig) -> None:
        """Serve the generators of `config`, and follow the file from here on."""
        try:
            self._seen = identity(self._file.path)
            config = self._file.read()
        except RPGError as error:
            # It is another node's, or was being edited: what the service was started with is good.
            _log.warning("%s", error)
        await self.change(config)
        self.task = asyncio.create_task(self._follow())

    async def change(self, config: ServeConfig) -> None:
        """Serve the generators of `config` and no others; those that have not changed are not touched."""
        configs = await asyncio.to_thread(generator_configs, config)
        wanted = await asyncio.to_thread(self._apps.wanted, config)
        entries = {entry.name: entry for entry in config.generators}
        new = {name for name, app in wanted.items() if self._served.get(name) != app}
        for name in self._served.keys() - wanted.keys():
            await self._dispatcher.withdraw(name)
        feeds = {
            name: await self._dispatcher.announce(
                Served(
                    name,
                    configs[name],
                    max(entries[name].replicas, entries[name].max_replicas),
                    evaluates=bool(entries[name].collection),
                )
            )
            for name in new
        }
        # First those that go: the others may need their GPUs.
        await asyncio.to_thread(self._apps.remove_others, config)
        await asyncio.to_thread(self._apps.add, config)
        for name, feed in feeds.items():
            feed.start(HandleMaker(await asyncio.to_thread(self._apps.handle, wanted[name])))
        self._served = wanted

    async def _follow(self) -> None:
        while True:
            await asyncio.sleep(_LOOK_SECONDS)
            try:
                now = await asyncio.to_thread(identity, self._file.path)
                if now in (None, self._seen):
                    continue
                self._seen = now
                config = await asyncio.to_thread(self._file.read)
                check_room(config, ray.cluster_resources())  # type: ignore[no-untyped-call]
                await self.change(config)
            except RPGError as error:
                _log.error("the generators stay as they are: %s", error)
            except Exception:
                _log.exception("%s could not be taken up; it is tried again", self._file.path)
                self._seen = None


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
