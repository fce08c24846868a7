"""The real service: a front that is stopped, and callers who say that they are somebody else."""

import os
import signal
import time
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path

import httpx
import pytest

from serve.config import ServeConfig
from serve.http.front_deadline import ANSWER_SECONDS
from tests.serve.conftest import CONDITIONS, Server

Serving = Callable[[ServeConfig, Path], AbstractContextManager[Server]]
JOB = {"generator": "small", "conditions": CONDITIONS[:1], "number": 1}


@pytest.mark.slow
def test_a_stopped_front_is_answered_for_and_forwarded_addresses_are_ignored(
    config: ServeConfig, serving: Serving, tmp_path: Path
) -> None:
    config.auth = False
    with serving(config, tmp_path / "service") as server, httpx.Client(base_url=server.url) as http:
        for header in ("X-Forwarded-For", "X-Real-IP"):
            answer = http.get("/v1/jobs", headers={header: "192.0.2.7"}, timeout=30)
            assert answer.status_code == 200, answer.text
        front = server.part("rpg:front")
        os.kill(front.pid, signal.SIGSTOP)
        try:
            start = time.monotonic()
            answer = http.post("/v1/jobs", json=JOB, timeout=120)
            seconds = time.monotonic() - start
        finally:
            os.kill(front.pid, signal.SIGCONT)
        assert answer.status_code == 503, answer.text
        assert answer.headers["content-type"] == "application/problem+json"
        assert seconds < ANSWER_SECONDS + 10
        deadline = time.monotonic() + 60
        while (answer := http.post("/v1/jobs", json=JOB, timeout=60)).status_code != 202:
            assert answer.status_code in (500, 503) and time.monotonic() < deadline, answer.text
            time.sleep(1)
