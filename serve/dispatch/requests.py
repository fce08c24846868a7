"""From what a caller asks for to a job that can be made, or a refusal."""

import hashlib
from collections.abc import Mapping
from dataclasses import fields, replace

from rpg.client.schema import JobRequest
from rpg.config import SamplingConfig, validate_sampling
from rpg.errors import RPGError
from rpg.sampling.job import GenerationJob, checked_condition
from serve.config import LimitsConfig
from serve.dispatch.served_generator import ServedGenerator, why_not_evaluated
from serve.errors import ProblemError


def checked_job(
    request: JobRequest, generators: Mapping[str, ServedGenerator], limits: LimitsConfig
) -> GenerationJob:
    """The job that `request` asks for.

    Where the request gives descriptions, zeros stand for their embeddings, which only a replica can make: all
    else is checked before a description is read. `dataclasses.replace` then puts the embeddings in.

    Raises:
        ProblemError: 422, naming the field at fault.
    """
    served = generators.get(request.generator)
    if served is None:
        names = ", ".join(sorted(generators))
        raise ProblemError(422, f"generator: '{request.generator}' is not served; expected one of {names}")
    config = served.config
    conditions = request.conditions
    if request.descriptions is not None:
        _check_descriptions(request, served, limits)
        conditions = [[0.0] * config.condition.size for _ in request.descriptions]
    models = request.number * len(conditions or [None])
    sampling = _sampling(request, config.sampling)
    if (excess := beyond_limits(models, len(conditions or []), sampling.steps, limits)) is not None:
        raise ProblemError(422, excess)
    if served.takes_conditions and conditions is None:
        or_else = ", or descriptions" if served.takes_descriptions else ""
        raise ProblemError(
            422, f"conditions: this generator needs ones of {config.condition.size} values{or_else}"
        )
    try:
        validate_sampling(sampling, config)
        for condition in conditions or []:
            checked_condition(config.condition, condition)
    except RPGError as error:
        raise ProblemError(422, str(error)) from error
    # Whole numbers in JSON are integers in Python, and would be written differently.
    floats = None if conditions is None else [[float(value) for value in row] for row in conditions]
    if request.evaluate and not served.evaluates:
        raise ProblemError(422, why_not_evaluated(request.generator))
    return GenerationJob(floats, request.number, request.seed, sampling, request.dtype)


def beyond_limits(models: int, conditions: int, steps: int, limits: LimitsConfig) -> str | None:
    """The limit that a job of so many models, conditions and steps of the solver exceeds, if it does."""
    if conditions > limits.conditions:
        return f"conditions: expected at most {limits.conditions} (limits.conditions), got {conditions}"
    if models > limits.models_per_job:
        most = f"{limits.models_per_job} models (limits.models_per_job)"
        return f"number: expected at most {most}, got {models}"
    if steps > limits.steps:
        return f"steps: expected at most {limits.steps} (limits.steps), got {steps}"
    return None


def request_digest(request: JobRequest) -> str:
    """What tells two requests apart: SHA-256 of all that they ask for."""
    # Requests have the digest that they had before there were descriptions and packs.
    unused = {"descriptions": request.descriptions is None, "pack": not request.pack}
    text = request.model_dump_json(exclude={name for name, is_unused in unused.items() if is_unused})
    return hashlib.sha256(text.encode()).hexdigest()


def _check_descriptions(request: JobRequest, served: ServedGenerator, limits: LimitsConfig) -> None:
    count = len(request.descriptions or [])
    if request.conditions is not None:
        raise ProblemError(422, "descriptions: expected either these or conditions, got both")
    if not served.takes_descriptions:
        raise ProblemError(
            422, f"descriptions: generator '{served.name}' has no text encoder; expected conditions"
        )
    if count > limits.descriptions:
        raise ProblemError(
            422, f"descriptions: expected at most {limits.descriptions} (limits.descriptions), got {count}"
        )


def _sampling(request: JobRequest, default: SamplingConfig) -> SamplingConfig:
    asked = {each.name: getattr(request, each.name, None) for each in fields(SamplingConfig)}
    return replace(default, **{key: value for key, value in asked.items() if value is not None})
