"""HTTP: who may call what, what is refused with which words, how models are downloaded."""

import asyncio
import hashlib
import io
import json
import os
import subprocess
import tarfile
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import httpx
import pytest

from serve.config import ServeConfig
from serve.http.downloads import Content, tar_size, tar_stream
from tests.serve.conftest import CONDITIONS, Calling, bearer, token_entry

InProcess = Callable[..., Any]
ALICE = bearer("alice")
JOB = {"generator": "small", "conditions": CONDITIONS, "number": 2}


def problem(answer: httpx.Response, status: int) -> str:
    """The detail of a problem document, checked for its form."""
    assert answer.status_code == status, answer.text
    assert answer.headers["content-type"] == "application/problem+json"
    document = answer.json()
    assert document.keys() == {"type", "title", "status", "detail"}
    assert document["status"] == status
    assert "\n" not in document["detail"]
    return str(document["detail"])


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("/v1/jobs?stat=running", "query: unknown parameter 'stat'; expected one of state, generator,"),
        ("/v1/jobs?=1", "query: unknown parameter ''"),
        ("/v1/generators?x=1", "query: unknown parameter 'x'; expected none"),
    ],
)
def test_a_misspelt_filter_is_refused(calling: Calling, path: str, message: str) -> None:
    async def go(service: Any) -> None:
        answer = await service.client.get(path, headers=ALICE)
        assert problem(answer, 422).startswith(message)

    calling(go)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"generator": "large"}, "generator: 'large' is not served; expected one of small"),
        ({"conditions": [[0, 1]]}, "condition: expected 3 values, got 2"),
        ({"conditions": [[0, 1, float("nan")]]}, "conditions.0.2: Input should be a finite number"),
        ({"conditions": [[0, 1, 1e39]]}, "condition: expected finite values"),
        ({"conditions": None}, "conditions: this generator needs ones of 3 values"),
        ({"conditions": []}, "conditions: List should have at least 1 item"),
        ({"conditions": [["1", 2, 3]]}, "conditions.0.0: Input should be a valid number"),
        ({"number": 0}, "number: Input should be greater than or equal to 1"),
        (
            {"number": 10_000_000},
            "number: expected at most 10000 models (limits.models_per_job), got 20000000",
        ),
        ({"number": "2"}, "number: Input should be a valid integer"),
        ({"steps": 1001}, "steps: expected at most 1000 (limits.steps), got 1001"),
        ({"seed": 2**64}, "seed: Input should be less than"),
        ({"solver": "euler"}, "solver: Input should be 'ddpm', 'ddim', 'ddim_leading' or 'dpmpp_2m'"),
        ({"numbre": 2}, "numbre: Extra inputs are not permitted"),
        ({"dtype": "float64"}, "dtype: Input should be 'float32', 'float16' or 'bfloat16'"),
        (
            {"evaluate": True},
            "evaluate: generator 'small' is served without a test: with neither a task family, nor a "
            "command, nor a collection whose conditions say what is right",
        ),
        ({"priority": 101}, "priority: Input should be less than or equal to 100"),
        ({"generator": "../../etc"}, "generator: '../../etc' is not served"),
    ],
)
def test_what_cannot_be_made_is_refused_with_one_line(
    calling: Calling, change: dict[str, Any], message: str
) -> None:
    async def run(service: Any) -> None:
        headers = {**ALICE, "Content-Type": "application/json"}
        body = json.dumps({**JOB, **change})
        answer = await service.client.post("/v1/jobs", content=body, headers=headers)
        assert message in problem(answer, 422)
        assert (await service.client.get("/v1/jobs", headers=ALICE)).json()["jobs"] == []

    calling(run)


def test_bodies_that_are_not_a_json_object_are_refused(calling: Calling) -> None:
    async def run(service: Any) -> None:
        headers = {**ALICE, "Content-Type": "application/json"}
        for body in (b"{", b"", b"[]"):
            problem(await service.client.post("/v1/jobs", content=body, headers=headers), 422)
        # Python's JSON parser gives up on these.
        for body in (b"\xff\xfe", b"[" * 100_000):
            answer = await service.client.post("/v1/jobs", content=body, headers=headers)
            problem(answer, answer.status_code)
            assert answer.status_code in (400, 422)
        form = await service.client.post(
            "/v1/jobs", content=b"{}", headers={**ALICE, "Content-Type": "text/plain"}
        )
        problem(form, 422)

    calling(run)


