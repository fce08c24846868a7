"""Splits and metrics from patterns and tables, as `rpg register` takes them."""

from pathlib import Path

import pytest
import torch

from rpg.collection.collection import Collection
from rpg.collection.register import register
from rpg.collection.splits_and_metrics import read_metrics, read_splits
from rpg.commands.main import main
from rpg.errors import RPGError

NAMES = ["task_1.pt", "task_2.pt", "task_10.pt", "other.pt"]


class TestSplits:
    def test_patterns_lists_and_tables(self, tmp_path: Path) -> None:
        (tmp_path / "names.txt").write_text("other.pt\n\n task_2.pt \n")
        (tmp_path / "s.csv").write_text("file,split\ntask_2.pt,heldout\ntask_10.pt,validation\n")
        assert read_splits(["heldout=task_1*"], NAMES) == {"task_1.pt": "heldout", "task_10.pt": "heldout"}
        listed = read_splits([f"validation={tmp_path / 'names.txt'}"], NAMES)
        assert listed == {"other.pt": "validation", "task_2.pt": "validation"}
        table = {"task_2.pt": "heldout", "task_10.pt": "validation"}
        assert read_splits([str(tmp_path / "s.csv")], NAMES) == table
        assert read_splits([f"heldout={tmp_path / 's.csv'}"], NAMES) == {"task_2.pt": "heldout"}
        both = read_splits(["heldout=task_[12].pt", "validation=other*", "heldout=task_2*"], NAMES)
        assert both == {"task_1.pt": "heldout", "task_2.pt": "heldout", "other.pt": "validation"}

    @pytest.mark.parametrize(
        ("choice", "words"),
        [
            ("test=a*", r"--split test=a\*: expected train\|validation\|heldout=PATTERN"),
            ("heldout", "expected train"),
            ("heldout=", "expected train"),
            ("heldout=x*", r"--split heldout=x\*: matches no checkpoint"),
            ("heldout={}/nowhere.txt", r"nowhere\.txt: not found; expected names of checkpoints as \.txt"),
            ("heldout={}/nowhere.csv", r"nowhere\.csv: not found"),
            ("heldout={}/unknown.txt", r"unknown\.txt, row 2: 'x\.pt' is not among the checkpoints"),
            (
                "{}/wrong.csv",
                r"wrong\.csv, row 2: 'other\.pt': expected one of train, validation",
            ),
            ("{}/header.csv", r"header\.csv, row 1: expected a header 'file,split'"),
            ("train={}/empty.txt", r"empty\.txt: holds no names"),
        ],
    )
    def test_wrong_choices_are_refused(self, tmp_path: Path, choice: str, words: str) -> None:
        (tmp_path / "unknown.txt").write_text("other.pt\nx.pt")
        (tmp_path / "wrong.csv").write_text("file,split\nother.pt,test\n")
        (tmp_path / "header.csv").write_text("file,part\nother.pt,test\n")
        (tmp_path / "empty.txt").write_text("\n")
        with pytest.raises(RPGError, match=words):
            read_splits([choice.format(tmp_path)], NAMES)

    def test_a_checkpoint_in_two_splits_is_refused(self) -> None:
        with pytest.raises(RPGError, match=r"task_1\*: 'task_1\.pt' is in heldout, and in train by"):
            read_splits(["train=*.pt", "heldout=task_1*"], NAMES)


class TestMetrics:
    @pytest.mark.parametrize("suffix", ["csv", "json"])
    def test_tables_may_be_partial(self, tmp_path: Path, suffix: str) -> None:
        text = {
            "csv": "file,acc,loss\nother.pt,0.5,\ntask_1.pt,0.25,1e-3\n",
            "json": '[{"file": "other.pt", "metrics": {"acc": 0.5}},'
            ' {"file": "task_1.pt", "metrics": {"acc": 0.25, "loss": 1e-3}}]',
        }[suffix]
        path = tmp_path / f"m.{suffix}"
        path.write_text(text)
        expected = {"other.pt": {"acc": 0.5}, "task_1.pt": {"acc": 0.25, "loss": 0.001}}
        assert read_metrics(path, NAMES) == expected

    @pytest.mark.parametrize(
        ("text", "words"),
        [
            ("file,acc\nother.pt,high\n", r"row 2: 'other\.pt': acc: expected a finite number, got 'high'"),
            ("file,acc\nother.pt,inf\n", "expected a finite number"),
            ("file,acc\nnone.pt,1\n", r"'none\.pt' is not among the checkpoints"),
            ("file,acc,acc\nother.pt,1,1\n", "metrics of different names"),
            ('{"other.pt": 3}', "expected metrics as"),
            ('{"other.pt": {"acc": true}}', "acc: expected a finite number, got True"),
            ('{"other.pt": {"acc": 1, "acc": 2}}', "acc is given twice"),
        ],
    )
    def test_wrong_tables_are_refused(self, tmp_path: Path, text: str, words: str) -> None:
        path = tmp_path / ("m.json" if text.startswith("{") else "m.csv")
        path.write_text(text)
        with pytest.raises(RPGError, match=words):
            read_metrics(path, NAMES)


def test_the_command_writes_them_and_registering_again_keeps_them(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "folder"
    folder.mkdir()
    for i, name in enumerate(NAMES):
        torch.save({"w": torch.full((3,), float(i))}, folder / name)
    (tmp_path / "m.csv").write_text("file,acc\nother.pt,0.5\n")
    splits = ["--split", "heldout=task_1*", "--split", "validation=task_2.pt"]
    assert main(["register", str(folder), *splits, "--metrics", str(tmp_path / "m.csv")]) == 0
    assert capsys.readouterr().out == f"{folder}: 4 checkpoints, no conditions, 1 validation, 2 heldout\n"
    for _ in range(2):
        found = {entry.file: (entry.split, entry.metrics) for entry in Collection.load(folder).entries}
        assert found == {
            "other.pt": ("train", {"acc": 0.5}),
            "task_1.pt": ("heldout", {}),
            "task_10.pt": ("heldout", {}),
            "task_2.pt": ("validation", {}),
        }
        register(folder)
