"""Whoever calls the service, as the dispatcher knows them."""

from dataclasses import dataclass

from serve.errors import ProblemError


@dataclass(frozen=True)
class Caller:
    """An owner of jobs, and what the token of this call allows."""

    owner: str
    scopes: frozenset[str]

    @property
    def is_admin(self) -> bool:
        """Whether the caller may see and change the jobs of all owners."""
        return "admin" in self.scopes

    def require(self, scope: str) -> None:
        """Check that the token has `scope` or `admin`.

        Raises:
            ProblemError: 403 if it has neither.
        """
        if scope not in self.scopes and not self.is_admin:
            raise ProblemError(403, f"this token lacks the scope '{scope}'")
