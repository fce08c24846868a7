"""The files of a job: what is written is read, and what is not a job's is refused in one line."""

import dataclasses
import json
from collections.abc import Callable
from typing import Any

import pytest

from rpg.client.schema import JobState
from rpg.config import SamplingConfig, SamplingPrecision, Solver, TokenDtype
from rpg.errors import RPGError
from rpg.sampling.job import GenerationJob
from serve.dispatch.records import JobManifest, JobProgress, Made

SHA256 = "0" * 64
SAMPLING = SamplingConfig(Solver.ddim, steps=3, guidance=2.0, token_batch=32)
MANIFEST = JobManifest(
    id="q6PBdadxpGPhSBnbsMVe5g",
    owner="alice",
    generator="small",
    priority=-3,
    created=1795832197.0726,
    job=GenerationJob([[0.0, 1.5, -2.0]], 4, 2**63 + 5, SAMPLING, TokenDtype.bfloat16),
    evaluate=True,
    idempotency_key="k",
    request_sha256="0" * 64,
    descriptions=["even digits"],
    encoder="1" * 64,
)


def as_parsed(value: Any) -> Any:
    return json.loads(json.dumps(value, allow_nan=False))


def test_a_manifest_is_read_as_it_was_written() -> None:
    assert JobManifest.from_json(as_parsed(MANIFEST.to_json())) == MANIFEST
    assert MANIFEST.to_json() == as_parsed(dataclasses.asdict(MANIFEST)), "keys, order and values of 0.2"
    assert list(MANIFEST.to_json()) == [each.name for each in dataclasses.fields(JobManifest)]
    without = dataclasses.replace(
        MANIFEST, job=GenerationJob(None, 2, 0, SAMPLING), descriptions=None, encoder=None
    )
    assert JobManifest.from_json(as_parsed(without.to_json())) == without


def test_what_older_manifests_lack_has_its_default() -> None:
    older = as_parsed(MANIFEST.to_json())
    for key in ("evaluate", "pack", "idempotency_key", "request_sha256", "descriptions", "encoder"):
        del older[key]
    for key in ("clip", "precision"):
        del older["job"]["sampling"][key]
    del older["job"]["dtype"]
    manifest = JobManifest.from_json(older)
    assert (manifest.evaluate, manifest.descriptions, manifest.job.dtype) == (False, None, None)
    assert manifest.job.sampling == SAMPLING
    assert manifest.job.sampling.precision is SamplingPrecision.auto


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda m: m.update(id=3), "id: Input should be a valid string"),
        (lambda m: m.update(priority="1"), "priority: Input should be a valid integer"),
        (lambda m: m.update(priority=True), "priority: Input should be a valid integer"),
        (lambda m: m.update(created=float("inf")), "created: Input should be a finite number"),
        (lambda m: m.update(colour="red"), "colour: Unexpected keyword argument"),
        (lambda m: m.pop("job"), "job: Field required"),
        (lambda m: m["job"].update(number=0), "job.number: Input should be greater than or equal to 1"),
        (lambda m: m["job"].update(seed=2**64), "job.seed: Input should be less than 18446744073709551616"),
        (
            lambda m: m["job"].update(conditions=[[0.0, float("nan"), 1.0]]),
            "job.conditions.0.1: Input should be a finite number",
        ),
        (
            lambda m: m["job"]["sampling"].update(solver="euler"),
            "job.sampling.solver: Input should be 'ddpm'",
        ),
        (lambda m: m["job"]["sampling"].update(shift=1.0), "job.sampling.shift: Unexpected keyword argument"),
        (lambda m: m.update(encoder=None), "expected the encoder of the descriptions"),
        (lambda m: m.update(descriptions=["a", "b"]), "expected a condition for each description"),
    ],
)
def test_what_is_no_manifest_is_refused(change: Callable[[Any], Any], message: str) -> None:
    damaged = MANIFEST.to_json()
    change(damaged)
    with pytest.raises(RPGError) as caught:
        JobManifest.from_json(damaged)
    assert str(caught.value).startswith("not a job's manifest: ")
    assert message in str(caught.value)


@pytest.mark.parametrize("value", [[], 3, None, "text", {}])
def test_other_json_is_refused(value: Any) -> None:
    with pytest.raises(RPGError, match=r"^not a job's manifest: "):
        JobManifest.from_json(value)
    with pytest.raises(RPGError, match=r"^not a job's state: "):
        JobProgress.from_json(value, 4)


def test_progress_is_read_as_it_was_written() -> None:
    packed = Made(1, "b" * 64, 8, pack="pack_000001_0123abcd.tar", offset=512)
    made = {3: Made(3, "a" * 64, 7, 0.5, None), 1: packed}
    progress = JobProgress(JobState.running, "c" * 64, None, 1.5, None, made=made)
    assert list(json.loads(progress.to_json())) == ["state", "digest", "error", "started", "ended", "made"]
    assert json.loads(progress.to_json())["made"] == [
        [3, "a" * 64, 7, 0.5, None, None, None, None, 0],
        [1, "b" * 64, 8, None, None, None, None, packed.pack, 512],
    ]
    assert JobProgress.from_json(json.loads(progress.to_json()), 4) == progress


def test_what_older_states_lack_has_its_default() -> None:
    older = {"state": "succeeded", "made": [[0, "a" * 64, 7]]}
    assert JobProgress.from_json(older, 1) == JobProgress(JobState.succeeded, made={0: Made(0, "a" * 64, 7)})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"state": "lost"}, "state: Input should be 'queued'"),
        ({"made": None}, "made: Input should be a valid array"),
        ({"made": [[4, SHA256, 1]]}, "a model's index is out of range"),
        ({"made": [[-1, SHA256, 1]]}, "made.0.0: Input should be greater than or equal to 0"),
        ({"made": [[0, SHA256]]}, "made.0.2: Field required"),
        ({"made": [[0, SHA256, "many"]]}, "made.0.2: Input should be a valid integer"),
        ({"made": [[0, SHA256, -1]]}, "made.0.2: Input should be greater than or equal to 0"),
        ({"made": [[0, SHA256, 1, None, None, None, None, "../x", 0]]}, "made.0.7: String should match"),
        ({"made": [[0, "a", 1]]}, "made.0.1: String should match pattern"),
        ({"digest": ["a"]}, "digest: Input should be a valid string"),
        ({"ended": float("nan")}, "ended: Input should be a finite number"),
        ({"ended": 1e300}, "ended: Input should be less than or equal to"),
        ({"colour": "red"}, "colour: Unexpected keyword argument"),
    ],
)
def test_what_is_no_state_is_refused(change: dict[str, Any], message: str) -> None:
    with pytest.raises(RPGError) as caught:
        JobProgress.from_json({"state": "running", "made": [], **change}, 4)
    assert str(caught.value).startswith("not a job's state: ")
    assert message in str(caught.value)
