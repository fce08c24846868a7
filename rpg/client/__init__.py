"""Calling a service that generates models: `Client`, and `AsyncClient` with the same methods."""

from rpg.client.back_off import Patience
from rpg.client.clients import AsyncClient, Client
from rpg.client.errors import CallError
from rpg.client.schema import GeneratorInfo, Job, JobPage, JobState, ModelFile, UnderstoodDescription

__all__ = [
    "AsyncClient",
    "CallError",
    "Client",
    "GeneratorInfo",
    "Job",
    "JobPage",
    "JobState",
    "ModelFile",
    "Patience",
    "UnderstoodDescription",
]
