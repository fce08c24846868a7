"""The OpenAPI document against the service: Schemathesis calls everything that it promises."""

import asyncio
import threading
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import schemathesis
from hypothesis import HealthCheck, Phase, given, settings
from schemathesis import GenerationMode
from schemathesis.specs.openapi.checks import positive_data_acceptance

from serve.config import ServeConfig
from tests.serve.conftest import bearer

ROOT = bearer("root")


@pytest.fixture(scope="session")
def api(saved_config: ServeConfig, in_process: Callable[..., Any]) -> Iterator[tuple[Any, str]]:
    """The service on an event loop of its own, and the id of a finished job of the admin's."""
    loop = asyncio.new_event_loop()
    thread = threading.Thread(target=loop.run_forever, daemon=True)
    thread.start()

    def there(call: Any) -> Any:
        return asyncio.run_coroutine_threadsafe(call, loop)

    saved_config.limits.models_per_job = 20
    saved_config.limits.steps = 20
    manager = in_process(saved_config)
    service = there(manager.__aenter__()).result(60)

    async def app(scope: Any, receive: Any, send: Any) -> None:
        # Schemathesis runs applications on loops of its own; the dispatcher lives on this one.
        here = asyncio.get_running_loop()

        def back(function: Any) -> Any:
            async def call(*arguments: Any) -> Any:
                return await asyncio.wrap_future(asyncio.run_coroutine_threadsafe(function(*arguments), here))

            return call

        await asyncio.wrap_future(there(service.app(scope, back(receive), back(send))))

    asked = {"generator": "small", "descriptions": ["a cat", "two dogs"]}
    job = there(service.client.post("/v1/jobs", json=asked, headers=ROOT)).result(60).json()["id"]
    there(service.ended(job, "root")).result(60)
    yield app, job
    there(manager.__aexit__(None, None, None)).result(60)
    loop.call_soon_threadsafe(loop.stop)
    thread.join()
    loop.close()


OPERATIONS = (
    "submit_job", "list_jobs", "get_job", "delete_job", "job_events", "generate", "list_models", "get_model",
    "get_model_file", "get_archive", "list_generators", "get_generator", "get_centre", "understand", "health",
    "metrics",
)  # fmt: skip


@pytest.fixture(scope="session")
def operations(api: tuple[Any, str]) -> dict[str, Any]:
    """What the document promises, by operation id."""
    schema = schemathesis.openapi.from_asgi("/openapi.json", api[0])
    found = [result.ok() for result in schema.get_all_operations()]
    return {operation.definition.raw["operationId"]: operation for operation in found}


def test_every_operation_is_called(operations: dict[str, Any]) -> None:
    assert sorted(operations) == sorted(OPERATIONS)


@pytest.mark.parametrize("mode", list(GenerationMode))
@pytest.mark.parametrize("name", OPERATIONS)
def test_answers_are_what_openapi_promises(
    operations: dict[str, Any], api: tuple[Any, str], name: str, mode: GenerationMode
) -> None:
    """No server error, and status, type and form of every answer as documented.

    What only the service can know, such as a generator's name, is refused though the document allows it: so
    the check that everything allowed is accepted is left out.
    """
    if mode == GenerationMode.NEGATIVE and name in ("list_generators", "health", "metrics"):
        pytest.skip("takes nothing that could be wrong")

    @given(case=operations[name].as_strategy(generation_mode=mode))
    @settings(
        max_examples=20,
        deadline=None,
        derandomize=True,
        database=None,
        phases=[Phase.explicit, Phase.generate],
        suppress_health_check=list(HealthCheck),
    )
    def call(case: Any) -> None:
        if mode == GenerationMode.POSITIVE and name != "delete_job":
            if case.path_parameters and "id" in case.path_parameters:
                case.path_parameters["id"] = api[1]
            if name == "understand":
                case.path_parameters["name"] = "small"
            elif isinstance(case.body, dict):
                case.body["generator"] = "small"
        case.call_and_validate(headers=ROOT, excluded_checks=[positive_data_acceptance])

    call()
