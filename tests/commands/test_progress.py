"""Progress on stderr: a bar on a terminal, lines elsewhere, and displays that leave nothing behind."""

from collections.abc import Callable
from contextlib import AbstractContextManager

import pytest

from rpg.commands.progress import ProgressDisplay, command_progress, models_progress, stage_progress

Capture = pytest.CaptureFixture[str]
Display = Callable[[], AbstractContextManager[ProgressDisplay]]


def test_without_a_terminal_a_line_is_printed_when_it_is_due_and_at_the_end(capsys: Capture) -> None:
    seldom, often = ProgressDisplay("train", None), ProgressDisplay("train", None, seconds_between_lines=0)
    seldom.update(1, 3, "loss 1")
    assert capsys.readouterr().err == ""
    seldom.update(3, 3, "loss 0.5")
    assert capsys.readouterr().err == "train: 3/3 loss 0.5\n"
    for done in (1, 1, 2):
        often.update(done, 3)
    assert capsys.readouterr().err == "train: 1/3\ntrain: 2/3\n"


@pytest.mark.parametrize("display", [models_progress, lambda: stage_progress("collect")])
def test_a_terminal_shows_a_bar_with_its_note(
    display: Display, monkeypatch: pytest.MonkeyPatch, capsys: Capture
) -> None:
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("COLUMNS", "100")
    with display() as shown:
        shown.update(2, 3, "accuracy 0.9")
    said = capsys.readouterr().err
    assert "━" in said and "2/3" in said and "accuracy 0.9" in said


def test_a_command_without_a_terminal_prints_nothing(capsys: Capture) -> None:
    with command_progress("checking") as display:
        display.update(3, 3)
    assert capsys.readouterr().err == ""


def test_a_command_shows_its_bar_from_the_first_update_on(
    monkeypatch: pytest.MonkeyPatch, capsys: Capture
) -> None:
    monkeypatch.setenv("FORCE_COLOR", "1")
    with command_progress("verifying"):
        pass
    assert "verifying" not in capsys.readouterr().err
    with command_progress("verifying") as display:
        display.update(1, 2)
    assert "verifying" in capsys.readouterr().err
