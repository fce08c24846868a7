"""Registering folders: good checkpoints are listed, bad ones named, and earlier files stay intact."""

import json
import os
import resource
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from rpg.collection.checkpoint import checkpoint_sha256, read_checkpoint
from rpg.collection.collection import Collection, Entry
from rpg.collection.register import BadCheckpointsError, register
from rpg.errors import RPGError


def state_dict(value: float = 0.0) -> dict[str, Tensor]:
    return {
        "conv.weight": torch.full((2, 3), value),
        "conv.bias": torch.zeros(2, dtype=torch.float16),
        "steps": torch.tensor(3),
    }


def fill(root: Path, *names: str) -> Path:
    root.mkdir(exist_ok=True)
    for i, name in enumerate(names):
        if name.endswith(".safetensors"):
            save_file(state_dict(float(i)), root / name)
        else:
            torch.save(state_dict(float(i)), root / name)
    return root


def adapter(path: Path) -> None:
    path.mkdir()
    (path / "adapter_config.json").write_text("{}")
    save_file({"lora_A.weight": torch.ones(2, 3)}, path / "adapter_model.safetensors")


class TestGoodFolders:
    def test_files_of_all_forms_sorted_by_name(self, tmp_path: Path) -> None:
        fill(tmp_path, "c.pt", "a.safetensors", "b.pth", "D.PT")
        (tmp_path / "notes.txt").write_text("hello")
        (tmp_path / ".hidden.pt").write_text("hello")
        fill(tmp_path / "below", "e.pt")
        seen: list[tuple[int, int]] = []
        collection, skipped = register(tmp_path, progress=lambda done, total: seen.append((done, total)))
        assert [entry.file for entry in collection.entries] == ["D.PT", "a.safetensors", "b.pth", "c.pt"]
        assert skipped == []
        assert seen == [(0, 4), (1, 4), (2, 4), (3, 4), (4, 4)]
        loaded = Collection.load(tmp_path)
        assert loaded.entries == collection.entries
        for entry in loaded.entries:
            loaded.check(entry)
            assert entry.condition is None
            assert entry.split == "train"
            assert set(loaded.read(entry)) == set(state_dict())

    def test_states_from_the_names_beside_conditions_from_a_file(self, tmp_path: Path) -> None:
        folder = fill(tmp_path / "folder", "cat_seed0.pt", "cat_seed1.pt", "dog_seed1.pt")
        (tmp_path / "c.csv").write_text("file,x\ncat_seed0.pt,1\ncat_seed1.pt,2\ndog_seed1.pt,3\n")
        collection, _ = register(folder, conditions=tmp_path / "c.csv", pattern="{what}_seed{seed:state}")
        found = [(entry.condition, entry.state) for entry in collection.entries]
        assert found == [([1.0], 0), ([2.0], 1), ([3.0], 1)]

    @pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="needs FIFOs")
    def test_links_are_followed_and_fifos_ignored(self, tmp_path: Path) -> None:
        fill(tmp_path / "store", "x.pt", "y.pt")
        folder = fill(tmp_path / "folder", "a.pt")
        (folder / "b.pt").symlink_to(tmp_path / "store" / "x.pt")
        os.mkfifo(folder / "c.safetensors")
        (folder / "d.pt").symlink_to(folder / "c.safetensors")
        collection, skipped = register(folder)
        assert [entry.file for entry in collection.entries] == ["a.pt", "b.pt"]
        assert skipped == []
        with pytest.raises(RPGError, match=r"c\.safetensors: is a FIFO; expected a regular file"):
            read_checkpoint(folder / "c.safetensors")

    def test_a_link_to_nothing_is_a_bad_checkpoint(self, tmp_path: Path) -> None:
        fill(tmp_path, "a.pt", "b.pt")
        (tmp_path / "c.pt").symlink_to(tmp_path / "gone.pt")
        _, skipped = register(tmp_path, skip_bad=True)
        assert [line.partition(";")[0] for line in skipped] == [f"{tmp_path / 'c.pt'}: not found"]

    def test_adapters_are_registered(self, tmp_path: Path) -> None:
        for name in ("task_b", "task_a", "task_c"):
            adapter(tmp_path / name)
        collection, _ = register(tmp_path, pattern="task_{name}")
        assert [entry.file for entry in collection.entries] == ["task_a", "task_b", "task_c"]
        assert collection.entries[0].sha256 == checkpoint_sha256(tmp_path / "task_a")
        assert list(collection.read(collection.entries[1])) == ["lora_A.weight"]

    def test_names_of_the_published_model_need_no_option(self, tmp_path: Path) -> None:
        fill(tmp_path, "0000_acc0.9613_class0314_x.pth", "0001_acc0.9_class0001_x.pth")
        collection, _ = register(tmp_path)
        assert collection.condition_width == 10
        assert collection.entries[0].condition == [0, 1, 0, 0, 1, 1, 1, 0, 1, 0]
        assert collection.entries[1].condition == [0] * 9 + [1]
        assert collection.entries[0].metrics == {"acc": 0.9613}

    def test_a_name_unlike_the_other_published_ones_is_refused(self, tmp_path: Path) -> None:
        fill(tmp_path, "0000_acc0.9613_class0314_x.pth", "0001_accuracy0.9_class0001_x.pth")
        with pytest.raises(RPGError, match=r"^0001_accuracy0\.9_class0001_x\.pth: name does not match"):
            register(tmp_path)

    def test_conditions_from_a_file(self, tmp_path: Path) -> None:
        fill(tmp_path, "a.pt", "b.pt")
        (tmp_path / "c.csv").write_text("file,u,v\nb.pt,3,4\na.pt,1,2\n")
        collection, _ = register(tmp_path, conditions=tmp_path / "c.csv")
        assert [entry.condition for entry in collection.entries] == [[1, 2], [3, 4]]

    def test_a_file_of_conditions_overrides_names_and_metrics_are_kept(self, tmp_path: Path) -> None:
        fill(tmp_path, "0_acc0.5_class3.pt", "1_acc0.25_class4.pt")
        (tmp_path / "c.json").write_text('{"0_acc0.5_class3.pt": [1], "1_acc0.25_class4.pt": [2]}')
        collection, _ = register(tmp_path, conditions=tmp_path / "c.json")
        assert [entry.condition for entry in collection.entries] == [[1], [2]]
        assert [entry.metrics for entry in collection.entries] == [{"acc": 0.5}, {"acc": 0.25}]

    def test_checkpoints_stay_held_out(self, tmp_path: Path) -> None:
        fill(tmp_path, "a.pt", "b.pt")
        entries = [Entry("a.pt", "old", [1.0], {"acc": 0.5}, "heldout"), Entry("gone.pt", "old", [2.0])]
        Collection(tmp_path, {"factory": "example"}, entries).save()
        (tmp_path / "c.json").write_text('{"a.pt": [5], "b.pt": [6]}')
        collection, _ = register(tmp_path, conditions=tmp_path / "c.json")
        first, second = collection.entries
        assert first == Entry("a.pt", checkpoint_sha256(tmp_path / "a.pt"), [5.0], {"acc": 0.5}, "heldout")
        assert (second.file, second.split) == ("b.pt", "train")
        assert collection.architecture == {"factory": "example"}
        again, _ = register(tmp_path)
        assert again.entries == collection.entries


