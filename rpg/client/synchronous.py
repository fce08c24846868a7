"""The client for programs without an event loop."""

from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import Self, Unpack

import httpx

from rpg.client.back_off import Patience
from rpg.client.calls import ByteProgress, Calls, JobProgress, Settings, checked_server, common_headers
from rpg.client.transport import TIMEOUT, BlockingTransport, finished
from rpg.client.views import GeneratorInfo, Job, JobPage


class Client:
    """Calls a service; `with Client(server, token) as client`. Threads may share one.

    Its methods are those of `AsyncClient`, and raise the same.

    Raises:
        RPGError: if `server` is no address, or `token` is none.
    """

    def __init__(self, server: str, token: str | None = None, patience: Patience | None = None) -> None:
        address, headers = checked_server(server), common_headers(token)
        self._client = httpx.Client(headers=headers, timeout=TIMEOUT)
        self._calls = Calls(address, BlockingTransport(self._client), patience or Patience())

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Close all connections."""
        self._client.close()

    def generators(self) -> list[GeneratorInfo]:
        """See `Calls.generators`."""
        return finished(self._calls.generators())

    def submit(
        self,
        generator: str,
        conditions: Sequence[Sequence[float]] | None = None,
        number: int = 1,
        seed: int = 0,
        *,
        descriptions: Sequence[str] | None = None,
        **settings: Unpack[Settings],
    ) -> Job:
        """See `Calls.submit`."""
        return finished(
            self._calls.submit(generator, conditions, number, seed, descriptions=descriptions, **settings)
        )

    def job(self, id: str) -> Job:
        """See `Calls.job`."""
        return finished(self._calls.job(id))

    def jobs(
        self,
        state: str | None = None,
        generator: str | None = None,
        limit: int = 100,
        after: str | None = None,
    ) -> JobPage:
        """See `Calls.jobs`."""
        return finished(self._calls.jobs(state, generator, limit, after))

    def wait(self, id: str, progress: JobProgress | None = None) -> Job:
        """See `Calls.wait`."""
        return finished(self._calls.wait(id, progress))

    def cancel(self, id: str) -> Job:
        """See `Calls.cancel`."""
        return finished(self._calls.cancel(id))

    def download(self, id: str, directory: Path, progress: ByteProgress | None = None) -> list[Path]:
        """See `Calls.download`."""
        return finished(self._calls.download(id, directory, progress))

    def generate(
        self,
        generator: str,
        condition: Sequence[float] | None = None,
        seed: int = 0,
        *,
        description: str | None = None,
        **settings: Unpack[Settings],
    ) -> bytes:
        """See `Calls.generate`."""
        return finished(self._calls.generate(generator, condition, seed, description=description, **settings))
