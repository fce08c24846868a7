"""Joining the Ray cluster at RAY_ADDRESS, or starting a local Ray for as long as the job runs."""

import logging
import os
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

# Ray's own processes read these when they start. Errors reach the user as exceptions, so the log is quiet.
os.environ.setdefault("RAY_BACKEND_LOG_LEVEL", "fatal")
os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
# If a node's agent does not answer in this time, Ray ends the node, and the job with it. The default of half
# a minute is too short for a busy machine.
os.environ.setdefault("RAY_agent_register_timeout_ms", "120000")

import ray
import ray.data
import ray.exceptions

from rpg.config import RayConfig
from rpg.errors import RPGError

_STARTS = 3
_LOGS = "Ray's logs are in session_latest/logs of its temporary directory, /tmp/ray unless RAY_TMPDIR is set"


@contextmanager
def ray_cluster(config: RayConfig) -> Iterator[None]:
    """Connect to Ray for the duration of the block; a Ray that is started here is stopped at the block's end,
    also on Ctrl-C.

    Raises:
        RPGError: if Ray does not start, or no cluster answers at RAY_ADDRESS. An RPGError of a worker is
            raised as it is, without Ray's wrapping.
    """
    logging.getLogger("ray.data").setLevel(logging.ERROR)
    message = f"error: this process was ended, perhaps by Ray, which does so without a word: {_LOGS}"
    with _message_if_process_ends(message):
        if address := os.environ.get("RAY_ADDRESS"):
            _join(address)
        else:
            _start(config)
        with _in_cluster():
            yield


def _join(address: str) -> None:
    _probe(address)
    try:
        _init(address)
    except (ConnectionError, ValueError, RuntimeError, ray.exceptions.RayError) as error:
        raise RPGError(f"RAY_ADDRESS={address}: {_why_not_joined()}") from error


def _start(config: RayConfig) -> None:
    for attempt in range(1, _STARTS + 1):
        try:
            # "local" starts a Ray even where another is running on the machine; num_cpus=None leaves the
            # number of CPUs to Ray.
            _init("local", num_cpus=config.num_cpus, include_dashboard=False)
            break
        except Exception as error:
            # Ray gives up on agents that a busy machine does not start within 15 seconds, and has no setting
            # for that. The processes of such an attempt end with this one.
            if attempt == _STARTS:
                raise RPGError(f"Ray did not start, {_STARTS} times over: {error}: {_LOGS}") from error


def _init(address: str, **resources: Any) -> None:
    # The stages show their own progress, and errors come back as exceptions.
    with _native_stderr_closed():
        ray.init(address=address, logging_level=logging.ERROR, log_to_driver=False, **resources)


@contextmanager
def _in_cluster() -> Iterator[None]:
    ray.data.DataContext.get_current().enable_progress_bars = False
    try:
        yield
    except ray.exceptions.RayTaskError as error:
        cause: BaseException = error
        # A task that needed the result of a failed task fails with that failure as its cause.
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
        # Ray sends a token to an address that it was given only in this mode.
        reason += (
            "; one that asks for a token (any started where ~/.ray/auth_token is) needs RAY_AUTH_MODE=token"
        )
    return reason


def _probe(address: str) -> None:
    """Try to connect to HOST:PORT or ray://HOST:PORT, because Ray would wait half a minute or more for it."""
    host, _, port = address.removeprefix("ray://").rpartition(":")
    if not host or "/" in host or not port.isdigit():
        return
    try:
        socket.create_connection((host, int(port)), timeout=10).close()
    except (OSError, OverflowError, UnicodeError) as error:
        raise RPGError(f"RAY_ADDRESS={address}: no Ray cluster answers there") from error


@contextmanager
def _message_if_process_ends(text: str) -> Iterator[None]:
    """Have `text` printed on stderr if the process ends within the block.

    Ray's native code ends a process that has lost its node or the cluster with status 1, without returning to
    Python. So another process prints the text when its stdin ends without a line.
    """
    listen = ["sh", "-c", 'trap "" HUP INT TERM; read -r _ || echo "$0" >&2', text]
    with subprocess.Popen(listen, stdin=subprocess.PIPE, stdout=subprocess.DEVNULL) as listener:
        try:
            yield
        finally:
            with suppress(BrokenPipeError):
                listener.communicate(b"\n")


@contextmanager
def _native_stderr_closed() -> Iterator[None]:
    """Close stderr to Ray's native code, which prints its log level as it starts and raises its failures."""
    sys.stderr.flush()
    kept = os.dup(2)
    with Path(os.devnull).open("w") as nowhere:
        os.dup2(nowhere.fileno(), 2)
        try:
            yield
        finally:
            os.dup2(kept, 2)
            os.close(kept)
