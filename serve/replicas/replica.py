"""A generator's replica: one generator, the engine that samples it, and leases worked through.

Nothing here needs Ray: Ray Serve deploys the class as it is (`serve.replicas.apps`).
"""

import asyncio
import threading
from collections import OrderedDict
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from safetensors import SafetensorError

from rpg.collection.checkpoint import read_checkpoint
from rpg.collection.collection import Collection
from rpg.collection.companions import Companions
from rpg.collection.layout import Layout
from rpg.config import ConditionKind
from rpg.encoders import Encoder
from rpg.errors import RPGError
from rpg.generator.generator import Generator
from rpg.generator.saving import CARD_FILE
from rpg.sampling.engine import Engine
from rpg.sampling.job import JobPlan
from rpg.sampling.model_writer import ModelWriter
from rpg.sampling.request import FinishedModel, Request
from rpg.storage.below import read_below
from rpg.storage.locations import location
from rpg.storage.node_cache import local_copy
from rpg.words.properties import CLASSES
from rpg.words.sentences import SentenceUnderstanding
from rpg.words.understood import Understood
from serve.config import CacheConfig, GeneratorEntry
from serve.dispatch.lease import Embedded, GeneratorReport, Lease
from serve.dispatch.records import Made
from serve.dispatch.served_generator import why_not_evaluated
from serve.dispatch.store import JobStore

if TYPE_CHECKING:
    from rpg.evaluation.single_network import SingleNetworkJudge

PREVIEW_VALUES = 64
"""Most values of a tensor in a preview: enough for a picture, and few for the largest networks."""

_KEPT_PLANS = 64
_MOST_CARD_BYTES = 2**20
_GATHER_SECONDS = 0.02
"""Finished models are sent together, since each message costs about as much as making a small network."""


def _uncounted(generator: str) -> Callable[[int, int, float], None]:
    return lambda rows, places, seconds: None


@dataclass(frozen=True)
class _Plan:
    """How the models of a job are made, and what measures them, if the job asks for that."""

    models: JobPlan
    judge: "SingleNetworkJudge | None"
    description_of: Callable[[int], str | None]
    packed: bool


