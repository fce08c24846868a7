"""Jobs whose collection and output lie behind URIs, on a real S3 server, its bad days included."""

import json
import time
import uuid

import pytest
import torch
from s3fs import S3FileSystem
from safetensors.torch import load_file

from rpg.collection.layout import Encoded
from rpg.collection.shards import ShardedCollection
from rpg.storage.files import copy_file, read_json, write_json
from rpg.storage.locations import fetched, location

pytestmark = pytest.mark.slow


@pytest.fixture
def bucket(s3):
    return s3.bucket(f"runs-{uuid.uuid4().hex[:12]}")


@pytest.fixture
def new_connections():
    """What has been opened by then knows other servers."""
    S3FileSystem.clear_instance_cache()
    yield
    S3FileSystem.clear_instance_cache()


def assert_one_line(result, *parts):
    errors = [line for line in result.stderr.splitlines() if "error:" in line]
    assert (result.returncode, len(errors)) == (2, 1), result.stderr
    assert "Traceback" not in result.stderr
    for part in parts:
        assert part in errors[0], errors[0]


def test_a_collection_in_a_bucket_is_sharded(small_run, small_settings, run_job, bucket, tmp_path):
    source = small_run.root / "collection"
    content = json.loads((source / "collection.json").read_text())
    content["entries"] = [entry for entry in content["entries"] if entry["split"] == "train"][:30]
    write_json(location(bucket) / "mine" / "collection.json", content)
    for entry in content["entries"]:
        copy_file(source / entry["file"], location(bucket) / "mine" / entry["file"])
    settings = [*small_settings, f"collect.directory={bucket}/mine", f"output={bucket}/run"]
    result = run_job("shard", [*settings, f"ray.cache_directory={tmp_path}"])
    assert result.returncode == 0, result.stderr
    with fetched(location(bucket) / "run" / "shards") as local:
        shards = ShardedCollection.open(local)
        shards.verify()
    assert shards.names == [entry["file"] for entry in content["entries"]]
    for i, name in enumerate(shards.names):
        tokens = shards.read(i, range(shards.layout.tokens))
        found = shards.layout.decode(Encoded(tokens, shards.layout.constants))
        for key, tensor in load_file(source / name).items():
            torch.testing.assert_close(found[key], tensor)


def test_a_bucket_that_turns_read_only_can_be_finished(small_run, run_job, bucket, s3, proxy, tmp_path):
    """Stopped half way through generating, finished when it may write again, equal to the local run."""
    for part in ("collection", "shards", "stages/collect.json", "stages/shard.json"):
        S3FileSystem().put(str(small_run.root / part), f"{bucket}/run/{part}", recursive=True)
    made: list[str] = []

    def refuses(method: str, path: str) -> bool:
        is_model = method == "PUT" and "/generated/" in path
        made.extend([path] if is_model and len(made) < 30 else [])
        return is_model and path not in made

    proxy.refuses = refuses
    arguments = [*small_run.arguments, f"output={bucket}/run", f"ray.cache_directory={tmp_path}"]
    arguments += ["generate.models_per_batch=10"]
    stopped = run_job("pipeline", arguments)
    assert_one_line(stopped, f"{bucket}/run/generated/model_", "cannot be written: permission denied")
    before = s3.content(bucket[5:])
    assert sum("/generated/" in key for key in before) == 30

    proxy.refuses = lambda method, path: False
    proxy.requests.clear()
    finished = run_job("pipeline", arguments)
    assert finished.returncode == 0, finished.stderr
    for stage in ("collect", "shard", "train", "refine"):
        assert f"{stage}: unchanged, reused" in finished.stderr
    assert f"{bucket}/run/report.html" in finished.stderr
    models = [path for method, path in proxy.requests if method == "PUT" and "/generated/model_" in path]
    # Those that were there have not been written again.
    assert len(models) == 80 - 30

    after = s3.content(bucket[5:])
    for folder in ("shards", "generated", "generator"):
        for file in (small_run.root / folder).iterdir():
            # Has times of its own. The model card has the accuracies: equal to the last digit.
            if file.name != "history.json":
                assert after[f"run/{folder}/{file.name}"] == file.read_bytes(), file.name
    ours, local = json.loads(after["run/report.json"]), read_json(small_run.root / "report.json", "a report")
    assert (ours["score"], ours["similarity"]) == (local["score"], local["similarity"])
    # Workers brought shards and generator to the node once; the generator anew with its last model card.
    kept = [json.loads(source.read_text())["uri"] for source in tmp_path.glob("*/source.json")]
    assert set(kept) == {f"{bucket}/run/{part}" for part in ("shards", "fitted", "generator")}
    assert kept.count(f"{bucket}/run/shards") == 1


@pytest.mark.usefixtures("new_connections")
@pytest.mark.parametrize(
    "output, environment, parts",
    [
        ("s3://no-such-bucket-here/run", {}, ["s3://no-such-bucket-here/run", "bucket does not exist"]),
        ("{bucket}/run", {"AWS_ENDPOINT_URL": "http://127.0.0.1:9"}, ["/run", "cannot be reached"]),
    ],
    ids=["missing bucket", "nobody there"],
)
def test_an_output_that_cannot_be_written_is_refused_before_any_work(
    output, environment, parts, call_job, small_settings, bucket, tmp_path, monkeypatch
):
    for key, value in environment.items():
        monkeypatch.setenv(key, value)
    settings = [*small_settings, f"output={output.format(bucket=bucket)}", f"ray.cache_directory={tmp_path}"]
    began = time.monotonic()
    assert_one_line(call_job("collect", settings), *parts)
    # Refused before any work is done, without waiting for what does not come.
    assert time.monotonic() - began < 60
