"""Calling a service that generates models: `Client`, and `AsyncClient` with the same methods."""

from rpg.client.asynchronous import AsyncClient
from rpg.client.back_off import Patience
from rpg.client.errors import CallError
from rpg.client.synchronous import Client
from rpg.client.views import GeneratorInfo, Job, JobPage, ModelFile

__all__ = [
    "AsyncClient",
    "CallError",
    "Client",
    "GeneratorInfo",
    "Job",
    "JobPage",
    "ModelFile",
    "Patience",
]
