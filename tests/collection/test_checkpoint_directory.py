"""Directories of one checkpoint: what Hugging Face's libraries save is read as they read it."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from rpg.collection.checkpoint import checkpoint_files, checkpoint_sha256, read_checkpoint
from rpg.collection.checkpoint_directory import is_checkpoint_directory
from rpg.collection.collection import Collection
from rpg.collection.register import BadCheckpointsError, register
from rpg.errors import RPGError


def llama(seed: int) -> Any:
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=12,
        num_attention_heads=4,
        tie_word_embeddings=False,
    )
    return LlamaForCausalLM(config)


def save_parts(root: Path, seed: int = 0, suffix: str = "safetensors") -> dict[str, Tensor]:
    """A model in parts, with an index like those of Transformers; the whole state dict."""
    torch.manual_seed(seed)
    parts = [{"b.10.w": torch.randn(3), "b.2.w": torch.randn(2, 2)}, {"a": torch.randn(4)}]
    root.mkdir()
    stem = "model" if suffix == "safetensors" else "pytorch_model"
    weight_map = {}
    for i, part in enumerate(parts, start=1):
        name = f"{stem}-{i:05d}-of-00002.{suffix}"
        save_file(part, root / name) if suffix == "safetensors" else torch.save(part, root / name)
        weight_map |= dict.fromkeys(part, name)
    (root / "config.json").write_text('{"model_type": "llama"}')
    index = {"metadata": {"total_size": 44}, "weight_map": weight_map}
    (root / f"{stem}.{suffix}.index.json").write_text(json.dumps(index))
    return parts[0] | parts[1]


def assert_same(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert set(found) == set(expected)
    assert all(torch.equal(found[name], expected[name]) for name in expected)


class TestTransformers:
    @pytest.mark.parametrize("shard_size", ["5GB", "50KB"], ids=["one file", "parts"])
    def test_a_saved_model_is_one_checkpoint(self, tmp_path: Path, shard_size: str) -> None:
        model = llama(0)
        model.save_pretrained(tmp_path / "model", max_shard_size=shard_size)
        files = {file.name for file in checkpoint_files(tmp_path / "model")}
        weights = {file for file in files if file.endswith(".safetensors")}
        assert len(weights) == 1 if shard_size == "5GB" else len(weights) > 5
        assert ("model.safetensors.index.json" in files) == (len(weights) > 1)
        assert "config.json" in files
        assert "generation_config.json" not in files
        found = read_checkpoint(tmp_path / "model")
        assert_same(found, model.state_dict())
        layers = [name for name in found if name.endswith("q_proj.weight")]
        assert layers == [f"model.layers.{i}.self_attn.q_proj.weight" for i in range(12)]

    def test_models_in_parts_are_registered_and_read_again(self, tmp_path: Path) -> None:
        expected = {}
        for seed in range(3):
            model = llama(seed)
            model.save_pretrained(tmp_path / f"task_{seed}", max_shard_size="50KB")
            expected[f"task_{seed}"] = model.state_dict()
        register(tmp_path, pattern="task_{task:value}")
        collection = Collection.load(tmp_path)
        assert [entry.file for entry in collection.entries] == list(expected)
        assert [entry.condition for entry in collection.entries] == [[0.0], [1.0], [2.0]]
        for entry in collection.entries:
            assert_same(collection.read_checked(entry), expected[entry.file])


class TestForms:
    @pytest.mark.parametrize("suffix", ["safetensors", "bin"])
    def test_parts_are_joined(self, tmp_path: Path, suffix: str) -> None:
        expected = save_parts(tmp_path / "m", suffix=suffix)
        found = read_checkpoint(tmp_path / "m")
        assert_same(found, expected)
        order = ["a", "b.2.w", "b.10.w"] if suffix == "safetensors" else ["b.10.w", "b.2.w", "a"]
        assert list(found) == order

    @pytest.mark.parametrize("name", ["model.safetensors", "pytorch_model.bin"])
    def test_one_file_of_weights_needs_no_configuration(self, tmp_path: Path, name: str) -> None:
        tensors = {"a": torch.randn(3)}
        save_file(tensors, tmp_path / name) if "safe" in name else torch.save(tensors, tmp_path / name)
        (tmp_path / "trainer_state.json").write_text("{}")
        assert_same(read_checkpoint(tmp_path), tensors)
        assert checkpoint_files(tmp_path) == [tmp_path / name]

    def test_safetensors_come_before_pickles(self, tmp_path: Path) -> None:
        save_file({"a": torch.ones(1)}, tmp_path / "model.safetensors")
        torch.save({"a": torch.zeros(1)}, tmp_path / "pytorch_model.bin")
        assert read_checkpoint(tmp_path)["a"].item() == 1

    def test_the_digest_covers_every_file(self, tmp_path: Path) -> None:
        save_parts(tmp_path / "m")
        digests = {checkpoint_sha256(tmp_path / "m")}
        for file in checkpoint_files(tmp_path / "m"):
            before = file.read_bytes()
            file.write_bytes(before + b" ")
            digests.add(checkpoint_sha256(tmp_path / "m"))
            file.write_bytes(before)
        assert len(digests) == 5

    def test_a_directory_of_something_else_is_none(self, tmp_path: Path) -> None:
        (tmp_path / "config.json").write_text('{"learning_rate": 1}')
        assert not is_checkpoint_directory(tmp_path)
        (tmp_path / "config.json").write_text('{"architectures": ["LlamaForCausalLM"]}')
        assert is_checkpoint_directory(tmp_path)
        with pytest.raises(RPGError, match=r"has config\.json but neither model\.safetensors nor"):
            read_checkpoint(tmp_path)


class TestBadDirectories:
    def test_a_missing_part_is_named(self, tmp_path: Path) -> None:
        save_parts(tmp_path / "m")
        (tmp_path / "m" / "model-00002-of-00002.safetensors").unlink()
        for read in (read_checkpoint, checkpoint_sha256):
            with pytest.raises(RPGError, match=r"/m: 'model-00002-of-00002\.safetensors' is missing; model"):
                read(tmp_path / "m")

    @pytest.mark.parametrize(
        ("index", "words"),
        [
            ("{", "not valid JSON"),
            ("[" * 100_000, "not valid JSON"),
            ("[]", "weight_map"),
            ('{"weight_map": {}}', "weight_map"),
            ('{"weight_map": {"a": 3}}', "'a': expected a file beside the index"),
            ('{"weight_map": {"a": "../other.safetensors"}}', "'a': expected a file beside the index"),
            ('{"weight_map": {"a": "/etc/passwd"}}', "'a': expected a file beside the index"),
            ('{"weight_map": {"a": ".."}}', "'..' is missing"),
            (
                '{"weight_map": {"a": "model-00002-of-00002.safetensors"}, "metadata": {}}',
                None,
            ),
            (
                '{"weight_map": {"a": "model-00002-of-00002.safetensors",'
                ' "x": "model-00002-of-00002.safetensors"}}',
                "tensor 'x' is missing",
            ),
            (
                '{"weight_map": {"a": "model-00002-of-00002.safetensors",'
                ' "b.2.w": "model-00001-of-00002.safetensors"}}',
                "tensor 'b.10.w' is unexpected",
            ),
        ],
    )
    def test_an_index_that_is_wrong_is_refused(self, tmp_path: Path, index: str, words: str | None) -> None:
        save_parts(tmp_path / "m")
        (tmp_path / "m" / "model.safetensors.index.json").write_text(index)
        if words is None:
            assert list(read_checkpoint(tmp_path / "m")) == ["a"]
            return
        with pytest.raises(RPGError) as caught:
            read_checkpoint(tmp_path / "m")
        assert words in str(caught.value)
        assert "\n" not in str(caught.value)

    def test_a_bad_directory_is_one_bad_checkpoint(self, tmp_path: Path) -> None:
        for name in "abc":
            save_parts(tmp_path / name, seed=ord(name))
        (tmp_path / "b" / "model-00001-of-00002.safetensors").write_bytes(b"junk")
        with pytest.raises(BadCheckpointsError, match="1 of 3 checkpoints cannot be used") as caught:
            register(tmp_path)
        (line,) = caught.value.problems
        assert "model-00001-of-00002.safetensors: truncated" in line

    def test_one_checkpoint_is_no_folder_of_checkpoints(self, tmp_path: Path) -> None:
        save_parts(tmp_path / "m")
        with pytest.raises(RPGError, match=r"/m: is itself one checkpoint; expected a folder"):
            register(tmp_path / "m")


def test_the_read_tensors_are_those_of_safetensors(tmp_path: Path) -> None:
    save_parts(tmp_path / "m")
    expected: dict[str, Tensor] = {}
    for file in (tmp_path / "m").glob("*.safetensors"):
        expected |= load_file(file)
    assert_same(read_checkpoint(tmp_path / "m"), expected)
