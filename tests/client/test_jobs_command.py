"""`rpg jobs` from submitting to the files, and what it says when that does not go."""

import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load

from rpg.client import Client
from rpg.commands.main import main
from tests.client.conftest import TOKEN, Live, cut_after, damaged
from tests.serve.conftest import CONDITIONS

Run = Callable[..., tuple[int, str, str]]


@pytest.fixture
def run(live: Live, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Run:
    """`run(*arguments)`: the exit status, stdout and stderr of `rpg jobs`."""
    monkeypatch.setenv("RPG_SERVER", live.url)
    monkeypatch.setenv("RPG_TOKEN", TOKEN)
    monkeypatch.delenv("FORCE_COLOR", raising=False)

    def call(*arguments: object) -> tuple[int, str, str]:
        status = main(["jobs", *map(str, arguments)])
        return status, *capsys.readouterr()

    return call


def submitted(run: Run, *arguments: object) -> str:
    status, out, err = run("submit", "small", "--condition", "0,1,2", "--condition=1,-1,0.5", *arguments)
    assert (status, err) == (0, "")
    return out.strip()


def test_from_submitting_to_the_files(
    run: Run, live: Live, expected: Callable[..., list[bytes]], tmp_path: Path
) -> None:
    settings = ("--number", 2, "--seed", 5, "--steps", 2, "--priority", 3)
    job = submitted(run, *settings)
    status, out, err = run("wait", job)
    assert (status, out) == (0, f"{job}: 4 of 4 models\n")
    assert err.splitlines()[-1] == "models: 4/4 succeeded"
    status, out, err = run("status", job)
    assert (status, err) == (0, "")
    assert out.splitlines()[1].split()[:4] == [job, "small", "succeeded", "4/4"]
    assert job in run("status")[1]
    live.fault("GET", "/models/1", cut_after(1000))
    status, out, err = run("download", job, "--out", tmp_path)
    assert status == 0
    assert re.fullmatch(r"bytes: (\d+)/\1\n", err)
    paths = [Path(line) for line in out.splitlines()]
    assert [path.read_bytes() for path in paths] == expected(CONDITIONS, 2, 5, steps=2)
    assert run("download", job, "--out", tmp_path)[1] == out
    assert run("cancel", job)[1] == f"{job}: succeeded, 4 of 4 models\n"


def test_digits_are_values_where_the_generator_takes_several(run: Run, live: Live) -> None:
    status, out, _ = run("submit", "small", "--condition", "012")
    assert status == 0
    assert run("wait", out.strip())[0] == 0
    status, _, err = run("submit", "small", "--condition", "01")
    assert (status, err) == (2, "rpg: error: condition: expected 3 values, got 2\n")


def test_another_dtype_and_evaluation(run: Run, client: Client) -> None:
    job = submitted(run, "--dtype", "float16")
    assert run("wait", job)[0] == 0
    assert client.job(job).dtype == "float16"
    model = load(client.generate("small", CONDITIONS[0], dtype="float16"))
    assert model["head.weight"].dtype == torch.float16
    assert run("submit", "small", "--condition", "0,1,2", "--evaluate")[::2] == (
        2,
        "rpg: error: evaluate: generator 'small' is served without a test: with neither a task family, nor a "
        "command, nor a collection whose conditions say what is right\n",
    )


def test_a_terminal_shows_a_bar(run: Run, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    job = submitted(run)
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("COLUMNS", "100")
    assert "━" in (err := run("wait", job)[2]) and "2/2" in err
    assert "━" in (err := run("download", job, "--out", tmp_path)[2]) and "kB" in err


def test_a_job_that_was_cancelled(run: Run, tmp_path: Path) -> None:
    job = submitted(run, "--number", 5000, "--steps", 1000)
    status, out, _ = run("cancel", job)
    assert (status, out.split(",")[0]) == (0, f"{job}: cancelled")
    status, out, err = run("wait", job)
    assert (status, out) == (2, "")
    assert re.fullmatch(rf"rpg: error: job {job} cancelled with \d+ of 10000 models", err.splitlines()[-1])
    status, out, err = run("download", job, "--out", tmp_path)
    assert status == 0
    assert err.splitlines()[-1] == f"{len(out.splitlines())} of 10000 models; the job is cancelled"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("status", "none"), "no job 'none'"),
        (("wait", "none"), "no job 'none'"),
        (("download", "none", "--out", "out"), "no job 'none'"),
        (("cancel", ".."), "'..': expected a job's id"),
        (("submit", "large"), "generator: 'large' is not served; expected one of small"),
        (("submit", "small"), "conditions: this generator needs ones of 3 values"),
        (
            ("submit", "small", "--description", "a cat"),
            "descriptions: generator 'small' has no text encoder; expected conditions",
        ),
        (("submit", "small", "--priority", 101), "priority: Input should be less than or equal to 100"),
        (
            ("status", "--server", "localhost"),
            "'localhost': expected the address of a service, such as http://127.0.0.1:8000",
        ),
    ],
)
def test_errors_are_one_line(run: Run, arguments: tuple[object, ...], message: str) -> None:
    assert run(*arguments) == (2, "", f"rpg: error: {message}\n")


def test_the_address_and_the_token(run: Run, live: Live, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RPG_TOKEN", "wrong")
    assert run("status") == (2, "", "rpg: error: unknown token; the token is read from RPG_TOKEN\n")
    monkeypatch.setenv("RPG_TOKEN", TOKEN)
    monkeypatch.delenv("RPG_SERVER")
    status, _, err = run("status")
    assert (status, err) == (
        2,
        "rpg: error: no service: expected --server or RPG_SERVER, such as http://127.0.0.1:8000\n",
    )
    assert run("status", "--server", live.url)[0] == 0


def test_a_damaged_file(run: Run, live: Live, tmp_path: Path) -> None:
    job = submitted(run)
    run("wait", job)
    live.fault("GET", "/models/1", damaged())
    status, out, err = run("download", job, "--out", tmp_path)
    assert (status, out) == (2, "")
    target = tmp_path / "model_000001.safetensors"
    assert err.splitlines()[-1].startswith(f"rpg: error: {target}: damaged on its way: expected SHA-256 ")
    assert not target.exists()


def test_ctrl_c_leaves_the_job_alone(live: Live, client: Client) -> None:
    job = client.submit("small", CONDITIONS, 5000, steps=1000)
    code = "import sys; from rpg.commands.main import main; sys.exit(main())"
    waiting = subprocess.Popen(
        [sys.executable, "-c", code, "jobs", "wait", job.id, "--server", live.url],
        env={**os.environ, "RPG_TOKEN": TOKEN}, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
    )  # fmt: skip
    try:
        while not live.asked("GET", "/events"):
            assert waiting.poll() is None, waiting.communicate()
            time.sleep(0.05)
        waiting.send_signal(signal.SIGINT)
        out, err = waiting.communicate(timeout=30)
        assert (waiting.returncode, out, err.splitlines()[-1]) == (130, "", "rpg: interrupted"), err
        assert "Traceback" not in err
        assert client.job(job.id).state == "running"
    finally:
        waiting.kill()
        client.cancel(job.id)


def test_the_library_does_not_load_ray_or_the_service() -> None:
    code = (
        "import sys, rpg.client; print([name for name in ('ray', 'serve', 'torch') if name in sys.modules])\n"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert out == "[]\n"
