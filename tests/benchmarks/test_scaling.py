"""The table of `benchmarks/scaling.py`: what is compared with what."""

from typing import Any

import pytest

pytest.importorskip("ray")

from benchmarks.scaling import Session, row_config, table, training_rows


def row(gpus: int, rate: float, name: str = "train 256", **other: Any) -> dict[str, Any]:
    found = {"part": "train", "row": name, "gpus": gpus, "rows": 256, "rival": "", "rate": rate}
    return {**found, "losses": [1.0, 0.5], **other}


def cells(line: str) -> list[str]:
    return [cell.strip() for cell in line.strip("|").split("|")]


def test_several_gpus_are_compared_with_one_and_sharded_with_whole() -> None:
    rows = [
        row(2, 1500.0, losses=[1.01, 0.5]),
        row(2, 900.0, rival="DDP"),
        row(1, 1000.0),
        row(2, 50.0, "large"),
        row(2, 45.0, "large, sharded"),
        {**row(2, 0.0, "lost"), "failure": "no reports"},
    ]
    del rows[-1]["rate"]
    lines = [cells(line) for line in table(rows).splitlines()[2:]]
    assert lines[0][0] == "train 256"
    assert lines[0][5:7] == ["1.50 ×", "1.6 ×"]
    assert lines[0][-1] == "1.0e-02"
    # What is to be reached is told of the project's own way alone.
    assert lines[1][0] == "train 256; DDP"
    assert lines[1][5:7] == ["0.90 ×", ""]
    assert lines[2][5] == ""
    assert lines[4][5] == "0.90 × unsharded"
    assert lines[5][3] == "no reports"


@pytest.mark.parametrize("gpus", [1, 2, 4])
@pytest.mark.parametrize("part", ["train", "large", "rivals"])
def test_rows_have_configurations(tmp_path: Any, gpus: int, part: str) -> None:
    session = Session(tmp_path, "", tiny=False)
    rows = training_rows(part, gpus, tiny=False)
    assert bool(rows) == (part != "rivals" or gpus > 1)
    for each in rows:
        config = row_config(session, each, gpus)
        assert config.train.checkpoints_per_step == each.rows
        assert config.ray.train_workers == gpus
        assert config.ray.use_gpu