class Replica:
    """Makes models with a generator in this process, on one GPU or on a CPU."""

    def __init__(
        self,
        entry: GeneratorEntry,
        storage: str,
        cache: CacheConfig,
        batch_metrics: Callable[[str], Callable[[int, int, float], None]] = _uncounted,
    ) -> None:
        """Load the generator and start to sample.

        Args:
            entry: the generator to serve.
            storage: directory or URI of the service's jobs.
            cache: where a generator behind a URI is copied to.
            batch_metrics: makes, for a generator's name, what is told (rows, places, seconds) of every batch.

        Raises:
            RPGError: naming what is wrong with the generator's files, or the storage that refuses.
        """
        torch.set_num_threads(1)
        device = torch.device("cuda" if entry.num_gpus else "cpu")
        self.generator, self._card = _load(entry, cache)
        self._name = entry.name
        self._store = JobStore(location(storage))
        self._digest = self.generator.digest()
        self._store.keep_companions(self._digest, self.generator.layout.companions)
        self.generator.to(device)
        # An encoder that cannot be used shall end the start, and not the first request that needs it.
        self._encoder = self.generator.text_encoder() if self.generator.config.condition.encoder else None
        self._embedding = asyncio.Lock()
        self._judge = _load_judge(entry, self.generator, device)
        self._plans: OrderedDict[str, _Plan] = OrderedDict()
        self.engine = Engine(self.generator, in_background=True, observe=batch_metrics(entry.name))
        self._sampling = threading.Thread(target=self.engine.run, name="sample", daemon=True)
        self._sampling.start()

    async def make(self, lease: Lease) -> AsyncIterator[list[Made] | str]:
        """Yield finished models as they are there; text says why the job cannot be made, and is the end.

        Closing the iterator stops the work within a denoising batch. Any exception means that the replica is
        lost: what has not been yielded may be asked for again.
        """
        if lease.digest != self._digest:
            yield f"generator '{self._name}' was replaced by another version while the job was under way"
            return
        try:
            plan = await asyncio.to_thread(self._plan, lease.job)
        except RPGError as error:
            yield str(error)
            return
        events: asyncio.Queue[list[Made] | BaseException] = asyncio.Queue()
        loop = asyncio.get_running_loop()

        def report(event: list[Made] | BaseException) -> None:
            loop.call_soon_threadsafe(events.put_nowait, event)

        def finish(models: Sequence[FinishedModel]) -> None:
            if not request.dropped:
                report([_made(plan, model) for model in models])

        request = Request(
            plan.models,
            lease.models,
            self._store.models(lease.job),
            finish,
            report,
            hashed=True,
            packed=plan.packed,
            job=lease.job,
            priority=lease.priority,
            root=self._store.root,
        )
        self.engine.submit(request)
        try:
            left = len(lease.models)
            while left:
                made, failure = await _gathered(events, left)
                if made:
                    left -= len(made)
                    yield made
                if failure is not None:
                    yield failure
                    return
        finally:
            self.engine.drop(request)

    async def embed(self, descriptions: list[str]) -> Embedded | str:
        """Embed descriptions with the generator's text encoder; text says why that is not possible."""
        encoder = self._encoder
        if encoder is None:
            return f"generator '{self._name}' was replaced by one without a text encoder"
        # One request at a time, since plans and files need threads as well.
        async with self._embedding:
            try:
                conditions, understood = await asyncio.to_thread(_read, encoder, descriptions)
            except RPGError as error:
                return str(error)
        return Embedded(self.generator.config.condition.encoder, conditions, understood)

    async def understand(self, description: str) -> Understood | str:
        """Understand a description by the generator's words model; text says why that is not possible."""
        encoder = self._encoder
        if not isinstance(encoder, SentenceUnderstanding):
            return f"generator '{self._name}' has no words model, which would name classes"
        async with self._embedding:
            try:
                return await asyncio.to_thread(encoder.understand, description)
            except RPGError as error:
                return str(error)

    async def describe(self) -> GeneratorReport:
        """What is loaded."""
        layout = self.generator.layout
        return GeneratorReport(
            digest=self._digest,
            device=str(self.generator.positions.device),
            tokens=layout.tokens,
            token_size=layout.token_size,
            parameters=sum(parameter.numel() for parameter in self.generator.parameters()),
            model_bytes=ModelWriter(Path("model.safetensors"), layout, {}).size,
            card=self._card,
            tensors=[
                (spec.name, tuple(spec.shape), str(spec.dtype).removeprefix("torch."))
                for spec in layout.specs
            ],
            centre=centre_preview(layout),
            classes=list(CLASSES) if isinstance(self._encoder, SentenceUnderstanding) else None,
        )

    def check_health(self) -> None:
        """Raise where Ray Serve shall start another replica instead."""
        if self.engine.broken is not None:
            raise RuntimeError(f"sampling ended with {self.engine.broken!r}")

    def close(self) -> None:
        """End sampling after the batch at hand, and write what was sampled."""
        self.engine.stop()
        self._sampling.join()

    def _plan(self, job_id: str) -> _Plan:
        if job_id not in self._plans:
            self._plans[job_id] = self._new_plan(job_id)
            if len(self._plans) > _KEPT_PLANS:
                self._plans.popitem(last=False)
        return self._plans[job_id]

    def _new_plan(self, job_id: str) -> _Plan:
        """Read a job's manifest.

        Raises:
            RPGError: if this generator cannot make the job.
        """
        manifest = self._store.manifest(job_id)
        if manifest.encoder not in (None, self.generator.config.condition.encoder):
            raise RPGError(
                f"generator '{self._name}' was replaced by one with another text encoder than the "
                "descriptions were read with"
            )
        # The models of a job are kept as weights alone, since they have the same companions.
        plan = JobPlan(self.generator, manifest.job, self._digest, Companions())
        if not manifest.evaluate:
            return _Plan(plan, None, manifest.description_of, manifest.pack)
        if self._judge is None:
            raise RPGError(why_not_evaluated(self._name))
        return _Plan(plan, self._judge, manifest.description_of, manifest.pack)


