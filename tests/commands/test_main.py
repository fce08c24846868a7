"""The `rpg` command as a user runs it: output, one line for an error, exit status."""

import dataclasses
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

import rpg
from rpg.commands.exit_status import run_command
from rpg.commands.main import main
from rpg.config import GeneratorConfig, SamplingConfig, SamplingPrecision, Solver, load_config
from rpg.errors import RPGError

Capture = pytest.CaptureFixture[str]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for i in range(3):
        torch.save({"a": torch.full((3, 4), float(i)), "n": torch.tensor(i)}, tmp_path / f"{i}_acc0.{i}.pt")
    return tmp_path


def run(*arguments: object) -> int:
    """Exit status of `rpg ARGUMENTS`, in this process."""
    try:
        return main([str(argument) for argument in arguments])
    except SystemExit as stop:
        assert isinstance(stop.code, int)
        return stop.code


def refused(capsys: Capture, *arguments: object) -> str:
    assert run(*arguments) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith("rpg: error: ")
    assert captured.err.count("\n") == 1
    return captured.err


class TestRegister:
    def test_a_folder(self, folder: Path, capsys: Capture) -> None:
        assert run("register", folder, "--pattern", "{c:digits}_acc{acc}") == 0
        captured = capsys.readouterr()
        assert captured.out == f"{folder}: 3 checkpoints, conditions of width 1\n"
        assert captured.err == ""
        entries = json.loads((folder / "collection.json").read_text())["entries"]
        assert [entry["condition"] for entry in entries] == [[0], [1], [2]]
        assert [entry["metrics"]["acc"] for entry in entries] == [0, 0.1, 0.2]

    def test_bad_checkpoints_are_listed(self, folder: Path, capsys: Capture) -> None:
        (folder / "3.pt").touch()
        (folder / "4.pt").write_text("junk")
        assert run("register", folder) == 2
        captured = capsys.readouterr()
        lines = captured.err.splitlines()
        assert len(lines) == 3
        assert lines[0].startswith(f"{folder / '3.pt'}: is empty")
        assert lines[1].startswith(f"{folder / '4.pt'}: ")
        assert lines[2] == (
            f"rpg: error: {folder}: 2 of 5 checkpoints cannot be used; --skip-bad leaves them out"
        )
        assert not (folder / "collection.json").exists()
        assert run("register", folder, "--skip-bad") == 0
        captured = capsys.readouterr()
        assert captured.out == f"{folder}: 3 checkpoints, no conditions, 2 skipped\n"
        assert captured.err.splitlines()[0].startswith(f"skipped: {folder / '3.pt'}: is empty")

    def test_bad_input(self, folder: Path, tmp_path: Path, capsys: Capture) -> None:
        (tmp_path / "empty").mkdir()
        assert "needs at least 2 checkpoints, found 0" in refused(capsys, "register", tmp_path / "empty")
        torch.save({"a": torch.ones(1)}, tmp_path / "empty" / "one.pt")
        assert "needs at least 2 checkpoints, found 1" in refused(capsys, "register", tmp_path / "empty")
        assert "not a directory" in refused(capsys, "register", tmp_path / "nowhere")
        assert "no named field" in refused(capsys, "register", folder, "--pattern", "x")
        assert "c.csv: not found" in refused(capsys, "register", folder, "--conditions", tmp_path / "c.csv")


class TestInspect:
    def test_for_people(self, folder: Path, capsys: Capture) -> None:
        assert run("inspect", folder / "1_acc0.1.pt", "--token-size", 5) == 0
        captured = capsys.readouterr()
        assert "2 tensors, 13 values, 56 bytes; 3 tokens of 5, 20.0 % padding" in captured.out
        assert captured.err == ""

    def test_for_machines(self, folder: Path, capsys: Capture) -> None:
        run("register", folder)
        capsys.readouterr()
        assert run("inspect", folder, "--json", "--verify") == 0
        content = json.loads(capsys.readouterr().out)
        assert content["what"] == "collection"
        assert content["checkpoints"] == 3
        assert content["totals"]["tokens"] == 1

    def test_bad_input(self, folder: Path, capsys: Capture) -> None:
        assert "not found" in refused(capsys, "inspect", folder / "none.pt")
        assert "`rpg register` makes a collection" in refused(capsys, "inspect", folder)
        assert "got 0" in refused(capsys, "inspect", folder / "1_acc0.1.pt", "--token-size", 0)


