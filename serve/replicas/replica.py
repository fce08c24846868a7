"""A generator's replica on Ray Serve."""

from collections.abc import AsyncIterator
from contextlib import aclosing

import torch

from rpg.storage.locations import location
from serve.config import CacheConfig, GeneratorEntry
from serve.dispatch.lease import Description, Embedded, Lease
from serve.dispatch.records import Made
from serve.dispatch.store import JobStore
from serve.ray_metrics import BatchMeters
from serve.replicas.local_maker import LocalMaker


class GeneratorReplica:
    """One generator on one GPU, or on a CPU."""

    def __init__(self, entry: GeneratorEntry, storage: str, cache: CacheConfig) -> None:
        torch.set_num_threads(1)
        meters = BatchMeters(entry.name)
        self._maker = LocalMaker(entry, JobStore(location(storage)), cache, meters.batch)

    async def make(self, lease: Lease) -> AsyncIterator[list[Made] | str]:
        """See `serve.dispatch.lease.Maker`."""
        async with aclosing(self._maker.make(lease)) as events:  # type: ignore[type-var]
            async for event in events:
                yield event

    async def embed(self, descriptions: list[str]) -> Embedded | str:
        """See `serve.dispatch.lease.Maker`."""
        return await self._maker.embed(descriptions)

    async def describe(self) -> Description:
        """See `serve.dispatch.lease.Maker`."""
        return await self._maker.describe()

    def check_health(self) -> None:
        """Raise where Ray Serve is to start another replica instead."""
        if self._maker.engine.broken is not None:
            raise RuntimeError(f"sampling ended with {self._maker.engine.broken!r}")
