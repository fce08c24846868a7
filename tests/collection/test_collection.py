"""Collections: saving and loading, and `collection.json` files of others, which are not trusted."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from rpg.collection.checkpoint import checkpoint_sha256, write_checkpoint
from rpg.collection.collection import Collection, Entry
from rpg.errors import RPGError


def make(root: Path, count: int = 3, width: int | None = 2) -> Collection:
    entries = []
    for i in range(count):
        file = root / f"{i}.safetensors"
        write_checkpoint(file, {"a.weight": torch.full((2, 3), float(i)), "b": torch.zeros(1)}, {})
        condition = None if width is None else [float(i)] * width
        split = ("train", "validation", "heldout")[i % 3]
        entries.append(Entry(file.name, checkpoint_sha256(file), condition, {"acc": 0.5 + i}, split))
    return Collection(root, {"factory": "example", "width": 3}, entries)


def edited(root: Path, **changes: Any) -> Path:
    """Save a collection, change its first entry (or, for keys it lacks, the file itself), return the path."""
    make(root).save()
    path = root / "collection.json"
    content = json.loads(path.read_text())
    for key, value in changes.items():
        target = content if key in content else content["entries"][0]
        target[key] = value
    path.write_text(json.dumps(content))
    return path


def test_a_loaded_collection_equals_the_saved_one(tmp_path: Path) -> None:
    collection = make(tmp_path)
    collection.save()
    for path in (tmp_path, tmp_path / "collection.json"):
        loaded = Collection.load(path)
        assert loaded.root == tmp_path
        assert loaded.entries == collection.entries
        assert loaded.architecture == collection.architecture
    assert len(loaded) == 3
    assert loaded.condition_width == 2
    assert {split: [e.file for e in entries] for split, entries in loaded.splits.items()} == {
        "train": ["0.safetensors"],
        "validation": ["1.safetensors"],
        "heldout": ["2.safetensors"],
    }


def test_a_collection_can_be_moved(tmp_path: Path) -> None:
    (tmp_path / "here").mkdir()
    make(tmp_path / "here").save()
    (tmp_path / "here").rename(tmp_path / "there")
    loaded = Collection.load(tmp_path / "there")
    assert loaded.read(loaded.entries[2])["a.weight"][0, 0] == 2


def test_optional_keys_of_an_entry_have_defaults(tmp_path: Path) -> None:
    (tmp_path / "collection.json").write_text(
        '{"version": 1, "architecture": {}, "entries": [{"file": "sub/x.pt", "sha256": "0"}]}'
    )
    (entry,) = Collection.load(tmp_path).entries
    assert entry == Entry("sub/x.pt", "0", None, {}, "train", None, None)


def test_permutation_states_are_kept(tmp_path: Path) -> None:
    collection = make(tmp_path)
    collection.save()
    assert '"state"' not in (tmp_path / "collection.json").read_text()
    for entry, state in zip(collection.entries, (1, 0, 1), strict=True):
        entry.state = state
    collection.save()
    assert [entry.state for entry in Collection.load(tmp_path).entries] == [1, 0, 1]
    collection.entries[1].state = None
    with pytest.raises(RPGError, match="state: expected a number for all checkpoints or for none"):
        collection.save()


def test_checkpoints_are_checked_against_their_digest(tmp_path: Path) -> None:
    collection = make(tmp_path)
    for entry in collection.entries:
        collection.check(entry)
    write_checkpoint(tmp_path / "1.safetensors", {"a.weight": torch.ones(2, 3), "b": torch.ones(1)}, {})
    collection.check(collection.entries[0])
    with pytest.raises(RPGError, match=r"1\.safetensors: changed since it was registered"):
        collection.check(collection.entries[1])
    (tmp_path / "2.safetensors").unlink()
    with pytest.raises(RPGError, match=r"2\.safetensors: cannot be read"):
        collection.check(collection.entries[2])


@pytest.mark.parametrize(
    ("names", "message"), [(["a.weight"], "'b' is missing"), (["a.weight", "b", "c"], "'c' is not expected")]
)
def test_reading_verifies_the_names(tmp_path: Path, names: list[str], message: str) -> None:
    collection = make(tmp_path)
    assert list(collection.read(collection.entries[1])) == ["a.weight", "b"]
    write_checkpoint(tmp_path / "1.safetensors", {name: torch.ones(2, 3) for name in names}, {})
    with pytest.raises(RPGError, match=rf"1\.safetensors: tensor {message}"):
        collection.read(collection.entries[1])


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"version": 2}, "version: expected 1, got 2"),
        ({"architecture": []}, "architecture"),
        ({"architecture": {"family": 3}}, "architecture.family: expected text, got 3"),
        ({"entries": {}}, "entries"),
        ({"entries": [3]}, "entry 0"),
        ({"entries": [{"file": "x.pt"}]}, "'sha256' is missing"),
        ({"colour": "red"}, "unknown key 'colour'"),
        ({"file": "../../etc/passwd"}, "stays inside"),
        ({"file": "a/../../x.pt"}, "stays inside"),
        ({"file": "/etc/passwd"}, "stays inside"),
        ({"file": "..\\x.pt"}, "stays inside"),
        ({"file": ""}, "stays inside"),
        ({"file": "."}, "stays inside"),
        ({"file": "a\0b"}, "stays inside"),
        ({"file": "a/" + "x" * 256}, "255 in each name"),
        ({"file": "\u00e9" * 128}, "255 in each name"),
        ({"file": "/".join(["ab"] * 700)}, "255 in each name"),
        ({"file": "a\ud800b"}, "stays inside"),
        ({"file": 3}, "stays inside"),
        ({"file": "1.safetensors"}, "listed twice"),
        ({"sha256": None}, "sha256"),
        ({"condition": [1.0]}, "expected a condition of width 1 as '0.safetensors' has"),
        ({"condition": None}, "expected no condition as '0.safetensors' has"),
        ({"condition": []}, "finite float32 numbers"),
        ({"condition": [float("nan"), 0.0]}, "finite float32 numbers"),
        ({"condition": [True, 0.0]}, "finite float32 numbers"),
        ({"condition": [10**400, 0.0]}, "finite float32 numbers"),
        ({"condition": [1e39, 0.0]}, "finite float32 numbers"),
        ({"condition": "01"}, "finite float32 numbers"),
        ({"metrics": {"acc": "high"}}, "metrics"),
        ({"metrics": {"acc": float("inf")}}, "metrics"),
        ({"state": -1}, "state: expected 0 <= state"),
        ({"state": True}, "state: expected 0 <= state"),
        ({"state": 2**40}, "state: expected 0 <= state"),
        ({"state": 0}, "expected a number for all checkpoints or for none"),
        ({"split": "test"}, "expected one of train, validation, heldout"),
    ],
)
def test_invalid_entries_are_named(tmp_path: Path, changes: dict[str, Any], words: str) -> None:
    path = edited(tmp_path, **changes)
    with pytest.raises(RPGError) as caught:
        Collection.load(tmp_path)
    message = str(caught.value)
    assert str(path) in message
    assert words in message
    assert "\n" not in message


def test_an_unknown_key_of_the_file_is_refused(tmp_path: Path) -> None:
    path = edited(tmp_path)
    path.write_text(json.dumps({**json.loads(path.read_text()), "extra": 1}))
    with pytest.raises(RPGError, match="unknown key 'extra'"):
        Collection.load(tmp_path)


@pytest.mark.parametrize("content", ["", "[", "3", "[]", "null", "[" * 100_000, "\xff"])
def test_files_that_are_no_collections_are_refused(tmp_path: Path, content: str) -> None:
    (tmp_path / "collection.json").write_bytes(content.encode("latin-1"))
    with pytest.raises(RPGError, match=r"collection\.json"):
        Collection.load(tmp_path)


@pytest.mark.parametrize("path", ["", "nowhere", "nowhere/collection.json"])
def test_a_missing_collection_is_named(tmp_path: Path, path: str) -> None:
    with pytest.raises(RPGError, match=r"collection\.json: not found; expected a collection"):
        Collection.load(tmp_path / path)


def test_an_invalid_collection_is_not_saved(tmp_path: Path) -> None:
    collection = make(tmp_path)
    collection.save()
    before = (tmp_path / "collection.json").read_bytes()
    collection.entries[1].condition = [1.0]
    with pytest.raises(RPGError, match=r"'1\.safetensors': expected a condition of width 2"):
        collection.save()
    assert (tmp_path / "collection.json").read_bytes() == before


@given(st.text(max_size=30))
def test_no_listed_path_leaves_the_directory(file: str) -> None:
    root = Path("/collection")
    try:
        collection = Collection(root, {}, [Entry(file, "0")])
    except RPGError:
        return
    # Path.resolve reads links; nothing is there, so that it only takes the dots away.
    assert collection.path(collection.entries[0]).resolve().is_relative_to(root)


def test_conditions_that_are_trained_on_are_no_tasks_of_other_splits() -> None:
    splits = [
        ("train", [0.0, 1.0]),
        ("heldout", [1.0, 0.0]),
        ("heldout", [0.0, 1.0]),
        ("validation", [0.0, 1.0]),
    ]
    entries = [
        Entry(str(i), "0" * 64, task, split=split) for i, (split, task) in enumerate([*splits, splits[1]])
    ]
    collection = Collection(Path("c"), {}, entries)
    assert collection.tasks("train") == [[0.0, 1.0]]
    assert collection.tasks("heldout") == [[1.0, 0.0]]
    assert collection.tasks("validation") == []
