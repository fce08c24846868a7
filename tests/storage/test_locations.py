"""Locations and files behind URIs, on a real S3 server and in fsspec's memory."""

import json
import os
import sys
import time
import uuid
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from s3fs import S3FileSystem
from safetensors.torch import save_file

from rpg.collection.checkpoint import (
    checkpoint_sha256,
    read_checkpoint,
    read_checkpoint_and_sha256,
    write_checkpoint,
)
from rpg.collection.collection import Collection
from rpg.collection.layout import Layout
from rpg.collection.register import register
from rpg.commands.main import main
from rpg.config import SamplingConfig
from rpg.errors import RPGError
from rpg.generator.generator import Generator
from rpg.sampling.generate import generate_models
from rpg.storage.directories import remove_directory
from rpg.storage.errors import StorageError
from rpg.storage.files import copy_file, read_json, replacing_file, sha256, write_json, write_text
from rpg.storage.locations import exists, fetched, identity, is_remote, location

NAMES = st.text("abcdefghijklmnop0123456789_.-", min_size=1).filter(lambda name: name.strip("."))


@pytest.fixture
def bucket(s3):
    return s3.bucket(f"bucket-{uuid.uuid4().hex[:12]}")


class TestLocation:
    def test_local_paths_become_absolute(self, tmp_path, monkeypatch):
        monkeypatch.chdir(tmp_path)
        assert location("runs/a") == tmp_path / "runs" / "a"
        assert location("~/a") == Path.home() / "a"
        assert location(f"file://{tmp_path}/a") == tmp_path / "a"
        assert not is_remote(location("s3/bucket"))
        with pytest.raises(RPGError, match="~nobody-has-this-name/a"):
            location("~nobody-has-this-name/a")

    @settings(deadline=None)
    @given(
        st.sampled_from(["s3", "memory"]), st.lists(NAMES, min_size=1, max_size=4), st.sampled_from(["", "/"])
    )
    def test_uris_keep_their_text(self, protocol, parts, slash):
        uri = f"{protocol}://bucket/" + "/".join(parts)
        path = location(uri + slash)
        assert is_remote(path)
        assert str(path) == uri
        assert path.name == parts[-1]
        assert str(path / "x") == f"{uri}/x"

    @pytest.mark.parametrize("uri", ["s3://", "s3:///key", "gs://", "nonsense://bucket/key", "://x"])
    def test_malformed_uris_are_refused(self, uri, monkeypatch):
        with pytest.raises(RPGError) as caught:
            location(uri)
        assert str(caught.value).startswith(uri)
        assert "\n" not in str(caught.value)

    def test_package_that_is_not_installed(self, monkeypatch):
        # Importing a module that is None in sys.modules fails like importing a missing one.
        monkeypatch.setitem(sys.modules, "gcsfs", None)
        with pytest.raises(RPGError, match=r"^gs://bucket/key: .*pip install 'rpg\[gcs\]'$"):
            location("gs://bucket/key")


