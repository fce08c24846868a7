"""Who calls, and what they may do: bearer tokens with scopes."""

import hashlib
import hmac
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime

from serve.config import LOOPBACK, SCOPES, ServeConfig, expiry
from serve.http.problems import ProblemError

LOCAL_OWNER = "local"
"""Owner of all jobs where no tokens are asked for."""

_CHALLENGE = {"WWW-Authenticate": "Bearer"}


@dataclass(frozen=True)
class Caller:
    """An owner of jobs, and what this token of theirs allows."""

    owner: str
    scopes: frozenset[str]

    @property
    def is_admin(self) -> bool:
        """Whether jobs of all owners are in reach."""
        return "admin" in self.scopes

    def needs(self, scope: str) -> None:
        """Raise a `ProblemError` unless the token has `scope` or `admin`."""
        if scope not in self.scopes and not self.is_admin:
            raise ProblemError(403, f"this token lacks the scope '{scope}'")


class Gate:
    """Turns a request's headers into a `Caller`."""

    def __init__(self, config: ServeConfig) -> None:
        self._open = not config.auth
        self._tokens = [
            (token.sha256, Caller(token.owner, frozenset(token.scopes)), expiry(token))
            for token in config.tokens
        ]

    def caller(self, authorization: str | None, client: str | None, host: str | None) -> Caller:
        """Who calls.

        Args:
            authorization: the header of that name.
            client: the address that the request came from.
            host: the header of that name.

        Raises:
            ProblemError: 401 for a token that is missing, unknown or expired; 403 for a call from another
                machine where no tokens are asked for.
        """
        if self._open:
            # The name too: a page elsewhere may have its own name resolve to this machine.
            if client not in LOOPBACK or _without_port(host or "") not in LOOPBACK:
                raise ProblemError(403, "'auth: off' answers calls from this machine to 127.0.0.1 alone")
            return Caller(LOCAL_OWNER, frozenset(SCOPES))
        kind, _, token = (authorization or "").partition(" ")
        if kind.lower() != "bearer" or not token:
            raise ProblemError(401, "expected the header 'Authorization: Bearer TOKEN'", headers=_CHALLENGE)
        digest = hashlib.sha256(token.strip().encode()).hexdigest()
        return self._known(digest)

    def _known(self, digest: str) -> Caller:
        found: Sequence[tuple[str, Caller, datetime | None]] = [
            entry for entry in self._tokens if hmac.compare_digest(entry[0], digest)
        ]
        if not found:
            raise ProblemError(401, "unknown token", headers=_CHALLENGE)
        _, caller, expires = found[0]
        if expires is not None and expires <= datetime.now(UTC):
            raise ProblemError(401, f"this token expired at {expires.isoformat()}", headers=_CHALLENGE)
        return caller


def _without_port(host: str) -> str:
    if host.startswith("["):
        return host[1:].partition("]")[0]
    return host.partition(":")[0]
