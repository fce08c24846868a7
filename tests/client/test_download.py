"""Downloads: continued where they broke off, and refused where they are not what was sent."""

import hashlib
import json
from collections.abc import Callable
from pathlib import Path

import pytest

from rpg.client import Client, Job, ModelFile
from rpg.client.download import PartialFile, partial_path
from rpg.errors import RPGError
from tests.client.conftest import HURRY, TOKEN, Both, Live, answered, cut_after, damaged
from tests.serve.conftest import CONDITIONS

Expected = Callable[..., list[bytes]]


@pytest.fixture
def job(client: Client, live: Live) -> Job:
    """One of two models that has ended."""
    job = client.wait(client.submit("small", CONDITIONS, seed=3).id)
    live.requests.clear()
    return job


@pytest.fixture
def contents(expected: Expected) -> list[bytes]:
    return expected(CONDITIONS, 1, 3)


def model(content: bytes, index: int = 0) -> ModelFile:
    digest = hashlib.sha256(content).hexdigest()
    return ModelFile(
        index=index, sha256=digest, bytes=len(content), accuracy=None, similarity=None, description=None
    )


def names(directory: Path) -> list[str]:
    return sorted(path.name for path in directory.iterdir())


def test_all_models(both: Both, job: Job, contents: list[bytes], live: Live, tmp_path: Path) -> None:
    told: list[tuple[int, int]] = []
    paths, same = both("download", job.id, tmp_path / "new", lambda *progress: told.append(progress))
    assert paths == same
    assert [path.read_bytes() for path in paths] == contents
    assert names(tmp_path / "new") == ["model_000000.safetensors", "model_000001.safetensors"]
    assert told[-1] == (sum(map(len, contents)),) * 2
    assert len(live.asked("GET", "/models/0")) == 1, "what is there is not fetched again"


def test_one_that_breaks_off_is_continued(
    client: Client, job: Job, contents: list[bytes], live: Live, tmp_path: Path
) -> None:
    live.fault("GET", "/models/0", cut_after(1000))
    live.fault("GET", "/models/0", cut_after(500))
    paths = client.download(job.id, tmp_path)
    assert [path.read_bytes() for path in paths] == contents
    asked = live.asked("GET", "/models/0")
    tag = f'"{hashlib.sha256(contents[0]).hexdigest()}"'
    assert [each.headers.get("range") for each in asked] == [None, "bytes=1000-", "bytes=1500-"]
    assert [each.headers.get("if-range") for each in asked] == [None, tag, tag]
    assert [each.sent for each in asked] == [1000, 500, len(contents[0]) - 1500]
    assert names(tmp_path) == [path.name for path in paths]


def test_the_next_process_goes_on(
    both: Both, client: Client, job: Job, contents: list[bytes], live: Live, tmp_path: Path
) -> None:
    live.fault("GET", "/models/0", cut_after(1000))
    live.fault("GET", "/models/0", answered(403, {}))
    with pytest.raises(RPGError, match="HTTP status 403"):
        client.download(job.id, tmp_path)
    partial = partial_path(tmp_path / "model_000000.safetensors", model(contents[0]))
    assert partial.read_bytes() == contents[0][:1000]
    assert [path.name for path in tmp_path.iterdir()] == [partial.name]
    live.requests.clear()
    both("download", job.id, tmp_path)
    (asked,) = live.asked("GET", "/models/0")
    assert (asked.headers["range"], asked.sent) == ("bytes=1000-", len(contents[0]) - 1000)


def test_a_server_without_ranges_starts_from_the_beginning(
    client: Client, job: Job, contents: list[bytes], live: Live, tmp_path: Path
) -> None:
    live.fault("GET", "/models/0", cut_after(1000))
    live.fault("GET", "/models/0", answered(200, {}, contents[0]))
    assert client.download(job.id, tmp_path)[0].read_bytes() == contents[0]


