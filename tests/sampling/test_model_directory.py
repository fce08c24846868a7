"""Models that are directories: whole or not there, replaced without a trace, the same to the byte."""

import json
import os
import shutil
import signal
import subprocess
import sys
import textwrap
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

from rpg.collection.companions import Companions
from rpg.collection.layout import Encoded, Layout
from rpg.config import ConditionKind, RecurrentKind, SamplingConfig, Solver
from rpg.errors import RPGError
from rpg.generator.generator import Generator
from rpg.sampling.generate import generate_models, run_job
from rpg.sampling.job import GenerationJob
from rpg.sampling.model_directory import ModelDirectory
from rpg.sampling.model_writer import ModelWriter
from rpg.storage.directories import replacing_directory
from rpg.storage.locations import location
from tests.s3_server import Proxy, S3Server

MakeGenerator = Callable[..., Generator]
MakeLayout = Callable[..., Layout]
ADAPTER = Companions({"adapter_config.json": b'{"r": 4}', "tokenizer.json": b"{}"})
MODEL = Companions({"config.json": b'{"hidden_size": 8}'})
SAMPLING = SamplingConfig(solver=Solver.ddim, steps=3, token_batch=32)


@pytest.fixture
def generator(make_generator: MakeGenerator, make_layout: MakeLayout) -> Generator:
    layout = make_layout(16).with_companions(ADAPTER)
    return make_generator(layout, recurrent=RecurrentKind.lstm, condition=ConditionKind.none)


@pytest.fixture
def plain(generator: Generator) -> Generator:
    """The same generator of models that are files."""
    other = Generator(generator.config, generator.layout.with_companions(Companions()))
    other.load_state_dict(generator.state_dict())
    return other.eval()


def make(generator: Generator, number: int, out: Path, seed: int = 0) -> list[Path]:
    return [Path(str(path)) for path in generate_models(generator, None, number, seed, out, SAMPLING)]


def content(directory: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in directory.iterdir()}


def test_directories_hold_the_weights_of_the_files_and_the_companions(
    generator: Generator, plain: Generator, tmp_path: Path
) -> None:
    directories, files = make(generator, 3, tmp_path / "new"), make(plain, 3, tmp_path / "plain")
    assert [path.name for path in directories] == ["model_000000", "model_000001", "model_000002"]
    assert sorted((tmp_path / "new").iterdir()) == directories
    assert generator.digest() != plain.digest()
    for directory, file in zip(directories, files, strict=True):
        weights = directory / "adapter_model.safetensors"
        assert content(directory) == {**ADAPTER.files, weights.name: weights.read_bytes()}
        found, expected = load_file(weights), load_file(file)
        assert all(torch.equal(found[name], expected[name]) for name in expected)
        with safe_open(weights, framework="pt") as opened:
            assert opened.metadata()["format"] == "pt", "loaders of Hugging Face ask for it"
            assert opened.metadata()["rpg.generator"] == generator.digest()


def test_a_model_is_the_same_alone_and_among_others(generator: Generator, tmp_path: Path) -> None:
    together = make(generator, 5, tmp_path / "together")
    job = GenerationJob(None, 5, 0, SAMPLING)
    (alone,) = run_job(generator, job, [3], tmp_path / "alone")
    assert content(Path(str(alone))) == content(together[3])


def test_what_is_there_stays_and_what_is_damaged_is_made_again(generator: Generator, tmp_path: Path) -> None:
    directories = make(generator, 3, tmp_path)
    expected = [content(directory) for directory in directories]
    shutil.rmtree(directories[0])
    # Another rank, in as many bytes.
    (directories[1] / "adapter_config.json").write_bytes(b'{"r": 8}')
    (directories[2] / "notes.txt").write_text("mine")
    kept = (directories[2] / "adapter_model.safetensors").stat().st_ino
    assert make(generator, 3, tmp_path) == directories
    assert (directories[2] / "adapter_model.safetensors").stat().st_ino == kept
    (directories[2] / "notes.txt").unlink()
    assert [content(directory) for directory in directories] == expected


def test_another_job_replaces_the_models_and_no_other_file(
    generator: Generator, make_generator: MakeGenerator, make_layout: MakeLayout, tmp_path: Path
) -> None:
    make(generator, 1, tmp_path / "out", seed=0)
    (tmp_path / "out" / "model_000000" / "notes.txt").write_text("mine")
    make(generator, 1, tmp_path / "out", seed=1)
    (expected,) = make(generator, 1, tmp_path / "expected", seed=1)
    assert content(tmp_path / "out" / "model_000000") == {**content(expected), "notes.txt": b"mine"}
    other = Generator(generator.config, generator.layout.with_companions(MODEL)).eval()
    (made,) = make(other, 1, tmp_path / "out")
    assert sorted(content(made)) == ["config.json", "model.safetensors", "notes.txt"]
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["model_000000"]


def test_a_directory_appears_with_its_weights_at_once(make_layout: MakeLayout, tmp_path: Path) -> None:
    layout = make_layout(16).with_companions(MODEL)
    path = tmp_path / "out" / "model"
    file = ModelWriter(path, layout, {"format": "pt"}, companions=MODEL).open()
    assert not path.exists()
    tokens = torch.randn(layout.tokens, 16)
    for index in range(layout.tokens):
        file.write_token(index, tokens[index])
    assert not path.exists()
    file.commit()
    assert [each.name for each in path.parent.iterdir()] == ["model"]
    found, expected = (
        load_file(path / "model.safetensors"), layout.decode(Encoded(tokens, layout.constants))
    )  # fmt: skip
    assert all(torch.equal(found[name], expected[name]) for name in expected)
    dropped = ModelWriter(tmp_path / "out" / "other", layout, {}, companions=MODEL).open()
    dropped.discard()
    assert [each.name for each in path.parent.iterdir()] == ["model"]


