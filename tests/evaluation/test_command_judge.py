"""Commands as judges: real programs are run, in Python and in others' languages."""

import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from rpg.errors import RPGError
from rpg.evaluation.command_judge import CommandJudge
from rpg.evaluation.judge import Candidate, Measurement, metric_that_counts
from rpg.tasks.families import Metric

NORM = """
import json, sys
from safetensors.torch import load_file
state = load_file(sys.argv[1])
print("a line before")
print(json.dumps({"norm": float(state["w"].norm()), "asked": len(sys.argv[2]), "split": len(sys.argv[3])}))
"""


def candidates(number: int = 2) -> list[Candidate]:
    return [
        Candidate(f"n{i}.safetensors", {"w": torch.full((4,), float(i))}, [1.0, 0.5]) for i in range(number)
    ]


def run(command: str, networks: list[Candidate], metric: str = "", limit: float = 60.0) -> list[Measurement]:
    judge = CommandJudge(command, Metric(metric), limit)
    judge.check()
    return judge.measure(networks, "test")


def test_a_script_reads_the_network_its_condition_and_the_split(tmp_path: Path) -> None:
    script = tmp_path / "my test.py"
    script.write_text(NORM)
    measured = run(f"python '{script}' {{checkpoint}} {{condition}} {{split}}", candidates())
    # The condition is told as 1,0.5.
    assert [each.metrics for each in measured] == [
        {"norm": 0.0, "asked": 5.0, "split": 4.0},
        {"norm": pytest.approx(2.0), "asked": 5.0, "split": 4.0},
    ]
    judge = CommandJudge("true {checkpoint}", Metric("", higher_is_better=False))
    assert metric_that_counts(judge, measured) == Metric("norm", higher_is_better=False)


def test_the_metric_that_counts_comes_first_and_a_number_is_a_score(tmp_path: Path) -> None:
    [found] = run("""sh -c 'echo "{\\"a\\": 1, \\"b\\": 2.5}"' {checkpoint}""", candidates(1), "b")
    assert list(found.metrics.items()) == [("b", 2.5), ("a", 1.0)]
    assert run("sh -c 'echo 3; echo' {checkpoint}", candidates(1))[0].metrics == {"score": 3.0}
    assert run("sh -c 'echo 0.25' {checkpoint}", candidates(1), "loss")[0].metrics == {"loss": 0.25}


@pytest.mark.parametrize(
    ("command", "reason"),
    [
        ("false {checkpoint}", "exit status 1"),
        ("sh -c 'echo broken weights >&2; exit 3' {checkpoint}", "exit status 3: broken weights"),
        ("sh -c 'kill -9 $$' {checkpoint}", "signal 9"),
        (
            "echo good {checkpoint}",
            "expected a number or a JSON object of numbers as its last line, got 'good ",
        ),
        ("true {checkpoint}", "as its last line, got ''"),
        ("sh -c 'echo NaN' {checkpoint}", "got 'NaN'"),
        (f"sh -c 'echo 1{400 * '0'}' {{checkpoint}}", "metric 'score': expected a finite number"),
        ("sh -c 'echo [1]' {checkpoint}", "got '[1]'"),
        ("sh -c 'echo true' {checkpoint}", "got 'true'"),
        (
            """sh -c 'echo "{\\"a\\": \\"x\\"}"' {checkpoint}""",
            "metric 'a': expected a finite number, got 'x'",
        ),
    ],
)
def test_a_failure_names_the_network_in_one_line(command: str, reason: str) -> None:
    first, second = run(command, candidates())
    for name, found in (("n0.safetensors", first), ("n1.safetensors", second)):
        assert found.failure is not None
        assert found.failure.startswith(f"{name}: evaluate.command: ")
        assert reason in found.failure
        assert "\n" not in found.failure
        assert found.metrics == {}


def test_a_metric_that_the_command_does_not_print_is_named() -> None:
    [found] = run("""sh -c 'echo "{\\"a\\": 1}"' {checkpoint}""", candidates(1), "b")
    assert "metric 'b' is missing, got a" in str(found.failure)