class TestGenerate:
    @pytest.fixture
    def config(self) -> GeneratorConfig:
        return GeneratorConfig()

    @pytest.fixture
    def places(self) -> list[str]:
        """Devices that the generator of `calls` was moved to."""
        return []

    @pytest.fixture
    def calls(
        self, monkeypatch: pytest.MonkeyPatch, config: GeneratorConfig, places: list[str]
    ) -> list[tuple[Any, ...]]:
        """Calls of a `generate_models` that makes nothing, for a generator that is only a configuration."""
        calls: list[tuple[Any, ...]] = []

        def generate_models(
            generator: Any,
            conditions: Any,
            number: int,
            seed: int,
            out: Path,
            sampling: SamplingConfig,
            progress: Any,
            packed: bool,
        ) -> list[Path]:
            progress(0, 1)
            progress(1, 1)
            calls.append((conditions, number, seed, out, sampling))
            return [out / "model_000000.safetensors"]

        config.sampling.token_batch = 77
        config.condition.size = 4
        loaded = SimpleNamespace(config=config, to=lambda device: places.append(device))
        generator = SimpleNamespace(from_pretrained=lambda path: loaded)
        job: Any = SimpleNamespace(generate_models=generate_models)
        monkeypatch.setitem(sys.modules, "rpg.sampling.generate", job)
        module: Any = SimpleNamespace(Generator=generator)
        monkeypatch.setitem(sys.modules, "rpg.generator.generator", module)
        return calls

    def test_arguments(self, calls: list[tuple[Any, ...]], tmp_path: Path, capsys: Capture) -> None:
        conditions = ("--condition", "0101", "--condition=-1.5,2,0,0")
        sampler = ("--solver", "dpmpp_2m", "--steps", 7, "--temperature", 0.5, "--precision", "float8")
        assert run("generate", "g", *conditions, "--number", 5, "--seed", 3, "--out", tmp_path, *sampler) == 0
        expected = dataclasses.replace(
            SamplingConfig(),
            solver=Solver.dpmpp_2m,
            steps=7,
            temperature=0.5,
            token_batch=77,
            precision=SamplingPrecision.float8,
        )
        assert calls == [([[0, 1, 0, 1], [-1.5, 2, 0, 0]], 5, 3, tmp_path, expected)]
        captured = capsys.readouterr()
        assert captured.out == f"{tmp_path / 'model_000000.safetensors'}\n"
        assert captured.err == ""

    @pytest.mark.parametrize(
        ("size", "arguments", "expected"),
        [
            (10, ["--condition", "0100111010"], [0, 1, 0, 0, 1, 1, 1, 0, 1, 0]),
            (2, ["--condition", "10"], [1, 0]),
            (2, ["--condition", "10,"], [10]),
            (3, ["--condition", "10"], [1, 0]),
            (2, ["--condition", "1,0"], [1, 0]),
            (2, ["--condition=-1,0"], [-1, 0]),
            (1, ["--condition", "7"], [7]),
            (1, ["--condition", "10"], [10]),
            (1, ["--condition", "0.5"], [0.5]),
            (1, ["--condition", "0.5,"], [0.5]),
            (1, ["--condition", "-0.5"], [-0.5]),
            (1, ["--condition", "1e-3"], [0.001]),
        ],
    )
    def test_conditions_of_a_size(
        self,
        calls: list[tuple[Any, ...]],
        config: GeneratorConfig,
        tmp_path: Path,
        size: int,
        arguments: list[str],
        expected: list[float],
    ) -> None:
        config.condition.size = size
        assert run("generate", "g", "--out", tmp_path, *arguments) == 0
        assert calls[0][0] == [expected]

    @pytest.mark.parametrize(
        ("has_gpu", "arguments", "device"),
        [(True, [], "cuda"), (True, ["--device", "cpu"], "cpu"), (False, [], "cpu")],
    )
    def test_a_gpu_is_used_where_there_is_one(
        self,
        calls: list[tuple[Any, ...]],
        places: list[str],
        tmp_path: Path,
        monkeypatch: pytest.MonkeyPatch,
        has_gpu: bool,
        arguments: list[str],
        device: str,
    ) -> None:
        monkeypatch.setattr(torch.cuda, "is_available", lambda: has_gpu)
        assert run("generate", "g", "--out", tmp_path, *arguments) == 0
        assert places == [device]

    def test_a_gpu_that_is_not_there(
        self, calls: list[tuple[Any, ...]], tmp_path: Path, capsys: Capture, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
        said = refused(capsys, "generate", "g", "--out", tmp_path, "--device", "cuda")
        assert said == "rpg: error: --device: cuda, but PyTorch finds no GPU\n"
        assert calls == []

    def test_defaults_are_the_generators(self, calls: list[tuple[Any, ...]], tmp_path: Path) -> None:
        assert run("generate", "g", "--out", tmp_path) == 0
        assert calls == [(None, 1, 0, tmp_path, dataclasses.replace(SamplingConfig(), token_batch=77))]

    @pytest.mark.parametrize(
        ("arguments", "words"),
        [
            (["--steps", "5000"], "--steps: expected at most diffusion.timesteps = 1000"),
            (["--temperature", "nan"], "--temperature"),
            (["--clip", "-1"], "--clip: expected a finite value of at least 0"),
            (["--guidance", "2"], "--guidance: needs a generator trained with"),
        ],
    )
    def test_bad_sampling(
        self, calls: list[tuple[Any, ...]], tmp_path: Path, capsys: Capture, arguments: list[str], words: str
    ) -> None:
        assert words in refused(capsys, "generate", "g", "--out", tmp_path, *arguments)
        assert calls == []

    @pytest.mark.parametrize(
        "arguments",
        [
            ["--condition", "01x1"],
            ["--condition", ""],
            ["--condition", ","],
            ["--condition", "0.5,,"],
            ["--condition", "1,,2"],
            ["--condition", "1,inf"],
            ["--number", "0"],
            ["--number", "-1"],
            ["--seed", "-1"],
            ["--steps", "2.5"],
            ["--solver", "euler"],
        ],
    )
    def test_bad_arguments(self, tmp_path: Path, capsys: Capture, arguments: list[str]) -> None:
        assert run("generate", "g", "--out", tmp_path, *arguments) == 2
        assert f"rpg generate: error: argument {arguments[0]}: " in capsys.readouterr().err

    def test_no_generator(self, tmp_path: Path, capsys: Capture) -> None:
        pytest.importorskip("rpg.sampling.generate")
        assert str(tmp_path) in refused(capsys, "generate", tmp_path, "--out", tmp_path / "out")


class TestConfig:
    def test_what_is_printed_can_be_loaded(self, tmp_path: Path, capsys: Capture) -> None:
        preset = tmp_path / "p.yaml"
        preset.write_text("name: test\n")
        assert run("config", preset, "train.steps=3", "generator.recurrent.kind=lstm") == 0
        (tmp_path / "printed.yaml").write_text(capsys.readouterr().out)
        config = load_config(tmp_path / "printed.yaml")
        assert config == load_config(preset, ["train.steps=3", "generator.recurrent.kind=lstm"])
        assert config.output == "runs/test"

    def test_bad_input(self, tmp_path: Path, capsys: Capture) -> None:
        preset = tmp_path / "p.yaml"
        preset.write_text("name: test\n")
        assert "did you mean 'train.steps'?" in refused(capsys, "config", preset, "train.step=3")
        assert "not found" in refused(capsys, "config", tmp_path / "none.yaml")


class TestCommandLine:
    @pytest.mark.parametrize(
        ("error", "status", "stderr"),
        [
            (RPGError("x.pt: two\nlines"), 2, "job: error: x.pt: two\\nlines\n"),
            (OSError(28, "No space left on device"), 2, "job: error: No space left on device\n"),
            (FileNotFoundError(2, "No such file", "a.txt"), 2, "job: error: a.txt: No such file\n"),
            (OSError("odd"), 2, "job: error: odd\n"),
            (KeyboardInterrupt(), 130, "job: interrupted\n"),
        ],
    )
    def test_errors(self, capsys: Capture, error: BaseException, status: int, stderr: str) -> None:
        def fail() -> None:
            raise error

        assert run_command(fail, "job") == status
        assert capsys.readouterr().err == stderr

    def test_bugs_keep_their_traceback(self) -> None:
        def fail() -> None:
            raise ZeroDivisionError

        with pytest.raises(ZeroDivisionError):
            run_command(fail, "job")

    def test_success(self, capsys: Capture) -> None:
        assert run_command(lambda: print("done"), "job") == 0
        assert capsys.readouterr().out == "done\n"

    def test_version_and_usage(self, capsys: Capture) -> None:
        assert run("--version") == 0
        assert capsys.readouterr().out == f"rpg {rpg.__version__}\n"
        assert run() == 2
        assert run("nonsense") == 2
        assert run("--help") == 0


def process(code: str, *arguments: object, **options: Any) -> "subprocess.Popen[str]":
    command = [sys.executable, "-c", code, *map(str, arguments)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, **options)


COMMAND = "import sys; from rpg.commands.main import main; sys.exit(main())"


class TestProcess:
    def test_ctrl_c_leaves_no_traceback(self, tmp_path: Path) -> None:
        ready = tmp_path / "ready"
        code = (
            "import sys, time; from pathlib import Path; from rpg.commands.exit_status import run_command\n"
            f"def main(): Path({str(ready)!r}).touch(); time.sleep(60)\n"
            "sys.exit(run_command(main, 'rpg'))"
        )
        child = process(code)
        for _ in range(600):
            if ready.exists():
                break
            time.sleep(0.05)
        child.send_signal(signal.SIGINT)
        out, err = child.communicate(timeout=30)
        assert (child.returncode, out, err) == (130, "", "rpg: interrupted\n")

    def test_a_reader_that_is_gone(self, folder: Path) -> None:
        child = process(COMMAND, "inspect", folder / "0_acc0.0.pt", "--json")
        assert child.stdout is not None
        child.stdout.close()
        assert child.stderr is not None
        assert child.stderr.read() == ""
        assert child.wait(timeout=60) == 141

    @pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
    def test_a_full_disk_behind_stdout(self, tmp_path: Path) -> None:
        (tmp_path / "p.yaml").write_text("name: test\n")
        with Path("/dev/full").open("w") as full:
            command = [sys.executable, "-c", COMMAND, "config", str(tmp_path / "p.yaml")]
            result = subprocess.run(command, stdout=full, stderr=subprocess.PIPE, text=True, check=False)
        assert result.returncode == 2
        assert result.stderr == "rpg: error: No space left on device\n"

    def test_help_does_not_wait_for_pytorch_and_nothing_waits_for_ray(self) -> None:
        code = (
            "import sys; from rpg.commands.main import main\n"
            "try: main(['--help'])\n"
            "except SystemExit: pass\n"
            "loaded = 'torch' in sys.modules\n"
            "import rpg.collection.register, rpg.commands.inspection\n"
            "print('LOADED', loaded, 'ray' in sys.modules)"
        )
        out, _ = process(code, env={**os.environ}).communicate(timeout=120)
        assert out.splitlines()[-1] == "LOADED False False"