BAD = {
    "missing": ({k: v for k, v in state_dict().items() if k != "steps"}, "'steps' is missing"),
    "extra": ({**state_dict(), "more": torch.ones(1)}, "'more' is unexpected"),
    "shape": ({**state_dict(), "conv.weight": torch.ones(3, 2)}, "'conv.weight': expected float32 [2, 3]"),
    "dtype": ({**state_dict(), "conv.bias": torch.zeros(2)}, "'conv.bias': expected float16 [2]"),
    "nan": ({**state_dict(), "conv.weight": torch.full((2, 3), torch.nan)}, "'conv.weight' holds 6 NaN"),
    "inf": (
        {**state_dict(), "conv.bias": torch.full((2,), torch.inf).half()},
        "'conv.bias' holds 0 NaN and 2 Inf",
    ),
}


class TestBadFolders:
    def fill_badly(self, root: Path) -> dict[str, str]:
        """Two good checkpoints and every kind of bad one; the words expected of each bad file."""
        fill(root, "good1.pt", "good2.safetensors")
        expected = {}
        for name, (tensors, words) in BAD.items():
            torch.save(tensors, root / f"{name}.pt")
            expected[f"{name}.pt"] = words
        whole = (root / "good2.safetensors").read_bytes()
        (root / "cut.safetensors").write_bytes(whole[:-4])
        (root / "empty.pth").touch()
        (root / "junk.pt").write_bytes(b"junk")
        torch.save(torch.nn.Linear(1, 1), root / "object.pt")
        (root / "directory.pt").mkdir()
        adapter(root / "lora")
        (root / "lora" / "adapter_model.safetensors").unlink()
        return expected | {
            "cut.safetensors": "truncated",
            "empty.pth": "empty",
            "junk.pt": "not a PyTorch checkpoint",
            "object.pt": "never executes a pickle",
            "directory.pt": "is a directory",
            "lora": "neither adapter_model.safetensors",
        }

    @staticmethod
    def assert_each_is_named(lines: list[str], root: Path, expected: dict[str, str]) -> None:
        assert len(lines) == len(expected)
        for file, words in expected.items():
            (line,) = [line for line in lines if line.startswith(f"{root / file}")]
            assert words in line
            assert "\n" not in line

    @pytest.fixture
    def root(self, tmp_path: Path) -> Path:
        """`BAD` is compared with the first good checkpoint, so a good one must come first by name."""
        fill(tmp_path, "0.pt")
        return tmp_path

    def test_all_bad_checkpoints_are_named(self, root: Path) -> None:
        expected = self.fill_badly(root)
        with pytest.raises(BadCheckpointsError, match=rf"{len(expected)} of {len(expected) + 3} ") as caught:
            register(root)
        self.assert_each_is_named(caught.value.problems, root, expected)
        assert "\n" not in str(caught.value)
        assert not (root / "collection.json").exists()

    def test_bad_checkpoints_can_be_left_out(self, root: Path) -> None:
        expected = self.fill_badly(root)
        collection, skipped = register(root, skip_bad=True)
        self.assert_each_is_named(skipped, root, expected)
        assert [entry.file for entry in collection.entries] == ["0.pt", "good1.pt", "good2.safetensors"]
        assert Collection.load(root).entries == collection.entries

    def test_rows_of_checkpoints_left_out_may_stay(self, root: Path) -> None:
        fill(root, "1.pt")
        (root / "2.pt").touch()
        (root / "c.csv").write_text("file,a\n0.pt,0\n1.pt,1\n2.pt,2\n")
        collection, skipped = register(root, conditions=root / "c.csv", skip_bad=True)
        assert [entry.condition for entry in collection.entries] == [[0], [1]]
        assert len(skipped) == 1

    def test_tied_tensors_that_differ_are_refused(self, tmp_path: Path) -> None:
        shared = torch.ones(3)
        torch.save({"a": shared, "b": shared}, tmp_path / "0.pt")
        torch.save({"a": torch.ones(3), "b": torch.ones(3)}, tmp_path / "1.pt")
        torch.save({"a": torch.ones(3), "b": torch.zeros(3)}, tmp_path / "2.pt")
        _, skipped = register(tmp_path, skip_bad=True)
        (line,) = skipped
        assert "2.pt: tensor 'b'" in line

    @pytest.mark.parametrize("names", [[], ["a.pt"]])
    def test_too_few_checkpoints_are_refused(self, tmp_path: Path, names: list[str]) -> None:
        fill(tmp_path, *names)
        with pytest.raises(RPGError, match=f"a collection needs at least 2 checkpoints, found {len(names)}"):
            register(tmp_path)

    def test_too_few_good_checkpoints_are_refused(self, tmp_path: Path) -> None:
        fill(tmp_path, "a.pt")
        (tmp_path / "b.pt").touch()
        with pytest.raises(BadCheckpointsError, match=r"at least 2 checkpoints, 1 of 2") as caught:
            register(tmp_path, skip_bad=True)
        assert len(caught.value.problems) == 1

    def test_a_missing_folder_is_named(self, tmp_path: Path) -> None:
        fill(tmp_path, "a.pt")
        for path in (tmp_path / "nowhere", tmp_path / "a.pt"):
            with pytest.raises(RPGError, match="not a directory"):
                register(path)

    def test_wrong_conditions_are_refused(self, tmp_path: Path) -> None:
        fill(tmp_path, "a.pt", "b.pt")
        (tmp_path / "c.csv").write_text("file,a\na.pt,1\n")
        with pytest.raises(RPGError, match=r"no row for 'b\.pt'"):
            register(tmp_path, conditions=tmp_path / "c.csv")
        with pytest.raises(RPGError, match=r"a\.pt: name does not match pattern '\{n\}_x'"):
            register(tmp_path, pattern="{n}_x")
        with pytest.raises(RPGError, match=r"pattern '\{n:value\}': has a condition, and so has .*c\.csv"):
            register(tmp_path, conditions=tmp_path / "c.csv", pattern="{n:value}")
        assert not (tmp_path / "collection.json").exists()

    def test_conditions_of_differing_width(self, tmp_path: Path) -> None:
        fill(tmp_path, "01.pt", "011.pt")
        with pytest.raises(RPGError, match=r"'011\.pt': expected a condition of width 2 as '01\.pt' has"):
            register(tmp_path, pattern="{c:digits}")

    def test_a_broken_earlier_collection_is_not_overwritten(self, tmp_path: Path) -> None:
        fill(tmp_path, "a.pt", "b.pt")
        (tmp_path / "collection.json").write_text("{")
        with pytest.raises(RPGError, match=r"collection\.json"):
            register(tmp_path)
        assert (tmp_path / "collection.json").read_text() == "{"


