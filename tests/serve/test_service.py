"""The service on a real Ray: what SIGKILL does to it, what goes over real sockets."""

import socket
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import httpx
import pytest

from rpg.errors import RPGError
from serve.config import GeneratorEntry, ServeConfig
from serve.placement import check_room
from tests.serve.conftest import CONDITIONS, ROOT, Server, bearer

Serving = Callable[[ServeConfig, Path], AbstractContextManager[Server]]
ALICE = bearer("alice")


def get(server: Server, path: str, name: str = "alice") -> Any:
    """The JSON at `path`; while a part of the service starts again it may be told to come back."""
    deadline = time.monotonic() + 120
    while True:
        try:
            answer = httpx.get(f"{server.url}{path}", headers=bearer(name), timeout=60)
            if answer.status_code == 200:
                return answer.json()
            assert answer.status_code in (500, 503), answer.text
        except httpx.TransportError:
            pass
        assert time.monotonic() < deadline
        time.sleep(0.2)


def finished(server: Server, job: str, models: int) -> dict[str, Any]:
    """The job once so many of its models are there."""
    deadline = time.monotonic() + 240
    while (found := get(server, f"/v1/jobs/{job}"))["finished"] < models:
        assert found["state"] in ("queued", "running"), found
        assert time.monotonic() < deadline, found
        time.sleep(0.05)
    return dict(found)


@pytest.mark.slow
def test_whatever_is_killed_every_model_comes_out_once_and_the_same(
    config: ServeConfig, tmp_path: Path, serving: Serving, expected: Callable[..., list[bytes]]
) -> None:
    models = 600
    asked = {"generator": "small", "conditions": CONDITIONS, "number": models // 2, "seed": 3, "steps": 250}
    headers = {**ALICE, "Idempotency-Key": "once"}
    with serving(config, tmp_path) as server:
        answer = httpx.post(f"{server.url}/v1/jobs", json=asked, headers=headers, timeout=60)
        assert answer.status_code == 202, answer.text
        job = answer.json()["id"]
        now = finished(server, job, 10)["finished"]
        server.part("generator-small").kill()
        now = finished(server, job, now + 50)["finished"]
        server.part("jobs").kill()
        server.part("front").kill()
        now = finished(server, job, now + 1)["finished"]
        assert now < models
        server.kill_all()
    with serving(config, tmp_path) as server:
        again = httpx.post(f"{server.url}/v1/jobs", json=asked, headers=headers, timeout=60)
        assert again.json()["id"] == job
        assert again.json()["finished"] >= now
        finished(server, job, models)
        listed = get(server, f"/v1/jobs/{job}/models")["models"]
        while (status := get(server, f"/v1/jobs/{job}"))["ended"] is None:
            time.sleep(0.1)
        assert (status["state"], status["models"]) == ("succeeded", models)
    assert [each["index"] for each in listed] == list(range(models))
    files = sorted((Path(config.storage) / "jobs" / job / "models").iterdir())
    assert [path.name for path in files] == [f"model_{i:06d}.safetensors" for i in range(models)]
    some = range(0, models, 7)
    whole = expected(CONDITIONS, models // 2, 3, indices=some, steps=250)
    assert [files[i].read_bytes() for i in some] == whole


@pytest.mark.slow
def test_over_real_sockets(config: ServeConfig, tmp_path: Path, serving: Serving) -> None:
    config.limits.body_bytes = 10_000
    with serving(config, tmp_path) as server, httpx.Client(base_url=server.url, timeout=60) as client:
        assert client.get("/healthz").json() == {"status": "ok"}
        model = client.post(
            "/v1/generate", json={"generator": "small", "condition": [0, 1, 2]}, headers=ALICE
        )
        assert model.status_code == 200, model.text
        path = model.headers["location"] + "/models/0"
        part = client.get(path, headers={**ALICE, "Range": "bytes=100-199"})
        assert (part.status_code, part.content) == (206, model.content[100:200])
        with client.stream("GET", model.headers["location"] + "/events", headers=ALICE) as events:
            assert events.headers["content-type"].startswith("text/event-stream")
            assert next(events.iter_lines()) == "event: end"
        assert client.get(path).status_code == 401
        assert client.get("/v1/jobs/../jobs", headers=bearer("nobody")).status_code == 401
        large = client.post("/v1/jobs", content=b" " * 10_001, headers=ALICE)
        assert (large.status_code, large.json()["status"]) == (413, 413)
        chunked = client.post("/v1/jobs", content=iter([b" " * 6000] * 2), headers=ALICE)
        assert chunked.status_code == 413

        # A body that ends half way harms nobody.
        host, port = server.url.removeprefix("http://").split(":")
        with socket.create_connection((host, int(port))) as half:
            half.sendall(
                b"POST /v1/jobs HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
                b"Authorization: " + ALICE["Authorization"].encode() + b'\r\nContent-Length: 500\r\n\r\n{"gen'
            )
        assert len(client.get("/v1/jobs", headers=ALICE).json()["jobs"]) == 1
        assert client.get("/metrics", headers=ALICE).status_code == 403
        deadline = time.monotonic() + 120
        while "ray_rpg_models" not in (text := client.get("/metrics", headers=bearer("root")).text):
            assert time.monotonic() < deadline, text
            time.sleep(0.5)
        second = subprocess.run(
            [sys.executable, "-m", "serve", str(tmp_path / "serve.yaml")],
            cwd=ROOT, capture_output=True, text=True, timeout=120,
        )  # fmt: skip
        assert second.returncode == 2
        line = f"serve: error: storage: another service is running on {config.storage}\n"
        assert second.stderr == line
        assert server.stop() == 0
        assert "Traceback" not in server.log.read_text()


def test_more_generators_than_gpus_are_refused(config: ServeConfig) -> None:
    config.generators = [GeneratorEntry("a", "x"), GeneratorEntry("b", "x", replicas=2)]
    with pytest.raises(RPGError, match=r"need 3 GPUs \(a: 1, b: 2\), the cluster has 1; num_gpus: 0 runs"):
        check_room(config, {"GPU": 1.0, "CPU": 8.0})
    config.generators = [GeneratorEntry("a", "x", num_gpus=0, replicas=3)]
    with pytest.raises(RPGError, match=r"need 3 CPUs \(a: 3\), the cluster has 2$"):
        check_room(config, {"CPU": 2.0})