def test_where_nothing_can_be_written_the_directory_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(RPGError, match=rf"^{tmp_path}/file/model: cannot be written: Not a directory$"):
        ModelDirectory(tmp_path / "file" / "model", MODEL)
    target = ModelDirectory(tmp_path / "file", MODEL)
    target.temporary.write_bytes(b"weights")
    with pytest.raises(RPGError, match=rf"^{tmp_path}/file: cannot be written: Not a directory$"):
        target.commit()
    assert [path.name for path in tmp_path.iterdir()] == ["file"]
    assert (tmp_path / "file").read_text() == "in the way"


def test_killed_while_models_are_written(generator: Generator, tmp_path: Path) -> None:
    """Whatever is there under its own name after SIGKILL is whole, and the next run makes the rest."""
    generator.config.sampling = SAMPLING
    generator.save_pretrained(tmp_path / "generator")
    script = textwrap.dedent(
        f"""
        from pathlib import Path
        from rpg.generator.generator import Generator
        from rpg.sampling.generate import generate_models
        generator = Generator.from_pretrained({str(tmp_path / "generator")!r})
        sampling = generator.config.sampling
        tell = lambda done, asked: print(done, flush=True)
        generate_models(generator, None, 300, 0, Path({str(tmp_path / "out")!r}), sampling, tell)
        """
    )
    process = subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    for line in process.stdout:
        if int(line) >= 20:
            break
    process.send_signal(signal.SIGKILL)
    process.wait()
    found = [path for path in (tmp_path / "out").iterdir() if not path.name.startswith(".")]
    assert 20 <= len(found) < 300
    before = {path.name: content(path) for path in found}
    expected = {path.name: content(path) for path in make(generator, 300, tmp_path / "expected")}
    assert before == {name: expected[name] for name in before}
    assert {path.name: content(path) for path in make(generator, 300, tmp_path / "out")} == expected


def test_a_stage_clears_up_unfinished_directories_of_killed_workers(tmp_path: Path) -> None:
    with replacing_directory(tmp_path / "generated") as directory:
        left = ModelDirectory(directory / "model_000000", MODEL)
        left.temporary.write_bytes(b"half")
        whole = ModelDirectory(directory / "model_000000", MODEL)
        whole.temporary.write_bytes(b"all")
        whole.commit()
    assert os.listdir(tmp_path / "generated") == ["model_000000"]  # noqa: PTH208
    assert sorted(content(tmp_path / "generated" / "model_000000")) == ["config.json", "model.safetensors"]


def test_directories_behind_a_uri(generator: Generator, tmp_path: Path, s3: S3Server) -> None:
    out = location(s3.bucket("model-directories")) / "new"
    (local,) = make(generator, 1, tmp_path)
    (remote,) = generate_models(generator, None, 1, 0, out, SAMPLING)
    assert {path.name: path.read_bytes() for path in remote.iterdir()} == content(local)
    calls: list[tuple[int, int]] = []
    (remote / "tokenizer.json").unlink()
    generate_models(generator, None, 1, 0, out, SAMPLING, lambda *done: calls.append(done))
    assert {path.name: path.read_bytes() for path in remote.iterdir()} == content(local)
    generator.save_pretrained(out / "generator")
    assert Generator.from_pretrained(out / "generator").layout.companions == ADAPTER
    other = Generator(generator.config, generator.layout.with_companions(MODEL)).eval()
    generate_models(other, None, 1, 0, out, SAMPLING)
    assert sorted(path.name for path in remote.iterdir()) == ["config.json", "model.safetensors"]


def test_an_upload_that_fails_leaves_the_earlier_model(
    generator: Generator, s3: S3Server, proxy: Proxy
) -> None:
    out = location(s3.bucket("failing-uploads")) / "new"
    (remote,) = generate_models(generator, None, 1, 0, out, SAMPLING)
    before = {path.name: path.read_bytes() for path in remote.iterdir()}
    proxy.refuses = lambda method, path: method == "PUT"
    with pytest.raises(RPGError, match=r"model_000000.* cannot be written: permission denied"):
        generate_models(generator, None, 1, 1, out, SAMPLING)
    proxy.refuses = lambda method, path: False
    assert {path.name: path.read_bytes() for path in remote.iterdir()} == before


def test_a_saved_generator_contains_the_companions(generator: Generator, tmp_path: Path) -> None:
    generator.save_pretrained(tmp_path)
    assert content(tmp_path / "companions") == ADAPTER.files
    loaded = Generator.from_pretrained(tmp_path)
    assert loaded.layout.companions == ADAPTER
    assert loaded.digest() == generator.digest()
    card = (tmp_path / "README.md").read_text()
    assert "directory with adapter_model.safetensors beside adapter_config.json, tokenizer.json." in card
    layout = json.loads((tmp_path / "layout.json").read_text())
    assert layout["companions"] == ADAPTER.digests