def test_callers_need_a_valid_token_with_the_right_scope(config: ServeConfig, calling: Calling) -> None:
    past, future = (datetime.now(UTC) + timedelta(hours=hours) for hours in (-1, 1))
    config.tokens += [
        token_entry("old", expires=past.isoformat()),
        token_entry("new", expires=future.isoformat()),
    ]

    async def run(service: Any) -> None:
        client = service.client
        wrong = [{}, bearer("nobody"), {"Authorization": "Basic abc"}, {"Authorization": "Bearer "}]
        for headers in wrong:
            answer = await client.get("/v1/jobs", headers=headers)
            problem(answer, 401)
            assert answer.headers["www-authenticate"] == "Bearer"
        assert "this token expired at" in problem(await client.get("/v1/jobs", headers=bearer("old")), 401)
        assert (await client.get("/v1/jobs", headers=bearer("new"))).status_code == 200
        refused = await client.post("/v1/jobs", json=JOB, headers=bearer("reader"))
        assert problem(refused, 403) == "this token lacks the scope 'submit'"
        assert (
            problem(await client.get("/metrics", headers=ALICE), 403) == "this token lacks the scope 'admin'"
        )
        assert (await client.get("/healthz")).status_code == 200

    calling(run)


def test_a_job_is_its_owners_alone(calling: Calling) -> None:
    async def run(service: Any) -> None:
        client = service.client
        job = (await client.post("/v1/jobs", json=JOB, headers=ALICE)).json()["id"]
        await service.ended(job)
        for path in ("", "/events", "/models", "/models/0", "/archive"):
            answer = await client.get(f"/v1/jobs/{job}{path}", headers=bearer("bob"))
            assert problem(answer, 404) == f"no job '{job}'"
        problem(await client.delete(f"/v1/jobs/{job}", headers=bearer("bob")), 404)
        assert (await client.get("/v1/jobs", headers=bearer("bob"))).json()["jobs"] == []
        assert (await client.get(f"/v1/jobs/{job}", headers=bearer("root"))).json()["owner"] == "alice"
        assert len((await client.get("/v1/jobs", headers=bearer("root"))).json()["jobs"]) == 1
        problem(await client.get("/v1/jobs/..%2f..%2fetc", headers=ALICE), 404)

    calling(run)


def test_without_tokens_only_this_machine_is_answered(config: ServeConfig, in_process: InProcess) -> None:
    config.auth = False

    async def run() -> None:
        async with in_process(config) as service:
            assert (await service.client.get("/v1/jobs")).status_code == 200
            for host in ("127.0.0.1:80", "localhost", "[::1]:8000", "LOCALHOST:1"):
                assert (await service.client.get("/v1/jobs", headers={"Host": host})).status_code == 200
            others = ("127.0.0.1:80@evil.example", "127.0.0.1.evil.example", "[::1].evil.example", "", "::1")
            for host in (*others, "localhost:", "127.0.0.1:x"):
                problem(await service.client.get("/v1/jobs", headers={"Host": host}), 403)
            renamed = await service.client.get("/v1/jobs", headers={"Host": "evil.example"})
            assert "answers calls from this machine" in problem(renamed, 403)
            transport = httpx.ASGITransport(service.app, client=("192.0.2.7", 4))
            async with httpx.AsyncClient(transport=transport, base_url="http://127.0.0.1") as other:
                problem(await other.get("/v1/jobs"), 403)

    asyncio.run(run())