class TestFiles:
    @settings(deadline=None, max_examples=30)
    @given(st.binary(max_size=300_000))
    def test_bytes_come_back(self, tmp_path_factory, content):
        source = tmp_path_factory.getbasetemp() / "source"
        source.write_bytes(content)
        target = location("memory://bucket/a/b")
        copy_file(source, target)
        assert target.read_bytes() == content
        assert sha256(target) == sha256(source)
        with fetched(target) as local:
            assert (local.name, local.read_bytes()) == ("b", content)
        assert not local.exists()

    def test_s3_json(self, s3, bucket):
        path = location(bucket) / "a" / "b.json"
        assert not exists(path)
        assert identity(path) is None
        write_json(path, {"ü": [1, None]})
        assert s3.content(bucket[5:]) == {"a/b.json": '{\n  "ü": [\n    1,\n    null\n  ]\n}\n'.encode()}
        assert read_json(path, "a value") == {"ü": [1, None]}
        before = identity(path)
        assert identity(path) == before is not None
        write_json(path, 2)
        assert identity(path) != before
        remove_directory(path.parent)
        assert s3.content(bucket[5:]) == {}

    @pytest.mark.parametrize("error", [OSError(28, "No space left on device"), ValueError("x")])
    def test_an_error_leaves_the_earlier_object(self, s3, bucket, error):
        path = location(bucket) / "a.txt"
        write_text(path, "one")
        with pytest.raises((RPGError, ValueError)) as caught, replacing_file(path) as temporary:
            temporary.write_text("half")
            raise error
        if isinstance(error, OSError):
            assert str(caught.value).startswith(f"{path}: cannot be written: No space left on device")
        assert path.read_text() == "one"
        assert not temporary.parent.exists()

    def test_directories_are_fetched_whole(self, bucket, tmp_path):
        for name in ("a", "b/c", "b/d/e"):
            write_text(location(bucket) / "dir" / name, name)
        write_text(location(bucket) / "directory", "has the same beginning")
        with fetched(location(bucket) / "dir") as local:
            found = {str(p.relative_to(local)): p.read_text() for p in local.rglob("*") if p.is_file()}
        assert found == {name: name for name in ("a", "b/c", "b/d/e")}

    def test_a_key_that_leads_out_of_its_directory_is_refused(self, s3, bucket):
        s3.client.put_object(Bucket=bucket[5:], Key="dir/../../../evil", Body=b"x")
        with pytest.raises(RPGError, match=r"\.\./\.\./\.\./evil"), fetched(location(bucket) / "dir"):
            pass


class TestErrors:
    """One line that names the URI and says what is wrong."""

    def test_missing(self, bucket):
        missing = location("s3://no-such-bucket-here/key.json")
        with pytest.raises(
            StorageError, match=r"^s3://no-such-bucket-here/key.json: .*bucket does not exist"
        ):
            read_json(missing, "a manifest")
        with pytest.raises(StorageError, match=r"cannot be written: not found: .*bucket does not exist"):
            write_json(missing, 1)
        with pytest.raises(StorageError, match=r"/key.json: cannot be read as a manifest: not found$"):
            read_json(location(bucket) / "key.json", "a manifest")
        with pytest.raises(RPGError, match=r"key.safetensors: cannot be read: not found$"):
            read_checkpoint(location(bucket) / "key.safetensors")

    def test_no_credentials(self, s3, bucket, monkeypatch, tmp_path):
        for key in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
            monkeypatch.delenv(key)
        monkeypatch.setenv("HOME", str(tmp_path))
        monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
        S3FileSystem.clear_instance_cache()
        for attempt in (lambda p: read_json(p, "x"), lambda p: write_json(p, 1), exists, Collection.load):
            with pytest.raises(StorageError, match=rf"^{bucket}/a.*: no credentials; expected them in"):
                attempt(location(bucket) / "a")
        S3FileSystem.clear_instance_cache()

    def test_permission_denied(self, bucket, proxy):
        path = location(bucket) / "a.json"
        write_json(path, 1)
        proxy.refuses = lambda method, path: method == "PUT"
        with pytest.raises(
            StorageError, match=rf"^{path}: cannot be written: permission denied: Access Denied"
        ):
            write_json(path, 2)
        assert read_json(path, "x") == 1
        proxy.refuses = lambda method, path: method == "GET"
        with pytest.raises(StorageError, match=rf"^{path}: cannot be read as x: permission denied"):
            read_json(path, "x")

    def test_an_unreachable_endpoint_is_named(self, s3, monkeypatch):
        monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")
        S3FileSystem.clear_instance_cache()
        began = time.monotonic()
        with pytest.raises(StorageError, match=r"^s3://bucket/a.json: .*the storage cannot be reached"):
            read_json(location("s3://bucket/a.json"), "x")
        assert time.monotonic() - began < 30
        S3FileSystem.clear_instance_cache()