def centre_preview(layout: Layout) -> list[tuple[str, list[float]]]:
    """A few values of the mean training checkpoint, so that a page can show how a network differs from it.

    Of each generated tensor its name and `min(numel, PREVIEW_VALUES)` values; value k of n is the one at
    `k * numel // n` of the flattened tensor.
    """
    return [
        (spec.name, [float(flat[k * spec.numel // count]) for k in range(count)])
        for spec in layout.specs
        if spec.tokens
        for flat, count in [(layout.centre[spec.name].view(-1), min(spec.numel, PREVIEW_VALUES))]
    ]


def _read(encoder: Encoder, descriptions: list[str]) -> tuple[list[list[float]], list[Understood] | None]:
    """The conditions that descriptions stand for, and what a words model understood of them."""
    if not isinstance(encoder, SentenceUnderstanding):
        return [encoder.encode(text) for text in descriptions], None
    understood = [encoder.understand(text) for text in descriptions]
    return [each.condition(text) for each, text in zip(understood, descriptions, strict=True)], understood


def _made(plan: _Plan, finished: FinishedModel) -> Made:
    """What is told of a finished model; what it is worth, where its job asks for that."""
    assert finished.sha256 is not None
    made = Made(finished.model, finished.sha256, finished.size)
    if finished.offset:
        made = made._replace(pack=finished.path.name, offset=finished.offset)
    if plan.judge is None:
        return made
    index, network = finished.model, read_checkpoint(finished.path)
    asked, description = plan.models.job.condition_of(index), plan.description_of(index)
    try:
        found = plan.judge.judge(f"model {index}", network, asked, description)
    except RPGError as error:
        # The model is there all the same.
        return made._replace(failure=str(error))
    metrics = dict(found.metrics)
    return made._replace(accuracy=metrics.get("accuracy"), similarity=found.similarity, metrics=metrics)


def _load(entry: GeneratorEntry, cache: CacheConfig) -> tuple[Generator, str]:
    """A generator of the configuration, on the CPU, with its model card."""
    path = location(entry.path)
    local = local_copy(path, Path(cache.directory), int(cache.gigabytes * 1e9))
    try:
        generator = Generator.from_pretrained(local)
    except (RPGError, SafetensorError) as error:
        raise RPGError(str(error).replace(str(local), str(path).rstrip("/"))) from error
    try:
        return generator, read_below(local, CARD_FILE, _MOST_CARD_BYTES).decode()
    except (RPGError, OSError, UnicodeDecodeError):
        return generator, generator.card()


def _load_judge(
    entry: GeneratorEntry, generator: Generator, device: torch.device
) -> "SingleNetworkJudge | None":
    """What measures the generator's models, where the configuration says what could."""
    has_test = bool(entry.tasks or entry.evaluate.command)
    takes_conditions = generator.config.condition.kind == ConditionKind.vector
    if not has_test and not (entry.collection and takes_conditions):
        return None
    # Imported where they are needed, because few services measure.
    from rpg.evaluation.configured_judge import configured_judge, family_that_measures
    from rpg.evaluation.single_network import SingleNetworkJudge

    collection = Collection.load(location(entry.collection)) if entry.collection else None
    family = family_that_measures(entry.tasks, entry.evaluate, collection)
    companions, shares_gpu = generator.layout.companions, bool(entry.num_gpus)
    judge = configured_judge(family, entry.evaluate, entry.images, device, companions, shares_gpu)
    return SingleNetworkJudge(judge, collection)


async def _gathered(
    events: "asyncio.Queue[list[Made] | BaseException]", left: int
) -> tuple[list[Made], str | None]:
    """What happened in a short while: finished models, and why the job fails, if it does.

    `left` models are unfinished yet; there is nothing to wait for once they are all there.
    """
    first = await events.get()
    if isinstance(first, list) and len(first) < left:
        await asyncio.sleep(_GATHER_SECONDS)
    made: list[Made] = []
    event: list[Made] | BaseException | None = first
    while event is not None:
        if isinstance(event, RPGError | OSError):
            return made, " ".join(str(event).split())
        if isinstance(event, BaseException):
            raise event
        made += event
        event = None if events.empty() else events.get_nowait()
    return made, None
