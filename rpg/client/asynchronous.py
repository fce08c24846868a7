"""The client for programs with an event loop."""

from types import TracebackType
from typing import Self

import httpx

from rpg.client.back_off import Patience
from rpg.client.calls import Calls, checked_server, common_headers
from rpg.client.transport import TIMEOUT, AsyncTransport


class AsyncClient(Calls):
    """Calls a service; `async with AsyncClient(server, token) as client`.

    Raises:
        RPGError: if `server` is no address, or `token` is none.
    """

    def __init__(self, server: str, token: str | None = None, patience: Patience | None = None) -> None:
        address, headers = checked_server(server), common_headers(token)
        self._client = httpx.AsyncClient(headers=headers, timeout=TIMEOUT)
        super().__init__(address, AsyncTransport(self._client), patience or Patience())

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.close()

    async def close(self) -> None:
        """Close all connections."""
        await self._client.aclose()
