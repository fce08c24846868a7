"""What lies in users' folders: other endings, files beside the models, buffers that only some have."""

import json
import struct
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file
from torch import Tensor, nn

from rpg.collection.checkpoint import read_checkpoint, write_checkpoint
from rpg.collection.collection import Collection
from rpg.collection.reading import Reading
from rpg.collection.register import BadCheckpointsError, register
from rpg.errors import RPGError


def network(seed: int) -> nn.Module:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4))


def save(root: Path, *names: str, **more: Any) -> None:
    root.mkdir(exist_ok=True, parents=True)
    for i, name in enumerate(names):
        content = network(i).state_dict()
        if name.endswith(".safetensors"):
            save_file(content, root / name)
        else:
            torch.save(more | {"state_dict": content} if more else content, root / name)


def problems(root: Path, **options: Any) -> list[str]:
    with pytest.raises(BadCheckpointsError) as caught:
        register(root, **options)
    return caught.value.problems


class TestContentDecides:
    def test_files_of_any_ending_are_found(self, tmp_path: Path) -> None:
        save(tmp_path, "a.pth.tar", "b.ckpt", "c.bin", "d.model", "e", "f.safetensors", "g.pt")
        (tmp_path / "a.pth.tar").rename(tmp_path / "A.PTH.TAR")
        save_file(network(7).state_dict(), tmp_path / "h.sft")
        (tmp_path / "f.safetensors").rename(tmp_path / "f.pt")
        (tmp_path / "g.pt").rename(tmp_path / "g.safetensors")
        for name, content in {
            "data.bin": b"\0" * 64, "notes.txt": b"PK", "x.npy": b"\x93NUMPY", "y.pkl": b"\x80\x04N.", 
            "z.tar": b"z",
        }.items():  # fmt: skip
            (tmp_path / name).write_bytes(content)
        import zipfile

        with zipfile.ZipFile(tmp_path / "images.zip", "w") as archive:
            archive.writestr("a.png", b"x")
        collection, skipped = register(tmp_path)
        assert skipped == []
        files = [entry.file for entry in collection.entries]
        assert files == ["A.PTH.TAR", "b.ckpt", "c.bin", "d.model", "e", "f.pt", "g.safetensors", "h.sft"]
        for i, entry in enumerate(collection.entries):
            seed = [0, 1, 2, 3, 4, 5, 6, 7][i]
            assert torch.equal(collection.read(entry)["0.weight"], network(seed).state_dict()["0.weight"])

    def test_a_truncated_one_is_reported_whatever_its_ending(self, tmp_path: Path) -> None:
        save(tmp_path, "a.bin", "b.bin", "c.bin")
        content = (tmp_path / "c.bin").read_bytes()
        (tmp_path / "c.bin").write_bytes(content[: len(content) // 2])
        (line,) = problems(tmp_path)
        assert line.startswith(f"{tmp_path / 'c.bin'}: truncated")

    def test_gguf_is_refused_by_name(self, tmp_path: Path) -> None:
        save(tmp_path, "a.pt", "b.pt")
        (tmp_path / "c.gguf").write_bytes(b"GGUF" + struct.pack("<IQQ", 3, 0, 0))
        (line,) = problems(tmp_path)
        assert "c.gguf: is a GGUF file" in line

    def test_a_distributed_checkpoint_is_refused_by_name(self, tmp_path: Path) -> None:
        code = (
            "import sys, torch, torch.distributed.checkpoint as dcp\n"
            "dcp.save({'w': torch.ones(4, 2)}, checkpoint_id=sys.argv[1])\n"
        )
        subprocess.run([sys.executable, "-c", code, str(tmp_path / "c")], check=True, capture_output=True)
        save(tmp_path, "a.pt", "b.pt")
        (line,) = problems(tmp_path)
        assert line.startswith(f"{tmp_path / 'c'}: is a sharded checkpoint of torch.distributed.checkpoint")
        assert "dcp_to_torch" in line
        with pytest.raises(RPGError, match="is itself one checkpoint"):
            register(tmp_path / "c")

    def test_a_name_that_safetensors_cannot_store_is_refused(self, tmp_path: Path) -> None:
        for name in "ab":
            torch.save({"w": torch.ones(2), "__metadata__": torch.ones(2)}, tmp_path / f"{name}.pt")
        for line in problems(tmp_path):
            assert "tensor '__metadata__': .safetensors cannot store a tensor of this name" in line

    @settings(max_examples=60, deadline=None)
    @given(
        names=st.lists(st.text(max_size=12) | st.just("__metadata__"), min_size=1, max_size=4, unique=True)
    )
    def test_every_name_is_stored_or_refused(self, names: list[str], tmp_path_factory: Any) -> None:
        path = tmp_path_factory.getbasetemp() / "names.safetensors"
        tensors = {name: torch.tensor([float(i)]) for i, name in enumerate(names)}
        try:
            write_checkpoint(path, tensors, {})
        except RPGError as error:
            assert "cannot store a tensor of this name" in str(error)
            return
        assert read_checkpoint(path) == tensors


class TestBesideTheModels:
    def test_what_training_keeps_is_left_out_and_told_once(self, tmp_path: Path) -> None:
        save(tmp_path, "a.pt", "b.pt", "c.pt")
        optimiser = torch.optim.AdamW(network(0).parameters())
        torch.save(optimiser.state_dict(), tmp_path / "optimizer.pt")
        torch.save(torch.optim.lr_scheduler.StepLR(optimiser, 2).state_dict(), tmp_path / "scheduler.pt")
        torch.save(torch.get_rng_state(), tmp_path / "rng_state.pth")
        notes: list[str] = []
        seen: list[tuple[int, int]] = []
        collection, skipped = register(tmp_path, note=notes.append, progress=lambda *step: seen.append(step))
        assert [entry.file for entry in collection.entries] == ["a.pt", "b.pt", "c.pt"]
        assert skipped == []
        assert notes == [
            "left out: optimizer.pt (an optimiser's state), rng_state.pth (the state of a random number "
            "generator), scheduler.pt (a scheduler's state)"
        ]
        assert seen[-1] == (6, 6)

    def test_they_need_no_condition(self, tmp_path: Path) -> None:
        save(tmp_path / "m", "task1.pt", "task2.pt")
        torch.save(torch.optim.Adam(network(0).parameters()).state_dict(), tmp_path / "m" / "optimizer.pt")
        (tmp_path / "c.csv").write_text("file,x\ntask1.pt,1\ntask2.pt,2\n")
        for options in ({"pattern": "task{x:value}"}, {"conditions": tmp_path / "c.csv"}):
            collection, _ = register(tmp_path / "m", **options)  # type: ignore[arg-type]
            assert [entry.condition for entry in collection.entries] == [[1.0], [2.0]]

    def test_a_trainers_directory(self, tmp_path: Path) -> None:
        """As Transformers' Trainer leaves it, with everything that it keeps to resume."""
        for i in (1, 2):
            directory = tmp_path / f"checkpoint-{i}"
            directory.mkdir()
            save_file(network(i).state_dict(), directory / "model.safetensors")
            (directory / "config.json").write_text('{"model_type": "bert"}')
            torch.save({"state": {}, "param_groups": []}, directory / "optimizer.pt")
            (directory / "trainer_state.json").write_text("{}")
        (tmp_path / "runs").mkdir()
        collection, _ = register(tmp_path)
        assert [entry.file for entry in collection.entries] == ["checkpoint-1", "checkpoint-2"]

    def test_the_place_of_the_text_encoder_is_no_checkpoint(self, tmp_path: Path) -> None:
        save(tmp_path, "a.pt", "b.pt")
        save(tmp_path / "encoder", "model.safetensors")
        (tmp_path / "encoder" / "config.json").write_text("{}")
        notes: list[str] = []
        register(tmp_path, note=notes.append)
        assert notes == ["left out: encoder/ (the place of a collection's text encoder)"]

    def test_what_lies_among_the_tensors_is_told(self, tmp_path: Path) -> None:
        for i in range(3):
            extra = {} if i == 1 else {"epoch": 3}
            torch.save(network(i).state_dict() | extra, tmp_path / f"{i}.pt")
        notes: list[str] = []
        register(tmp_path, note=notes.append)
        assert notes == ["left out 'epoch', which is no tensor, in 0.pt and 1 other of 3"]


class TestKey:
    def test_the_key_holds_later(self, tmp_path: Path) -> None:
        for i in range(3):
            both = {"state_dict": network(i).state_dict(), "state_dict_ema": network(i + 9).state_dict()}
            torch.save(both, tmp_path / f"{i}.pth.tar")
        assert all("'state_dict_ema' (7 entries)" in line for line in problems(tmp_path))
        register(tmp_path, key="state_dict_ema")
        assert json.loads((tmp_path / "collection.json").read_text())["reading"] == {"key": "state_dict_ema"}
        for _ in range(2):
            collection = Collection.load(tmp_path)
            for i, entry in enumerate(collection.entries):
                found = collection.read_checked(entry)
                assert torch.equal(found["0.weight"], network(i + 9).state_dict()["0.weight"])
            # Registered again, the folder keeps the key.
            register(tmp_path)


class TestIgnore:
    def fill(self, root: Path) -> None:
        for i in range(3):
            extra: dict[str, Tensor] = {"embeddings.position_ids": torch.arange(5)} if i != 1 else {}
            torch.save(network(i).state_dict() | extra, root / f"{i}.pt")

    def test_a_buffer_that_only_some_have_is_named_with_what_to_do(self, tmp_path: Path) -> None:
        self.fill(tmp_path)
        (line,) = problems(tmp_path)
        assert line == (
            f"{tmp_path / '1.pt'}: tensor 'embeddings.position_ids' is missing; it is no weight: "
            "--ignore '*position_ids' leaves it out of all (as in 0.pt)"
        )

    def test_what_is_ignored_is_ignored_later(self, tmp_path: Path) -> None:
        self.fill(tmp_path)
        register(tmp_path, ignore=["*position_ids", "*.num_batches_tracked"])
        collection = Collection.load(tmp_path)
        expected = set(network(0).state_dict()) - {"1.num_batches_tracked"}
        for entry in collection.entries:
            found = collection.read_checked(entry)
            assert set(found) == expected
            # PyTorch counts a missing counter of batches as none.
            network(0).load_state_dict(found, strict=True)
        register(tmp_path)
        assert Collection.load(tmp_path).reading == Reading(ignore=("*position_ids", "*.num_batches_tracked"))

    def test_a_pattern_that_matches_nothing_is_refused(self, tmp_path: Path) -> None:
        save(tmp_path, "a.pt", "b.pt")
        with pytest.raises(RPGError, match=r"--ignore \*\.ids: matches no tensor of any checkpoint"):
            register(tmp_path, ignore=["*.ids"])
        assert not (tmp_path / "collection.json").exists()

    def test_nothing_left_is_refused(self, tmp_path: Path) -> None:
        save(tmp_path, "a.pt", "b.pt")
        assert all("the state_dict is empty" in line for line in problems(tmp_path, ignore=["*"]))


def test_models_whose_configurations_differ_are_told(tmp_path: Path) -> None:
    for name, heads in (("a", 4), ("b", 2), ("c", 4)):
        (tmp_path / name).mkdir()
        save_file(network(ord(name)).state_dict(), tmp_path / name / "model.safetensors")
        config = {"model_type": "bert", "num_attention_heads": heads, "_name_or_path": name, "dropout": heads}
        (tmp_path / name / "config.json").write_text(json.dumps(config))
    notes: list[str] = []
    register(tmp_path, note=notes.append)
    assert notes == [
        "config.json: 'num_attention_heads' is 2 in b and 4 in a; generated networks get the latter"
    ]


@pytest.mark.parametrize(
    ("reading", "words"),
    [
        (3, "reading: expected an object"),
        ({"keys": 1}, "reading: unknown key 'keys'"),
        ({"key": 1}, "reading: key: expected text"),
        ({"ignore": "a"}, "reading: ignore: expected a list of text"),
        ({"unwrap": [1]}, "reading: unwrap: expected a list of text"),
        ({"canonical_factors": 1}, "reading: canonical_factors: expected true or false"),
    ],
)
def test_a_collection_of_another_reading_is_refused(tmp_path: Path, reading: Any, words: str) -> None:
    save(tmp_path, "a.pt", "b.pt")
    register(tmp_path)
    content = json.loads((tmp_path / "collection.json").read_text())
    (tmp_path / "collection.json").write_text(json.dumps(content | {"reading": reading}))
    with pytest.raises(RPGError, match=words):
        Collection.load(tmp_path)
