"""Generation jobs: what is asked for, and how one generator makes its models."""

import dataclasses
import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache

import torch
from torch import Tensor

from rpg.collection.companions import Companions
from rpg.config import (
    ConditionConfig,
    ConditionKind,
    Count,
    Finite,
    SamplingConfig,
    Seed,
    TokenDtype,
    validate_sampling,
)
from rpg.errors import RPGError
from rpg.generator.generator import Generator
from rpg.sampling.model_format import ModelFormat
from rpg.sampling.model_writer import ModelWriter
from rpg.sampling.noise import permutation_states
from rpg.sampling.precision import used_precision
from rpg.storage.locations import AnyPath


@dataclass(frozen=True)
class GenerationJob:
    """What is asked for: `number` models for each condition, or `number` in all where there are none.

    Model i belongs to condition i // number. It is determined by the generator, its condition, the seed, i
    and the sampling settings alone. `dtype` is the type that it is written in; None: the collection's own.

    Raises:
        RPGError: if `number` is less than 1, or the seed out of range.
    """

    conditions: list[list[Finite]] | None
    number: Count
    seed: Seed
    sampling: SamplingConfig
    dtype: TokenDtype | None = None

    def __post_init__(self) -> None:
        if self.number < 1:
            raise RPGError(f"number: expected at least 1 model, got {self.number}")
        if not 0 <= self.seed < 2**64:
            raise RPGError(f"seed: expected 0 <= seed < 2**64, got {self.seed}")

    def __len__(self) -> int:
        """Models in the job."""
        return self.models

    @property
    def models(self) -> int:
        """Models in the job; unlike a length, it may be any integer."""
        return self.number * (1 if self.conditions is None else len(self.conditions))

    def condition_of(self, index: int) -> list[float] | None:
        """The condition that model `index` is asked for."""
        return None if self.conditions is None else self.conditions[index // self.number]


class JobPlan:
    """A job bound to the generator that makes its models: checked as a whole, then asked model by model.

    Attributes:
        job: what is asked for.
        sampling: the job's sampling settings as JSON; jobs of equal ones can share batches.
        values: values of a model that are sampled.
        companions: the files beside the weights of each model; where there are none, a model is one file.
        dtype: that models are written in; None: the layout's own.
    """

    def __init__(
        self,
        generator: Generator,
        job: GenerationJob,
        digest: str | None = None,
        companions: Companions | None = None,
    ) -> None:
        """Make the models of `job` with `generator`.

        Args:
            generator: what samples.
            job: what is asked for.
            digest: the generator's, where it is known already.
            companions: other files beside the weights than the generator's.

        Raises:
            RPGError: for a condition or a sampling setting that does not fit the generator.
        """
        validate_sampling(job.sampling, generator.config)
        config = generator.config.condition
        if config.kind == ConditionKind.vector and job.conditions is None:
            raise RPGError(f"condition: this generator needs one of {config.size} values")
        self.job = job
        self.companions = generator.layout.companions if companions is None else companions
        self.sampling = json.dumps(dataclasses.asdict(job.sampling))
        self.values = sum(spec.numel for spec in generator.layout.specs if spec.tokens)
        self._generator = generator
        self._conditions = [checked_condition(config, condition) for condition in job.conditions or []]
        digest = digest or generator.digest()
        dtype = [] if job.dtype is None else [job.dtype]
        asked = json.dumps([digest, job.conditions, job.number, job.seed, self.sampling, *dtype])
        self._provenance = {
            "format": "pt",
            "rpg.generator": digest,
            # A digest of all that was asked for.
            "rpg.job": hashlib.sha256(asked.encode()).hexdigest(),
            "rpg.sampling": self.sampling,
            # A device of another kind makes other values of the same job.
            "rpg.precision": used_precision(generator, job.sampling),
        }
        if job.dtype is not None:
            self._provenance["rpg.dtype"] = job.dtype
        self.dtype: torch.dtype | None = None if job.dtype is None else getattr(torch, job.dtype)
        # Models of one condition follow each other.
        self._condition_text = lru_cache(64)(self._written_condition)

    def condition_rows(self, models: Sequence[int]) -> Tensor:
        """What models are made for, as the generator takes it (`rpg.generator.condition`), a row each."""
        config, seed = self._generator.config.condition, self.job.seed
        if config.kind == ConditionKind.permutation:
            return torch.tensor(permutation_states(seed, models, config.size))
        if not self._conditions:
            return torch.zeros(len(models), 0)
        rows = torch.stack([self._conditions[index // self.job.number] for index in models])
        if not config.states:
            return rows
        states = rows.new_tensor(permutation_states(seed, models, config.states))
        return torch.cat([rows, states[:, None]], 1)

    @cached_property
    def format(self) -> ModelFormat:
        """Of the models' files."""
        return ModelFormat(self._generator.layout, self.dtype)

    def provenance(self, index: int) -> dict[str, str]:
        """The metadata of model `index`: all that it depends on."""
        return {
            **self._provenance,
            "rpg.index": str(index),
            "rpg.seed": str(self.job.seed),
            "rpg.condition": self._condition_text(index // self.job.number),
        }

    def path(self, index: int, out: AnyPath) -> AnyPath:
        """Where model `index` goes in the directory `out`: a directory or a file."""
        return out / (f"model_{index:06d}" + ("" if self.companions else ".safetensors"))

    def weights_path(self, index: int, out: AnyPath) -> AnyPath:
        """The file of weights of model `index` in the directory `out`."""
        return self.companions.weights_path(self.path(index, out))

    def open_file(self, index: int, out: AnyPath, root: AnyPath | None = None) -> ModelWriter:
        """Begin model `index` in the directory `out`, and with `root` write nothing outside of that.

        Raises:
            RPGError: naming the file or directory, if it cannot be written.
        """
        layout, path = self._generator.layout, self.path(index, out)
        return ModelWriter(path, layout, self.provenance(index), self.dtype, self.companions, root).open()

    def _written_condition(self, number: int) -> str:
        return json.dumps(None if self.job.conditions is None else self.job.conditions[number])


def checked_condition(config: ConditionConfig, condition: list[float]) -> Tensor:
    """A user's condition as a generator of this configuration takes it, float32 [size].

    Raises:
        RPGError: if the generator takes none, or one of another width, or a value is not finite.
    """
    if config.kind != ConditionKind.vector:
        raise RPGError(
            f"condition: this generator takes none (its kind is '{config.kind}'), got {len(condition)} values"
        )
    if len(condition) != config.size:
        raise RPGError(f"condition: expected {config.size} values, got {len(condition)}")
    values = torch.tensor(condition, dtype=torch.float32)
    if not values.isfinite().all():
        raise RPGError(f"condition: expected finite values, got {condition}")
    return values
