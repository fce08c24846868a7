"""Companion files: which lie beside a checkpoint's weights, and what is refused."""

import hashlib
import os
from collections.abc import Callable
from pathlib import Path

import pytest

from rpg.collection import companions as companions_module
from rpg.collection.companions import Companions, companions_of
from rpg.collection.layout import Layout
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
        (lambda path: path.symlink_to(secret), "is a link; expected a regular file"),
        (lambda path: path.symlink_to(tmp_path / "nowhere"), "is a link"),
        (os.mkfifo, "not a regular file"),
    ):
        make(checkpoint / "merges.txt")
        with pytest.raises(RPGError, match=rf"^{checkpoint}/merges\.txt: {words}"):
            companions_of(checkpoint)
        (checkpoint / "merges.txt").unlink()


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