class TestCheckpoints:
    @pytest.mark.parametrize("name", ["a.safetensors", "a.pt", "adapter"])
    def test_every_form_is_read(self, name, bucket, tmp_path):
        tensors = {"b.10": torch.randn(3, 4), "b.2": torch.arange(5)}
        local = tmp_path / name
        if name == "a.safetensors":
            write_checkpoint(local, tensors, {})
        elif name == "a.pt":
            torch.save(tensors, local)
        else:
            local.mkdir()
            (local / "adapter_config.json").write_text("{}")
            save_file(tensors, local / "adapter_model.safetensors")
        for file in [local] if local.is_file() else local.iterdir():
            copy_file(file, location(f"{bucket}/{file.relative_to(tmp_path)}"))
        found, digest = read_checkpoint_and_sha256(location(bucket) / name)
        expected = read_checkpoint(local)
        assert list(found) == list(expected)
        assert all(torch.equal(found[key], expected[key]) for key in found)
        assert digest == checkpoint_sha256(location(bucket) / name) == checkpoint_sha256(local)

    def test_of_a_models_directory_only_its_own_files_are_transferred(self, s3, bucket, proxy, tmp_path):
        local, remote = tmp_path / "model", location(bucket) / "model"
        local.mkdir()
        weight_map = {}
        for i in (1, 2):
            name = f"model-{i:05d}-of-00002.safetensors"
            save_file({f"w{i}": torch.full((3,), float(i))}, local / name)
            weight_map[f"w{i}"] = name
        (local / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
        (local / "config.json").write_text("{}")
        for file in local.iterdir():
            copy_file(file, remote / file.name)
        for other in ("optimizer.pt", "pytorch_model.bin", "onnx/model.safetensors"):
            write_text(remote / other, "other")
        proxy.refuses = lambda method, path: (
            method == "GET" and path.endswith((".pt", ".bin", "onnx/model.safetensors"))
        )
        found, digest = read_checkpoint_and_sha256(remote)
        assert {name: tensor[0].item() for name, tensor in found.items()} == {"w1": 1, "w2": 2}
        assert digest == checkpoint_sha256(local)
        s3.client.delete_object(Bucket=bucket[5:], Key="model/model-00002-of-00002.safetensors")
        with pytest.raises(RPGError, match=rf"^{remote}: 'model-00002-of-00002.safetensors' is missing"):
            read_checkpoint(remote)

    def test_written_as_locally(self, s3, bucket, tmp_path):
        tensors = {"x": torch.randn(3), "y": torch.zeros(())}
        for path in (tmp_path / "a.safetensors", location(bucket) / "a.safetensors"):
            write_checkpoint(path, tensors, {"k": "v"})
        assert s3.content(bucket[5:])["a.safetensors"] == (tmp_path / "a.safetensors").read_bytes()

    def test_a_truncated_one_is_named_by_its_uri(self, bucket):
        path = location(bucket) / "a.safetensors"
        write_text(path, "not a checkpoint")
        with pytest.raises(RPGError, match=rf"^{path}: truncated or not a .safetensors file"):
            read_checkpoint(path)


class TestCollection:
    def test_registered_like_a_folder(self, bucket, tmp_path, make_checkpoints):
        root = location(bucket) / "collection"
        for i, checkpoint in enumerate(make_checkpoints(4)):
            for directory in (tmp_path, root):
                write_checkpoint(directory / f"{i}.safetensors", checkpoint, {})
        write_text(root / "notes.txt", "not a checkpoint")
        register(tmp_path)
        register(root)
        assert (root / "collection.json").read_text() == (tmp_path / "collection.json").read_text()
        collection = Collection.load(root)
        for entry in collection.entries:
            expected = read_checkpoint(tmp_path / entry.file)
            for found in (collection.read(entry), collection.read_checked(entry)):
                assert all(torch.equal(found[name], expected[name]) for name in expected)
        write_checkpoint(root / "2.safetensors", make_checkpoints(1, seed=1)[0], {})
        with pytest.raises(RPGError, match=rf"^{root}/2.safetensors: changed since it was registered"):
            collection.read_checked(collection.entries[2])

    def test_a_storage_that_fails_makes_no_checkpoint_bad(self, bucket, proxy, make_checkpoints):
        root = location(bucket)
        for i, checkpoint in enumerate(make_checkpoints(4)):
            write_checkpoint(root / f"{i}.safetensors", checkpoint, {})
        proxy.refuses = lambda method, path: "2.safetensors" in path
        with pytest.raises(StorageError, match=r"2.safetensors: cannot be read: permission denied"):
            register(root, skip_bad=True)
        assert not exists(root / "collection.json")


class TestGenerator:
    def test_saved_loaded_and_used_behind_uris(
        self, bucket, tmp_path, make_layout, make_generator, s3, capsys
    ):
        generator = make_generator(make_layout())
        for directory in (f"{bucket}/generator", str(tmp_path / "generator")):
            generator.save_pretrained(directory)
        saved = s3.content(bucket[5:], "generator/")
        assert saved == {f"generator/{p.name}": p.read_bytes() for p in (tmp_path / "generator").iterdir()}
        loaded = Generator.from_pretrained(f"{bucket}/generator")
        assert loaded.digest() == generator.digest()

        arguments = ["--condition", "0.5,1,0", "--number", "3", "--steps", "2", "--seed", "5"]
        assert main(["generate", f"{bucket}/generator", *arguments, "--out", f"{bucket}/models"]) == 0
        assert main(["generate", f"{bucket}/generator", *arguments, "--out", str(tmp_path / "models")]) == 0
        made = s3.content(bucket[5:], "models/")
        assert made == {f"models/{p.name}": p.read_bytes() for p in (tmp_path / "models").iterdir()}
        assert f"{bucket}/models/model_000002.safetensors" in capsys.readouterr().out
        assert main(["inspect", f"{bucket}/generator"]) == 0
        assert main(["inspect", f"{bucket}/models/model_000000.safetensors"]) == 0

    def test_a_job_goes_on_where_it_stopped(self, bucket, proxy, make_layout, make_generator):
        generator = make_generator(make_layout())
        sampling = SamplingConfig(steps=2)
        out = location(bucket)
        generate_models(generator, [[0.0, 0.0, 1.0]], 2, 0, out, sampling)
        proxy.requests.clear()
        # Another job, of which the first two models are another's.
        generate_models(generator, [[0.0, 0.0, 1.0]], 4, 0, out, sampling)
        assert sum(method == "PUT" for method, _ in proxy.requests) == 4
        proxy.requests.clear()
        generate_models(generator, [[0.0, 0.0, 1.0]], 4, 0, out, sampling)
        assert sum(method == "PUT" for method, _ in proxy.requests) == 0

    def test_weights_of_another_layout_are_refused(
        self, bucket, make_layout, make_checkpoints, make_generator
    ):
        """A save to a URI that was interrupted between two files leaves such a generator."""
        layout = make_layout()
        make_generator(layout).save_pretrained(bucket)
        moved = {name: t + 1 if t.is_floating_point() else t for name, t in layout.centre.items()}
        Layout(layout.normalisation, layout.token_size, layout.specs, moved).save(location(bucket))
        with pytest.raises(RPGError, match=rf"^{bucket}/generator.safetensors: .* another layout"):
            Generator.from_pretrained(bucket)

    def test_other_files_are_not_replaced(self, bucket, make_layout, make_generator):
        write_text(location(bucket) / "mine" / "thesis.txt", "precious")
        with pytest.raises(RPGError, match="holds other files"):
            make_generator(make_layout()).save_pretrained(f"{bucket}/mine")

    def test_missing(self, bucket, capsys):
        assert main(["generate", f"{bucket}/none", "--out", bucket]) == 2
        assert capsys.readouterr().err == f"rpg: error: {bucket}/none: cannot be read: not found\n"
        assert main(["inspect", f"{bucket}/none"]) == 2
        assert main(["register", "s3://no-such-bucket-here"]) == 2
        assert main(["inspect", "gopher://x/y"]) == 2
        lines = capsys.readouterr().err.splitlines()
        assert len(lines) == 3 and all(line.startswith("rpg: error: ") for line in lines)


def test_shards_are_written_and_inspected(bucket, make_collection, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    shards = make_collection(tmp_path / "local")
    for file in (tmp_path / "local").iterdir():
        copy_file(file, location(f"{bucket}/shards/{file.name}"))
    assert main(["inspect", f"{bucket}/shards", "--verify"]) == 0
    assert f"{len(shards)}" in capsys.readouterr().out
    layout = Layout.load(location(bucket) / "shards")
    assert np.array_equal(layout.lengths(), shards.layout.lengths())
    assert os.listdir(tmp_path / "home" / ".cache" / "rpg")  # noqa: PTH208
