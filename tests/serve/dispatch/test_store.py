"""What a start finds on storage after crashes, losses and failures of the storage itself."""

import errno
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import IO, Any

import pytest

from rpg.client.schema import JobState
from rpg.config import SamplingConfig
from rpg.errors import RPGError
from rpg.sampling.job import GenerationJob
from rpg.storage.below import open_below, remove_below
from rpg.storage.locations import AnyPath, is_remote, location
from serve.dispatch.records import JobManifest, JobProgress, Made
from serve.dispatch.store import JobStore, Quarantined, new_id
from tests.s3_server import Proxy, S3Server


class Killed(BaseException):
    """Stands for SIGKILL: no handler catches it."""


@pytest.fixture(params=["directory", "uri"])
def store(request: pytest.FixtureRequest, tmp_path: Path) -> JobStore:
    if request.param == "directory":
        return JobStore(tmp_path / "storage")
    s3: S3Server = request.getfixturevalue("s3")
    return JobStore(location(s3.bucket(f"store-{time.monotonic_ns()}") + "/service"))


def ended_job(store: JobStore) -> str:
    """The id of a job on storage that has made two models."""
    job = GenerationJob(None, 2, 0, SamplingConfig())
    manifest = JobManifest(new_id(), "alice", "small", 0, time.time(), job)
    store.create(manifest)
    if isinstance(store.root, Path):
        store.models(manifest.id).mkdir()
    for index in range(2):
        store.model(manifest.id, index).write_bytes(b"a model")
    made = {index: Made(index, "0" * 64, 7) for index in range(2)}
    store.save(manifest.id, JobProgress(JobState.succeeded, ended=time.time(), made=made))
    return manifest.id


def directory(store: JobStore, job_id: str) -> AnyPath:
    return store.models(job_id).parent


def test_a_job_that_lost_its_manifest_is_left_as_it_is(store: JobStore) -> None:
    lost, other = ended_job(store), ended_job(store)
    (directory(store, lost) / "job.json").unlink()
    for _ in range(2):
        found = {each.id if isinstance(each, Quarantined) else each[0].id: each for each in store.all()}
        assert found.keys() == {lost, other}
        quarantined = found[lost]
        assert isinstance(quarantined, Quarantined)
        assert quarantined.reason.endswith(f"{lost}/job.json: not found; expected a job's manifest")
        assert [store.model(lost, index).read_bytes() for index in range(2)] == [b"a model"] * 2
    store.mark_removed(lost)
    store.remove_files(lost)
    assert not directory(store, lost).exists()


def test_wherever_a_removal_is_cut_short_the_next_start_completes_it(
    store: JobStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    for steps in range(3):
        job, left = ended_job(store), steps
        store.mark_removed(job)

        def killed_later(delete: Callable[..., None]) -> Callable[..., None]:
            def deleting(*arguments: Any, **options: Any) -> None:
                nonlocal left
                if left == 0:
                    raise Killed
                left -= 1
                delete(*arguments, **options)

            return deleting

        with monkeypatch.context() as patch:
            if is_remote(store.root):
                patch.setattr(store.root.fs, "rm", killed_later(store.root.fs.rm))
            else:
                patch.setattr("serve.dispatch.store.remove_below", killed_later(remove_below))
            with pytest.raises(Killed):
                store.remove_files(job)
        assert not list(store.all())
        assert not directory(store, job).exists()


def test_what_a_crash_left_of_a_job_that_was_never_accepted_is_removed(tmp_path: Path) -> None:
    store = JobStore(tmp_path)
    begun, empty = tmp_path / "jobs" / new_id(), tmp_path / "jobs" / new_id()
    for path in (begun, empty):
        path.mkdir(parents=True)
    (begun / ".job.json.17.partial").write_text('{"id": ')
    assert not list(store.all())
    assert not begun.exists() and not empty.exists()


class Failing:
    """Files whose names end with `name` cannot be read, so many times."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, name: str, times: int, error: int) -> None:
        self.left = times

        def opening(root: AnyPath, place: str) -> IO[bytes]:
            if place.endswith(f"/{name}") and self.left:
                self.left -= 1
                raise OSError(error, os.strerror(error), str(root / place))
            return open_below(root, place)

        monkeypatch.setattr("rpg.storage.below.open_below", opening)


@pytest.mark.parametrize("name", ["job.json", "state.json"])
def test_a_storage_that_fails_for_a_moment_harms_no_job(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    store = JobStore(tmp_path, retry_seconds=(0.0, 0.0))
    job = ended_job(store)
    Failing(monkeypatch, name, 2, errno.EIO)
    ((manifest, progress),) = store.all()  # type: ignore[misc]
    assert (manifest.id, len(progress.made)) == (job, 2)


def test_a_storage_that_goes_on_failing_quarantines_no_job(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = JobStore(tmp_path, retry_seconds=(0.0, 0.0))
    job = ended_job(store)
    with monkeypatch.context() as patch:
        Failing(patch, "job.json", 1000, errno.ESTALE)
        with pytest.raises(RPGError, match=rf"{job}/job.json: cannot be read as a job's manifest: "):
            list(store.all())
    assert not (tmp_path / "jobs" / job / "quarantined.json").exists()
    assert len(list(store.all())) == 1


def test_a_file_that_may_not_be_read_quarantines_its_job_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = JobStore(tmp_path)
    job = ended_job(store)
    Failing(monkeypatch, "job.json", 1, errno.EACCES)
    (found,) = store.all()
    assert isinstance(found, Quarantined) and found.id == job


def test_an_object_store_that_fails_for_a_moment_harms_no_job(s3: S3Server, proxy: Proxy) -> None:
    store = JobStore(location(s3.bucket("moment") + "/service"), retry_seconds=(0.0, 0.0))
    job = ended_job(store)
    refused = 0

    def refuses(method: str, path: str) -> bool:
        nonlocal refused
        refused += method == "GET" and path.endswith("/job.json")
        return method == "GET" and path.endswith("/job.json") and refused < 3

    proxy.refuses = refuses
    ((manifest, _),) = store.all()  # type: ignore[misc]
    assert manifest.id == job
    assert refused == 3