def test_models_are_downloaded_whole_in_parts_and_as_an_archive(
    calling: Calling, expected: Callable[..., list[bytes]]
) -> None:
    whole = expected(CONDITIONS, 2)

    async def run(service: Any) -> None:
        client = service.client
        job = (await client.post("/v1/jobs", json=JOB, headers=ALICE)).json()["id"]
        await service.ended(job)
        path = f"/v1/jobs/{job}/models/3"
        content, size = whole[3], len(whole[3])
        answer = await client.get(path, headers=ALICE)
        tag = answer.headers["etag"]
        assert tag == f'"{hashlib.sha256(content).hexdigest()}"'
        assert (answer.content, answer.headers["content-length"]) == (content, str(size))
        for asked, start, end in (
            ("bytes=0-9", 0, 10), ("bytes=5-", 5, size), ("bytes=-7", size - 7, size),
            (f"bytes=10-{10 * size}", 10, size), (f"bytes=-{10 * size}", 0, size),
        ):  # fmt: skip
            part = await client.get(path, headers={**ALICE, "Range": asked})
            assert (part.status_code, part.content) == (206, content[start:end])
            assert part.headers["content-range"] == f"bytes {start}-{end - 1}/{size}"
        for asked in ("bytes=a-b", "bytes=-", "lines=1-2", "bytes=5-2", "bytes=0-1,3-4"):
            assert (await client.get(path, headers={**ALICE, "Range": asked})).status_code == 200
        beyond = await client.get(path, headers={**ALICE, "Range": f"bytes={size}-"})
        problem(beyond, 416)
        assert beyond.headers["content-range"] == f"bytes */{size}"
        # Python makes no integers of more than 4,300 digits.
        huge = "9" * 4301
        problem(await client.get(path, headers={**ALICE, "Range": f"bytes={huge}-"}), 416)
        problem(await client.get(path, headers={**ALICE, "Range": f"bytes={huge}-{huge}"}), 416)
        for asked, part in (
            (f"bytes=5-{huge}", whole[3][5:]),
            (f"bytes=-{huge}", whole[3]),
            (f"bytes={'0' * 4301}7-8", whole[3][7:9]),
        ):
            answer = await client.get(path, headers={**ALICE, "Range": asked})
            assert (answer.status_code, answer.content) == (206, part)
        known = await client.get(path, headers={**ALICE, "If-None-Match": f'"other", {tag}'})
        assert (known.status_code, known.content) == (304, b"")
        assert (await client.get(path, headers={**ALICE, "If-None-Match": "*"})).status_code == 304
        changed = await client.get(path, headers={**ALICE, "Range": "bytes=0-9", "If-Range": '"other"'})
        assert changed.status_code == 200
        problem(await client.get(f"/v1/jobs/{job}/models/4", headers=ALICE), 404)

        archive = await client.get(f"/v1/jobs/{job}/archive", headers=ALICE)
        assert int(archive.headers["content-length"]) == len(archive.content)
        unpacked = subprocess.run(["tar", "xO"], input=archive.content, capture_output=True, check=True)
        assert unpacked.stdout == b"".join(whole)
        with tarfile.open(fileobj=io.BytesIO(archive.content)) as tar:
            names = tar.getnames()
            assert names == [f"{job}/model_{i:06d}.safetensors" for i in range(4)]
            assert [tar.extractfile(name).read() for name in names] == whole  # type: ignore[union-attr]

        service.store.model(job, 3).unlink()
        assert "is gone from storage" in problem(await client.get(path, headers=ALICE), 404)

    calling(run)


class Zeros:
    """In place of a path: a file of any size that holds only zeros, and takes no room."""

    block = bytes(2**20)

    def __enter__(self) -> "Zeros":
        return self

    def __exit__(self, *error: object) -> None: ...

    def seek(self, offset: int) -> None: ...

    def read(self, size: int) -> bytes:
        return self.block[:size]


def test_an_archive_of_a_large_network_can_be_unpacked(tmp_path: Path) -> None:
    sizes = {"small": 1000, "large": 9 * 2**30 + 5}
    zeros: Any = Zeros
    files = [(f"{'a' * 22}/{name}.safetensors", Content(zeros, size)) for name, size in sizes.items()]
    archive = tmp_path / "archive.tar"
    with archive.open("wb") as file:
        for block in tar_stream(files, 1_700_000_000):
            if block == Zeros.block[: len(block)]:
                # A hole, which takes no room on the disk.
                file.seek(len(block), os.SEEK_CUR)
            else:
                file.write(block)
        file.truncate()
    assert archive.stat().st_size == tar_size(files)
    listed = subprocess.run(["tar", "tvf", archive], capture_output=True, text=True, check=True)
    assert [int(line.split()[2]) for line in listed.stdout.splitlines()] == list(sizes.values())