def test_a_full_disk_leaves_the_earlier_collection(tmp_path: Path) -> None:
    names = [f"{i:04d}.pt" for i in range(40)]
    fill(tmp_path, *names[:2])
    register(tmp_path)
    before = (tmp_path / "collection.json").read_bytes()
    fill(tmp_path, *names)
    result = subprocess.run(
        [
            sys.executable,
            "-c",
            "import sys; from rpg.commands.main import main; sys.exit(main())",
            "register",
            tmp_path,
        ],
        capture_output=True,
        text=True,
        check=False,
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (4096, 4096)),
    )
    assert result.returncode == 2
    expected = f"rpg: error: {tmp_path / 'collection.json'}: cannot be written: File too large\n"
    assert result.stderr == expected
    assert result.stdout == ""
    assert (tmp_path / "collection.json").read_bytes() == before
    assert json.loads(before)["version"] == 1
    assert not list(tmp_path.glob(".*"))


def test_names_need_not_match_if_a_file_has_the_conditions(tmp_path: Path) -> None:
    named, other = "0000_acc0.9613_class0314_x.safetensors", "mine.safetensors"
    root = fill(tmp_path / "c", named, other)
    with pytest.raises(RPGError, match=r"mine\.safetensors: name does not match the naming of the others"):
        register(root)
    table = tmp_path / "conditions.json"
    table.write_text(json.dumps({named: [1.0, 0.0], other: [0.0, 1.0]}))
    collection, _ = register(root, conditions=table)
    assert {entry.file: entry.condition for entry in collection.entries} == {
        named: [1.0, 0.0],
        other: [0.0, 1.0],
    }
