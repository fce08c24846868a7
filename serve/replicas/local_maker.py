"""A replica without Ray around it: one generator, its engine, and leases worked through."""

import asyncio
from collections import OrderedDict
from collections.abc import AsyncIterator, Callable
from pathlib import Path

from safetensors import SafetensorError

from rpg.collection.collection import Collection
from rpg.errors import RPGError
from rpg.generator.generator import CARD_FILE, Generator
from rpg.sampling.job import JobPlan
from rpg.sampling.model_writer import ModelFile
from rpg.storage.locations import location
from rpg.storage.node_cache import local_copy
from serve.config import CacheConfig, GeneratorEntry
from serve.dispatch.lease import Description, Embedded, Lease
from serve.dispatch.records import Made
from serve.dispatch.scheduler import not_judged
from serve.dispatch.store import JobStore
from serve.replicas.engine import Engine, device_of
from serve.replicas.preview import centre_sample
from serve.replicas.work import Work

_KEPT_PLANS = 64
_GATHER_SECONDS = 0.02
"""Finished models are told together: each message costs about as much as making a small network."""


class LocalMaker:
    """Makes models with a generator in this process. Its constructor loads the generator."""

    def __init__(
        self,
        entry: GeneratorEntry,
        store: JobStore,
        cache: CacheConfig,
        observe: Callable[[int, int, float], None] = lambda *batch: None,
    ) -> None:
        """`observe` is told (rows, places, seconds) of every batch.

        Raises:
            RPGError: naming what is wrong with the generator's files.
        """
        generator, self._card = load(entry, cache)
        self._store = store
        self._name = entry.name
        self._digest = generator.digest()
        self._generator = generator.to(device_of(entry.num_gpus))
        # Now, so that one that cannot be used ends the start and not the first request.
        self._encoder = generator.text_encoder() if generator.config.condition.encoder else None
        self._embedding = asyncio.Lock()
        self._judge = None
        if entry.collection:
            # Not before: task families bring scikit-learn with them.
            from rpg.evaluation.judge import Judge

            self._judge = Judge(
                Collection.load(location(entry.collection)), entry.images, device_of(entry.num_gpus)
            )
        self._plans: OrderedDict[str, tuple[JobPlan, bool]] = OrderedDict()
        self.engine = Engine(self._generator, observe)

    async def make(self, lease: Lease) -> AsyncIterator[list[Made] | str]:
        """See `serve.dispatch.lease.Maker`."""
        if lease.digest != self._digest:
            yield f"generator '{self._name}' was replaced by another version while the job was under way"
            return
        try:
            plan, evaluate = await asyncio.to_thread(self._plan, lease.job)
        except RPGError as error:
            yield str(error)
            return
        if evaluate and self._judge is None:
            yield f"evaluate: generator '{self._name}' is served without a collection to compare with"
            return
        events: asyncio.Queue[Made | Exception] = asyncio.Queue()
        loop = asyncio.get_running_loop()

        def report(event: Made | Exception) -> None:
            loop.call_soon_threadsafe(events.put_nowait, event)

        out = self._store.models(lease.job)
        judge = self._judge if evaluate else None
        work = Work(lease.job, lease.priority, plan, lease.models, out, report, judge)
        self.engine.submit(work)
        try:
            left = len(lease.models)
            while left:
                made, failure = await _gathered(events)
                if made:
                    left -= len(made)
                    yield made
                if failure is not None:
                    yield failure
                    return
        finally:
            self.engine.drop(work)

    async def embed(self, descriptions: list[str]) -> Embedded | str:
        """See `serve.dispatch.lease.Maker`."""
        encoder = self._encoder
        if encoder is None:
            return f"generator '{self._name}' was replaced by one without a text encoder"
        # One request at a time: threads are for plans and files as well.
        async with self._embedding:
            try:
                conditions = await asyncio.to_thread(lambda: [encoder.encode(text) for text in descriptions])
            except RPGError as error:
                return str(error)
        return Embedded(self._generator.config.condition.encoder, conditions)

    async def describe(self) -> Description:
        """See `serve.dispatch.lease.Maker`."""
        layout = self._generator.layout
        return Description(
            digest=self._digest,
            device=str(self._generator.positions.device),
            tokens=layout.tokens,
            token_size=layout.token_size,
            parameters=sum(parameter.numel() for parameter in self._generator.parameters()),
            model_bytes=ModelFile(Path("model.safetensors"), layout, {}).size,
            card=self._card,
            tensors=[
                (spec.name, tuple(spec.shape), str(spec.dtype).removeprefix("torch."))
                for spec in layout.specs
            ],
            centre=centre_sample(layout),
        )

    def _plan(self, job_id: str) -> tuple[JobPlan, bool]:
        """How a job's models are made, and whether they are evaluated."""
        if job_id not in self._plans:
            manifest = self._store.manifest(job_id)
            if manifest.encoder not in (None, self._generator.config.condition.encoder):
                raise RPGError(
                    f"generator '{self._name}' was replaced by one with another text encoder than the "
                    "descriptions were read with"
                )
            plan = JobPlan(self._generator, manifest.job, self._digest)
            if manifest.evaluate and manifest.job.conditions is None:
                raise RPGError(f"evaluate: {not_judged(self._name)}")
            self._plans[job_id] = plan, manifest.evaluate
            if len(self._plans) > _KEPT_PLANS:
                self._plans.popitem(last=False)
        return self._plans[job_id]


def load(entry: GeneratorEntry, cache: CacheConfig) -> tuple[Generator, str]:
    """A generator of the configuration, on the CPU, with its model card."""
    path = location(entry.path)
    local = local_copy(path, Path(cache.directory), int(cache.gigabytes * 1e9))
    try:
        generator = Generator.from_pretrained(local)
    except (RPGError, SafetensorError) as error:
        raise RPGError(str(error).replace(str(local), str(path).rstrip("/"))) from error
    try:
        return generator, (local / CARD_FILE).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError):
        return generator, generator.card()


async def _gathered(events: "asyncio.Queue[Made | Exception]") -> tuple[list[Made], str | None]:
    """What happened in a short while: finished models, and why the job fails, if it does."""
    first = await events.get()
    if isinstance(first, Made):
        await asyncio.sleep(_GATHER_SECONDS)
    made: list[Made] = []
    event: Made | Exception | None = first
    while event is not None:
        if isinstance(event, RPGError | OSError):
            return made, " ".join(str(event).split())
        if isinstance(event, Exception):
            raise event
        made.append(event)
        event = None if events.empty() else events.get_nowait()
    return made, None