def test_generate_answers_with_one_model(calling: Calling, expected: Callable[..., list[bytes]]) -> None:
    async def run(service: Any) -> None:
        asked = {"generator": "small", "condition": CONDITIONS[1], "seed": 9}
        answer = await service.client.post("/v1/generate", json=asked, headers=ALICE)
        assert answer.status_code == 200, answer.text
        assert answer.content == expected(CONDITIONS[1:], 1, 9)[0]
        job = (await service.client.get(answer.headers["location"], headers=ALICE)).json()
        assert job["state"] == "succeeded"

    calling(run)


def test_progress_comes_as_events(calling: Calling) -> None:
    async def run(service: Any) -> None:
        asked = {**JOB, "number": 100, "steps": 20}
        job = (await service.client.post("/v1/jobs", json=asked, headers=ALICE)).json()["id"]
        answer = await service.client.get(f"/v1/jobs/{job}/events", headers=ALICE)
        assert answer.headers["content-type"].startswith("text/event-stream")
        events = [
            dict(line.split(": ", 1) for line in e.splitlines()) for e in answer.text.split("\n\n") if e
        ]
        assert [event["event"] for event in events] == ["progress"] * (len(events) - 1) + ["end"]
        finished = [json.loads(event["data"])["finished"] for event in events]
        assert finished == sorted(finished) and finished[-1] == 200
        assert len(events) > 3

    calling(run)


def test_jobs_are_listed_in_pages_and_filtered(calling: Calling) -> None:
    async def run(service: Any) -> None:
        client = service.client
        ids = [(await client.post("/v1/jobs", json=JOB, headers=ALICE)).json()["id"] for _ in range(5)]
        for job in ids:
            await service.ended(job)
        found, after = [], None
        while True:
            query = {"limit": 2} | ({} if after is None else {"after": after})
            page = (await client.get("/v1/jobs", params=query, headers=ALICE)).json()
            found += [job["id"] for job in page["jobs"]]
            if (after := page["next"]) is None:
                break
        assert found == ids[::-1]
        done = await client.get(
            "/v1/jobs", params={"state": "succeeded", "generator": "small"}, headers=ALICE
        )
        assert len(done.json()["jobs"]) == 5
        assert (await client.get("/v1/jobs?state=failed", headers=ALICE)).json()["jobs"] == []
        problem(await client.get("/v1/jobs?state=odd", headers=ALICE), 422)
        problem(await client.get("/v1/jobs?after=odd", headers=ALICE), 422)
        models = (await client.get(f"/v1/jobs/{ids[0]}/models?start=1&limit=2", headers=ALICE)).json()
        assert ([each["index"] for each in models["models"]], models["next"]) == ([1, 2], 3)

    calling(run)


def test_generators_are_described(calling: Calling) -> None:
    async def run(service: Any) -> None:
        while service.dispatcher.schedulers["small"].report is None:
            await asyncio.sleep(0.01)
        listed = (await service.client.get("/v1/generators", headers=ALICE)).json()["generators"]
        assert [(each["name"], each["ready"], each["condition_size"]) for each in listed] == [
            ("small", True, 3)
        ]
        detail = (await service.client.get("/v1/generators/small", headers=ALICE)).json()
        assert detail["card"].startswith("# Generator of neural networks")
        assert {"name": "head.weight", "shape": [18, 4], "dtype": "float32"} in detail["layout"]
        assert detail["digest"] == service.replica._digest
        problem(await service.client.get("/v1/generators/other", headers=ALICE), 404)
        centre = (await service.client.get("/v1/generators/small/centre", headers=ALICE)).json()
        assert centre["digest"] == detail["digest"]
        mean = service.replica.generator.layout.centre["head.weight"].flatten()
        sampled = [float(mean[k * 72 // 64]) for k in range(64)]
        assert {"name": "head.weight", "numel": 72, "values": sampled} in centre["tensors"]
        problem(await service.client.get("/v1/generators/other/centre", headers=ALICE), 404)
        problem(await service.client.put("/v1/generators", headers=ALICE), 405)
        problem(await service.client.get("/v2", headers=ALICE), 404)

    calling(run)