def test_what_is_damaged_on_the_way_is_refused(
    client: Client, job: Job, contents: list[bytes], live: Live, tmp_path: Path
) -> None:
    target = tmp_path / "model_000000.safetensors"
    live.fault("GET", "/models/0", damaged())
    with pytest.raises(
        RPGError, match=f"^{target}: damaged on its way: expected SHA-256 [0-9a-f]{{64}}, got"
    ):
        client.download(job.id, tmp_path)
    assert names(tmp_path) == []
    live.fault("GET", "/models/0", answered(200, {}, contents[0] + b"more"))
    with pytest.raises(RPGError, match="more arrived than the"):
        client.download(job.id, tmp_path)
    assert names(tmp_path) == []
    assert client.download(job.id, tmp_path)[0].read_bytes() == contents[0]


def test_a_damaged_beginning_is_fetched_again(
    client: Client, job: Job, contents: list[bytes], live: Live, tmp_path: Path
) -> None:
    partial = partial_path(tmp_path / "model_000000.safetensors", model(contents[0]))
    for left in (b"x" * 700, b"x" * (len(contents[0]) + 5), b"x" * len(contents[0])):
        partial.write_bytes(left)
        paths = client.download(job.id, tmp_path)
        assert paths[0].read_bytes() == contents[0]
        paths[0].unlink()
        assert not partial.exists()


def test_the_model_in_the_answer_is_checked_too(client: Client, live: Live) -> None:
    live.fault("GET", "/models/0", damaged())
    with pytest.raises(RPGError, match=r"^the model: damaged on its way"):
        client.generate("small", CONDITIONS[0])


def test_other_files_are_not_replaced(client: Client, job: Job, tmp_path: Path) -> None:
    other = tmp_path / "model_000001.safetensors"
    other.write_bytes(b"mine")
    with pytest.raises(RPGError, match=f"{other}: something else than model 1 of this job is there already"):
        client.download(job.id, tmp_path)
    assert other.read_bytes() == b"mine"


def test_two_at_once_do_not_mix(client: Client, job: Job, live: Live, tmp_path: Path) -> None:
    with Client(live.url, TOKEN, HURRY) as second:

        def meddle(done: int, total: int) -> None:
            with pytest.raises(RPGError, match="another process is downloading it"):
                second.download(job.id, tmp_path / "two")
            raise KeyboardInterrupt

        with pytest.raises(KeyboardInterrupt):
            client.download(job.id, tmp_path / "two", meddle)


def test_a_directory_that_cannot_be_written(client: Client, job: Job, tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(RPGError, match="cannot be written: "):
        client.download(job.id, tmp_path / "file")


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
def test_a_full_disk() -> None:
    with Path("/dev/full").open("r+b", buffering=0) as full:
        arriving = PartialFile(full, model(b"content"), "model_000000.safetensors")
        with pytest.raises(RPGError, match=r"^model_000000.safetensors: cannot be written: No space left"):
            arriving.write(b"content")
        assert arriving.size == 0


@pytest.mark.parametrize(
    "change",
    [
        {"index": "0"}, {"index": "../0"}, {"index": 0.0}, {"index": 0.5}, {"index": -5}, {"index": True},
        {"index": 10**400}, {"index": None}, {"index": []}, {"bytes": -1}, {"bytes": "7"}, {"sha256": 7},
        {"sha256": "../../name"}, {"sha256": "A" * 64},
    ],
    ids=lambda change: str(change)[:30],
)  # fmt: skip
def test_an_answer_that_is_wrong_becomes_no_file(
    client: Client, live: Live, tmp_path: Path, change: dict[str, object]
) -> None:
    given = {**model(b"content").model_dump(), **change}
    body = json.dumps({"models": [given], "next": None}).encode()
    live.fault("GET", "/models", answered(200, {"Content-Type": "application/json"}, body))
    with pytest.raises(
        RPGError, match=r"^the answer is wrong at models\.0\.\w+: .*expected that of"
    ) as caught:
        client.download("an-id", tmp_path / "new")
    assert "\n" not in str(caught.value)
    assert not list(tmp_path.iterdir())


def test_pages_that_go_back_end_in_one_line(client: Client, live: Live, tmp_path: Path) -> None:
    body = json.dumps({"models": [], "next": 0}).encode()
    live.fault("GET", "/models", answered(200, {"Content-Type": "application/json"}, body))
    with pytest.raises(RPGError, match=r"^the answer is wrong at next: "):
        client.download("an-id", tmp_path)
