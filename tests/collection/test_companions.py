"""Companion files: which lie beside a checkpoint's weights, and what is refused."""

import hashlib
import os
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import save

from rpg.collection import companions as companions_module
from rpg.collection.companions import Companions, companions_of
from rpg.collection.layout import Layout
from rpg.collection.register import register
from rpg.errors import RPGError
from rpg.storage.locations import location
from tests.s3_server import S3Server

MakeLayout = Callable[..., Layout]
CONFIG = b'{"model_type": "bert"}\n'


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    """A directory with more than the files that belong to a model."""
    directory = tmp_path / "checkpoint"
    (directory / "runs").mkdir(parents=True)
    for name, content in {
        "config.json": CONFIG,
        "tokenizer.json": b"{}",
        "vocab.txt": b"a\nb\n",
        "model.safetensors": b"weights",
        "model.safetensors.index.json": b"{}",
        "README.md": b"how this one was trained",
        "trainer_state.json": b"{}",
        "optimizer.pt": b"moments",
        "modeling_own.py": b"import os",
        ".env": b"TOKEN=1",
        "runs/config.json": b"{}",
    }.items():
        (directory / name).write_bytes(content)
    return directory


def test_what_loading_needs_is_taken_and_nothing_else(checkpoint: Path) -> None:
    companions = companions_of(checkpoint)
    assert companions.files == {"config.json": CONFIG, "tokenizer.json": b"{}", "vocab.txt": b"a\nb\n"}
    assert list(companions.digests) == sorted(companions.files)
    assert companions.digests["config.json"] == hashlib.sha256(CONFIG).hexdigest()
    assert companions.weights_name == "model.safetensors"
    (checkpoint / "adapter_config.json").write_bytes(b"{}")
    assert companions_of(checkpoint).weights_name == "adapter_model.safetensors"
    diffusers = Companions({"config.json": b'{"_class_name": "UNet2DModel"}'})
    assert diffusers.weights_name == "diffusion_pytorch_model.safetensors"
    for odd in (b"", b"[]", b"1", b"\xff", b"[" * 100_000):
        assert Companions({"config.json": odd}).weights_name == "model.safetensors"


def test_a_file_has_no_companions_whatever_lies_in_its_folder(checkpoint: Path) -> None:
    assert not companions_of(checkpoint / "model.safetensors")
    assert not companions_of(checkpoint / "missing")
    (checkpoint / "config.json").unlink()
    assert not companions_of(checkpoint), "without a configuration it is no model's directory"


def test_companions_behind_a_uri(checkpoint: Path, s3: S3Server) -> None:
    uri = location(s3.bucket("companions")) / "checkpoint"
    (checkpoint / "merges.txt").write_bytes(b"")
    for name in ("config.json", "tokenizer.json", "merges.txt", "README.md"):
        (uri / name).write_bytes((checkpoint / name).read_bytes())
    companions = companions_of(uri)
    assert companions.files == {"config.json": CONFIG, "merges.txt": b"", "tokenizer.json": b"{}"}
    assert companions.are_in(uri)
    assert not companions_of(checkpoint).are_in(uri), "vocab.txt is not there"


@pytest.mark.timeout(10)
def test_links_and_pipes_are_refused(checkpoint: Path, tmp_path: Path) -> None:
    secret = tmp_path / "secret"
    secret.write_text("private")
    for make, words in (
        (lambda path: path.symlink_to(secret), f"is a link to {secret}; expected a regular file"),
        (lambda path: path.symlink_to(tmp_path / "nowhere"), "is a link to nothing"),
        (lambda path: path.symlink_to(path), "is a link to nothing"),
        (lambda path: path.symlink_to("runs"), "cannot be read: Is a directory"),
        (os.mkfifo, "not a regular file"),
    ):
        make(checkpoint / "merges.txt")
        with pytest.raises(RPGError, match=rf"^{checkpoint}/merges\.txt: {words}"):
            companions_of(checkpoint)
        (checkpoint / "merges.txt").unlink()


def snapshot(cache: Path, model: str, revision: str, seed: int) -> Path:
    """A snapshot as Hugging Face's cache has it: links to blobs that are named by their digests."""
    home = cache / f"models--{model}"
    made = home / "snapshots" / revision
    made.mkdir(parents=True)
    (home / "blobs").mkdir(exist_ok=True)
    weights = {"w": torch.randn(4, generator=torch.Generator().manual_seed(seed))}
    for name, content in (
        ("config.json", CONFIG), ("tokenizer.json", b"{}"), ("model.safetensors", save(weights)),
    ):  # fmt: skip
        blob = home / "blobs" / hashlib.sha256(content).hexdigest()
        blob.write_bytes(content)
        (made / name).symlink_to(Path("..") / ".." / "blobs" / blob.name)
    return made


