"""Joining the Ray cluster at RAY_ADDRESS, or starting a local Ray for as long as the job runs."""

import logging
import os
import socket
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

# Read when Ray's own processes start: errors reach the user as exceptions, not as lines of their logs.
os.environ.setdefault("RAY_BACKEND_LOG_LEVEL", "fatal")
os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")

import ray
import ray.data
import ray.exceptions

from rpg.config import RayConfig
from rpg.errors import RPGError


@contextmanager
def ray_cluster(config: RayConfig) -> Iterator[None]:
    """Connect for the duration of the block; a Ray started here is stopped at its end, Ctrl-C included.

    Raises:
        RPGError: if no cluster answers at RAY_ADDRESS, or for a worker's RPGError, without Ray's wrapping.
    """
    address = os.environ.get("RAY_ADDRESS")
    if address:
        _probe(address)
    # Joining a cluster takes no resources; without one, None leaves the number of CPUs to Ray.
    resources = {} if address else {"num_cpus": config.num_cpus, "include_dashboard": False}
    logging.getLogger("ray.data").setLevel(logging.ERROR)
    try:
        with _native_stderr_closed():
            # The stages show their own progress, and errors come back as exceptions.
            # "local" starts one even where another is running that nobody named.
            ray.init(
                address=address or "local",
                logging_level=logging.ERROR,
                log_to_driver=False,
                **resources,  # type: ignore[arg-type]
            )
    except (ConnectionError, ValueError, RuntimeError, ray.exceptions.RayError) as error:
        if not address:
            raise
        raise RPGError(f"RAY_ADDRESS={address}: {_why_not_joined()}") from error
    ray.data.DataContext.get_current().enable_progress_bars = False
    try:
        yield
    except ray.exceptions.RayTaskError as error:
        cause: BaseException = error
        # A task that needed another's result fails with that task's failure as its cause.
        while isinstance(cause, ray.exceptions.RayTaskError):
            cause = cause.cause
        if isinstance(cause, RPGError):
            raise cause from error
        raise
    finally:
        ray.shutdown()


def _why_not_joined() -> str:
    reason = "no Ray cluster answers there"
    if os.environ.get("RAY_AUTH_MODE", "").lower() != "token":
        # Ray never sends a token to an address that it was given, unless it is told to.
        reason += (
            "; one that asks for a token (any started where ~/.ray/auth_token is) needs RAY_AUTH_MODE=token"
        )
    return reason


def _probe(address: str) -> None:
    """Knock at HOST:PORT or ray://HOST:PORT first, where Ray would wait for half a minute or more."""
    host, _, port = address.removeprefix("ray://").rpartition(":")
    if not host or "/" in host or not port.isdigit():
        return
    try:
        socket.create_connection((host, int(port)), timeout=10).close()
    except (OSError, OverflowError, UnicodeError) as error:
        raise RPGError(f"RAY_ADDRESS={address}: no Ray cluster answers there") from error


@contextmanager
def _native_stderr_closed() -> Iterator[None]:
    """Ray's native code announces its log level on stderr as it starts; its failures are raised as well."""
    sys.stderr.flush()
    kept = os.dup(2)
    with Path(os.devnull).open("w") as nowhere:
        os.dup2(nowhere.fileno(), 2)
        try:
            yield
        finally:
            os.dup2(kept, 2)
            os.close(kept)
