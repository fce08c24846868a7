"""The service on a real Ray: what SIGKILL does to it, what goes over real sockets."""

import copy
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import replace
from pathlib import Path
from typing import Any

import httpx
import pytest
import torch

from rpg.config import save_config
from rpg.errors import RPGError
from rpg.generator.generator import Generator
from serve.config import GeneratorEntry, ServeConfig
from serve.replicas.apps import check_capacity
from tests.serve.conftest import CONDITIONS, ROOT, Server, bearer

Serving = Callable[[ServeConfig, Path], AbstractContextManager[Server]]
ALICE = bearer("alice")


def get(server: Server, path: str, name: str = "alice") -> Any:
    """The JSON at `path`, asked for again while a part of the service restarts."""
    deadline = time.monotonic() + 180
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
    """The job once so many of its models are finished."""
    deadline = time.monotonic() + 240
    while (found := get(server, f"/v1/jobs/{job}"))["finished"] < models:
        assert found["state"] in ("queued", "running"), found
        assert time.monotonic() < deadline, found
        time.sleep(0.05)
    return dict(found)


@pytest.mark.slow
def test_every_model_is_made_once_and_the_same_whatever_is_killed(
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
        server.part("rpg.small.").kill()
        now = finished(server, job, now + 50)["finished"]
        server.part("rpg:jobs").kill()
        server.part("rpg:front").kill()
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
def test_the_service_over_real_sockets(config: ServeConfig, tmp_path: Path, serving: Serving) -> None:
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

        # A body that ends half way harms no other call.
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


def listed(server: Server, name: str, digest: str | None) -> dict[str, Any]:
    """The generator once its replica reports this digest; None: once it is no longer served."""
    deadline = time.monotonic() + 240
    while True:
        found = {each["name"]: each for each in get(server, "/v1/generators")["generators"]}
        if found.get(name, {"digest": None})["digest"] == digest:
            return found.get(name, {})
        assert time.monotonic() < deadline, found
        time.sleep(0.1)


@pytest.mark.slow
def test_generators_come_and_go_while_others_run(
    config: ServeConfig, generator: Generator, saved: Path, tmp_path: Path, serving: Serving
) -> None:
    first = generator.digest()
    newer = copy.deepcopy(generator)
    with torch.no_grad():
        newer.denoiser.get_parameter("output.bias")[0] += 1
    newer.save_pretrained(tmp_path / "roots" / "newer")
    config.roots.append(str(tmp_path / "roots"))
    asked = {"generator": "small", "conditions": CONDITIONS, "number": 400, "steps": 250}
    with serving(config, tmp_path) as server:
        job = httpx.post(f"{server.url}/v1/jobs", json=asked, headers=ALICE, timeout=60).json()["id"]
        before = finished(server, job, 10)["finished"]
        titles = ("rpg:front", "rpg:jobs", "rpg.small.")
        processes = [server.part(title).pid for title in titles]

        config.generators.append(GeneratorEntry("other", str(saved), num_gpus=0))
        save_config(config, tmp_path / "serve.yaml")
        listed(server, "other", first)
        others = server.part("rpg.other.").pid
        one = {"generator": "other", "condition": CONDITIONS[0]}
        made = httpx.post(f"{server.url}/v1/generate", json=one, headers=ALICE, timeout=60)
        assert made.status_code == 200, made.text

        config.generators[1].path = str(tmp_path / "roots" / "newer")
        save_config(config, tmp_path / "serve.yaml")
        listed(server, "other", newer.digest())
        assert server.part("rpg.other.").pid != others
        newly = httpx.post(f"{server.url}/v1/generate", json=one, headers=ALICE, timeout=60)
        assert newly.status_code == 200 and newly.content != made.content

        # A configuration that is wrong changes nothing.
        broken = replace(config, generators=[replace(config.generators[0], replicas=5)])
        save_config(broken, tmp_path / "serve.yaml")
        time.sleep(3)
        del config.generators[1]
        save_config(config, tmp_path / "serve.yaml")
        listed(server, "other", None)
        assert [server.part(title).pid for title in titles] == processes
        now = finished(server, job, before + 10)
        assert now["state"] == "running" and now["finished"] < now["models"]
        late = httpx.post(f"{server.url}/v1/jobs", json={**one, "conditions": None}, headers=ALICE)
        assert late.status_code == 422
        # A replica that is still sampling is given a moment to end.
        deadline = time.monotonic() + 60
        while server.parts("rpg.other."):
            assert time.monotonic() < deadline
            time.sleep(0.2)


def test_more_generators_than_gpus_are_refused(config: ServeConfig) -> None:
    config.generators = [GeneratorEntry("a", "x"), GeneratorEntry("b", "x", replicas=2)]
    with pytest.raises(RPGError, match=r"need 3 GPUs \(a: 1, b: 2\), the cluster has 1; num_gpus: 0 runs"):
        check_capacity(config, {"GPU": 1.0, "CPU": 8.0})
    config.generators = [GeneratorEntry("a", "x", num_gpus=0, replicas=3)]
    with pytest.raises(RPGError, match=r"need 3 CPUs \(a: 3\), the cluster has 2$"):
        check_capacity(config, {"CPU": 2.0})
    config.wait_for_nodes = True
    check_capacity(config, {"CPU": 2.0})