def test_a_command_that_takes_too_long_is_ended_with_all_that_it_started(tmp_path: Path) -> None:
    note = tmp_path / "child"
    began = time.monotonic()
    [found] = run(f"sh -c 'sleep 300 & echo $! > {note}; wait' {{checkpoint}}", candidates(1), limit=1.0)
    assert "took longer than evaluate.time_limit = 1 s" in str(found.failure)
    assert time.monotonic() - began < 30
    child = int(note.read_text())
    deadline = time.monotonic() + 10
    while time.monotonic() < deadline and _runs(child):
        time.sleep(0.05)
    assert not _runs(child)


def _runs(process: int) -> bool:
    try:
        state = Path(f"/proc/{process}/stat").read_text().rsplit(")", 1)[1].split()[0]
    except OSError:
        return False
    return state != "Z"


def test_endless_output_does_not_fill_the_memory() -> None:
    program = "import sys; [sys.stdout.write('x' * 1000 + chr(10)) for _ in range(20000)]; print(7)"
    [found] = run(f'{sys.executable} -c "{program}" {{checkpoint}}', candidates(1))
    assert found.metrics == {"score": 7.0}


@pytest.mark.parametrize(
    ("command", "reason"),
    [
        ("python test.py", "expected {checkpoint} in it"),
        ("no-such-program-here {checkpoint}", "there is no program 'no-such-program-here'"),
        ("python 'test.py {checkpoint}", "No closing quotation"),
        ("   ", "got nothing"),
    ],
)
def test_what_can_be_seen_beforehand_is_refused_before_any_network_is_there(
    command: str, reason: str
) -> None:
    with pytest.raises(RPGError, match=r"evaluate\.command: ") as caught:
        CommandJudge(command, Metric("")).check()
    assert reason in str(caught.value)


@settings(max_examples=25, deadline=None)
@given(name=st.text(min_size=1, max_size=40), text=st.text(max_size=40))
def test_names_and_descriptions_never_become_commands(name: str, text: str) -> None:
    network = Candidate(name.replace("\0", ""), {"w": torch.zeros(1)}, text.replace("\0", ""))
    command = f"{sys.executable} -c 'import sys; print(len(sys.argv))' {{checkpoint}} {{condition}}"
    [found] = run(command, [network])
    assert found.metrics == {"score": 3.0} or "cannot" in str(found.failure)


def test_placeholders_in_a_description_stay_as_they_are() -> None:
    network = Candidate("n", {"w": torch.zeros(1)}, "{split} $HOME `id` {checkpoint}")
    program = (
        "import sys; print(int(sys.argv[2] == chr(123) + 'split} $HOME `id` ' + chr(123) + 'checkpoint}'))"
    )
    [found] = run(f'{sys.executable} -c "{program}" {{checkpoint}} {{condition}}', [network])
    assert found.metrics == {"score": 1.0}


MEASURING = """
import subprocess
import sys
import torch
from rpg.evaluation.command_judge import CommandJudge
from rpg.evaluation.judge import Candidate
from rpg.tasks.families import Metric

command = f"sh -c 'sleep 300 & echo $$ $! > {sys.argv[1]}; wait' {{checkpoint}}"
CommandJudge(command, Metric("")).measure([Candidate("n", {"w": torch.zeros(1)}, None)], "test")
"""


def _eventually(true: Callable[[], bool], seconds: float = 60.0) -> bool:
    end = time.monotonic() + seconds
    while not true() and time.monotonic() < end:
        time.sleep(0.05)
    return true()


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_a_command_ends_with_all_that_it_started_when_the_process_that_measures_is_killed(
    tmp_path: Path,
) -> None:
    note = tmp_path / "processes"
    measuring = subprocess.Popen([sys.executable, "-c", MEASURING, str(note)])
    try:
        assert _eventually(lambda: note.is_file() and len(note.read_text().split()) == 2)
        shell, child = map(int, note.read_text().split())
        assert _runs(shell)
        assert _runs(child)
    finally:
        measuring.kill()
        measuring.wait()
    assert _eventually(lambda: not _runs(shell) and not _runs(child), 10.0)
