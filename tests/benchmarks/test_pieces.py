"""Pieces of a measurement: measured once, apart for other settings, and not begun when the time is over."""

import math
import time
from pathlib import Path

import pytest

from benchmarks.pieces import Pieces


def test_a_piece_is_measured_once(tmp_path: Path) -> None:
    calls: list[int] = []

    def measure() -> dict[str, int]:
        calls.append(1)
        return {"value": len(calls)}

    settings = {"steps": 5}
    assert Pieces.of(tmp_path, settings, math.inf).piece("speed", measure) == {"value": 1}
    # What is there is read even when the time is over.
    assert Pieces.of(tmp_path, {"steps": 5}, 0.0).piece("speed", measure) == {"value": 1}
    assert Pieces.of(tmp_path, {"steps": 6}, math.inf).piece("speed", measure) == {"value": 2}


def test_nothing_is_begun_after_the_end(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pieces = Pieces.of(tmp_path, {}, time.monotonic() - 1)
    with pytest.raises(SystemExit) as end:
        pieces.piece("speed", dict)
    assert end.value.code == 3
    assert "speed: not begun" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_a_measurement_that_fails_is_made_again(tmp_path: Path) -> None:
    pieces = Pieces.of(tmp_path, {}, math.inf)
    with pytest.raises(ZeroDivisionError):
        pieces.piece("speed", lambda: {"value": 1 // 0})
    assert pieces.piece("speed", lambda: {"value": 1}) == {"value": 1}