@pytest.mark.parametrize("are_linked", [False, True])
def test_snapshots_of_hugging_faces_cache_are_registered(tmp_path: Path, are_linked: bool) -> None:
    made = [snapshot(tmp_path / "hub", "org--net", f"revision{i}", i) for i in range(3)]
    root = tmp_path / "hub" / "models--org--net" / "snapshots"
    if are_linked:
        root = tmp_path / "mine"
        root.mkdir()
        for path in made:
            (root / path.name).symlink_to(path)
    collection, problems = register(root)
    assert (len(collection.entries), problems) == (3, [])
    companions = companions_of(collection.path(collection.entries[0]), collection.root)
    assert companions.files == {"config.json": CONFIG, "tokenizer.json": b"{}"}
    companions.write(tmp_path / "written")
    assert not any(path.is_symlink() for path in (tmp_path / "written").iterdir())


def test_links_out_of_a_models_own_blobs_are_refused_when_it_is_registered(tmp_path: Path) -> None:
    made = [snapshot(tmp_path / "hub", "org--net", f"revision{i}", i) for i in range(2)]
    other = snapshot(tmp_path / "hub", "org--other", "revision", 7)
    secret = tmp_path / "secret"
    secret.write_text("private")
    home = made[0].parents[1]
    (home / "blobs" / "odd").symlink_to(secret)
    merges = made[0] / "merges.txt"
    for target in (
        secret,
        other / "config.json",
        "../../../models--org--other/blobs/../../../secret",
        "../../blobs/odd",
    ):
        merges.symlink_to(target)
        with pytest.raises(RPGError, match=rf"^{merges}: is a link to .*expected a regular file") as caught:
            register(made[0].parent)
        assert "\n" not in str(caught.value)
        assert not (made[0].parent / "collection.json").exists()
        merges.unlink()
    # A directory of blobs that leads elsewhere makes no place of a model's of it.
    (home / "blobs").rename(tmp_path / "elsewhere")
    (home / "blobs").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(RPGError, match=r"config\.json: is a link to .*elsewhere"):
        companions_of(made[0])


def test_a_link_within_the_collection_is_followed(tmp_path: Path) -> None:
    (tmp_path / "shared").mkdir()
    (tmp_path / "shared" / "tokenizer.json").write_bytes(b"{}")
    checkpoint = tmp_path / "checkpoint"
    checkpoint.mkdir()
    (checkpoint / "config.json").write_bytes(CONFIG)
    (checkpoint / "tokenizer.json").symlink_to("../shared/tokenizer.json")
    assert companions_of(checkpoint, tmp_path).files["tokenizer.json"] == b"{}"
    with pytest.raises(RPGError, match=r"tokenizer\.json: is a link to"):
        companions_of(checkpoint)


def test_too_much_is_refused(checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(companions_module, "MOST_BYTES", 2**20)
    with (checkpoint / "tokenizer.json").open("wb") as file:
        file.truncate(2**40)
    with pytest.raises(RPGError, match=r"tokenizer\.json: the files beside the weights have more than 1 MiB"):
        companions_of(checkpoint)
    with (checkpoint / "tokenizer.json").open("wb") as file:
        file.truncate(2**20 - len(CONFIG) - 4)
    assert sum(map(len, companions_of(checkpoint).files.values())) == 2**20


def test_a_layout_keeps_its_companions(checkpoint: Path, tmp_path: Path, make_layout: MakeLayout) -> None:
    companions = companions_of(checkpoint)
    plain = make_layout(16)
    layout = plain.with_companions(companions)
    assert layout.digest() != plain.digest()
    layout.save(tmp_path / "layout")
    # A later layout in the same place may have fewer.
    (tmp_path / "layout" / "companions" / "merges.txt").write_text("of an earlier one")
    loaded = Layout.load(tmp_path / "layout")
    assert loaded.companions == companions
    assert loaded.digest() == layout.digest()
    assert loaded.with_token_size(8).companions == companions
    plain.save(tmp_path / "plain")
    assert not (tmp_path / "plain" / "companions").exists()
    assert "companions" not in (tmp_path / "plain" / "layout.json").read_text()
    assert not Layout.load(tmp_path / "plain").companions


def test_other_companions_than_the_layouts_are_refused(
    checkpoint: Path, tmp_path: Path, make_layout: MakeLayout
) -> None:
    make_layout(16).with_companions(companions_of(checkpoint)).save(tmp_path)
    config = tmp_path / "companions" / "config.json"
    config.write_bytes(CONFIG + b" ")
    with pytest.raises(RPGError, match=r"companions/config\.json: not the companion file that .*layout"):
        Layout.load(tmp_path)
    config.unlink()
    with pytest.raises(RPGError, match=r"companions/config\.json: cannot be read: No such file"):
        Layout.load(tmp_path)
    layout = tmp_path / "layout.json"
    layout.write_text(layout.read_text().replace('"vocab.txt"', '"../vocab.txt"'))
    with pytest.raises(RPGError, match=r"layout\.json: companions: expected digests of companion files"):
        Layout.load(tmp_path)


def test_no_companions_are_false() -> None:
    assert not Companions()
    assert Companions().digests == {}
    assert Companions().are_in(Path(__file__)), "whatever is there"
