"""Jobs: what is written, provenance, going on after an interruption, refusals."""

import errno
import json
import os
import signal
import subprocess
import sys
import tarfile
import textwrap
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor, nn

from rpg.collection.layout import Encoded, Layout
from rpg.collection.statistics import LayoutStatistics
from rpg.config import (
    ConditionConfig,
    ConditionKind,
    DenoiserConfig,
    GeneratorConfig,
    Normalisation,
    RecurrentConfig,
    SamplingConfig,
    SamplingPrecision,
    Solver,
)
from rpg.errors import RPGError
from rpg.generator.generator import Generator
from rpg.sampling import job as job_module
from rpg.sampling.generate import generate_models, run_job
from rpg.sampling.job import GenerationJob
from rpg.sampling.model_writer import ModelWriter
from rpg.sampling.noise import permutation_states
from rpg.sampling.writers import LARGE_VALUES, OrderedWriters
from rpg.storage import small_files
from tests.sampling.packing import Asked, sampled_tokens

MakeGenerator = Callable[..., Generator]
MakeLayout = Callable[..., Layout]
CONDITIONS = [[0.0, 1.0, 2.0], [1.0, -1.0, 0.5]]
SAMPLING = SamplingConfig(solver=Solver.ddim, steps=3, token_batch=32)


@pytest.fixture
def generator(make_generator: MakeGenerator, make_layout: MakeLayout) -> Generator:
    return make_generator(make_layout(16))


def test_files_hold_what_was_sampled(
    tmp_path: Path, generator: Generator, small_net: Callable[[], nn.Module]
) -> None:
    calls: list[tuple[int, int]] = []
    paths = generate_models(
        generator,
        CONDITIONS,
        3,
        5,
        tmp_path / "out",
        SAMPLING,
        lambda *done: calls.append(done),
    )
    assert [path.name for path in paths] == [f"model_{i:06d}.safetensors" for i in range(6)]
    assert sorted((tmp_path / "out").iterdir()) == paths
    assert calls == [(i, 6) for i in range(7)]
    for index, path in enumerate(paths):
        asked = Asked(index, torch.tensor(CONDITIONS[index // 3]))
        tokens = sampled_tokens(generator, SAMPLING, [asked], 5)
        expected = generator.layout.decode(Encoded(tokens, generator.layout.constants))
        found = load_file(path)
        assert found.keys() == expected.keys()
        assert all(torch.equal(found[name], expected[name]) for name in expected)
        network = small_net()
        network.load_state_dict(found, strict=True)


def test_provenance(tmp_path: Path, generator: Generator) -> None:
    paths = generate_models(generator, CONDITIONS, 2, 2**63, tmp_path, SAMPLING)
    with safe_open(paths[3], framework="pt") as file:
        metadata = file.metadata()
    assert metadata["rpg.generator"] == generator.digest()
    assert metadata["rpg.index"] == "3"
    assert metadata["rpg.seed"] == str(2**63)
    assert json.loads(metadata["rpg.condition"]) == CONDITIONS[1]
    sampling = json.loads(metadata["rpg.sampling"])
    assert sampling["solver"] == "ddim"
    assert SamplingConfig(**{**sampling, "solver": Solver(sampling["solver"])}) == SAMPLING
    # Not what was asked for, but what a CPU makes of it.
    assert (sampling["precision"], metadata["rpg.precision"]) == ("auto", "float32")
    # What Hugging Face's loaders ask for.
    assert metadata["format"] == "pt"


@pytest.mark.parametrize("kind", [ConditionKind.permutation, ConditionKind.none])
def test_jobs_without_conditions(
    tmp_path: Path, make_generator: MakeGenerator, make_layout: MakeLayout, kind: ConditionKind
) -> None:
    generator = make_generator(make_layout(16), condition=kind)
    paths = generate_models(generator, None, 4, 0, tmp_path, SAMPLING)
    assert len({path.read_bytes() for path in paths}) == 4
    with safe_open(paths[0], framework="pt") as file:
        assert file.metadata()["rpg.condition"] == "null"


def stamps(paths: list[Path]) -> list[tuple[int, int]]:
    return [(path.stat().st_ino, path.stat().st_mtime_ns) for path in paths]


def changed(before: list[tuple[int, int]], paths: list[Path]) -> list[int]:
    return [i for i, (old, new) in enumerate(zip(before, stamps(paths), strict=True)) if old != new]


def test_only_what_is_missing_is_made_again_and_is_the_same(tmp_path: Path, generator: Generator) -> None:
    paths = generate_models(generator, CONDITIONS, 3, 5, tmp_path, SAMPLING)
    content = [path.read_bytes() for path in paths]
    before = stamps(paths)
    generate_models(generator, CONDITIONS, 3, 5, tmp_path, SAMPLING)
    assert changed(before, paths) == []
    paths[1].unlink()
    paths[4].write_bytes(content[4][:-10])
    paths[5].write_bytes(content[3])
    calls: list[tuple[int, int]] = []
    generate_models(generator, CONDITIONS, 3, 5, tmp_path, SAMPLING, lambda *done: calls.append(done))
    assert calls == [(done, 6) for done in range(7)]
    assert changed(before, paths) == [1, 4, 5]
    assert [path.read_bytes() for path in paths] == content


@pytest.mark.parametrize(
    "change",
    [{"seed": 6}, {"sampling": SamplingConfig(steps=4)}, {"conditions": [[0.0, 0, 0], [0.0, 0, 1]]}],
    ids=["seed", "sampling", "conditions"],
)
def test_another_job_in_the_same_place_is_made_anew(
    tmp_path: Path, generator: Generator, change: dict[str, object]
) -> None:
    asked = {"conditions": CONDITIONS, "number": 2, "seed": 5, "sampling": SAMPLING}
    paths = run_job(generator, GenerationJob(**asked), range(4), tmp_path)  # type: ignore[arg-type]
    before = stamps(paths)
    run_job(generator, GenerationJob(**{**asked, **change}), range(4), tmp_path)  # type: ignore[arg-type]
    assert changed(before, paths) == [0, 1, 2, 3]


def test_another_generator_makes_all_anew(tmp_path: Path, generator: Generator) -> None:
    paths = generate_models(generator, CONDITIONS, 2, 5, tmp_path, SAMPLING)
    before = stamps(paths)
    with torch.no_grad():
        generator.denoiser.get_parameter("output.bias")[0] += 1
    generate_models(generator, CONDITIONS, 2, 5, tmp_path, SAMPLING)
    assert changed(before, paths) == [0, 1, 2, 3]


def test_models_of_another_arithmetic_are_made_anew(
    tmp_path: Path, generator: Generator, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A job that began on a CPU goes on on a GPU: it shall not be a mixture."""
    paths = generate_models(generator, CONDITIONS, 2, 5, tmp_path, SAMPLING)
    before = stamps(paths)
    monkeypatch.setattr(job_module, "used_precision", lambda *given: SamplingPrecision.bfloat16)
    generate_models(generator, CONDITIONS, 2, 5, tmp_path, SAMPLING)
    assert changed(before, paths) == [0, 1, 2, 3]
    before = stamps(paths)
    generate_models(generator, CONDITIONS, 2, 5, tmp_path, SAMPLING)
    assert changed(before, paths) == []


@pytest.fixture(params=["large", "small"])
def sized(request: pytest.FixtureRequest, generator: Generator, large_generator: Generator) -> Generator:
    """A generator of models that several threads write, or one of models that one thread writes."""
    return large_generator if request.param == "large" else generator


@pytest.fixture(scope="module")
def large_generator(make_generator: MakeGenerator, make_layout: MakeLayout) -> Generator:
    template = {"weight": torch.zeros(LARGE_VALUES // 2), "bias": torch.zeros(LARGE_VALUES // 2 + 1)}
    return make_generator(make_layout(2**16, template=template))


def test_shares_of_a_job_make_the_files_of_the_whole(tmp_path: Path, sized: Generator) -> None:
    job = GenerationJob(CONDITIONS, 4, 1, SAMPLING)
    assert len(job) == 8
    assert [job.condition_of(i) for i in (0, 3, 4, 7)] == [CONDITIONS[0]] * 2 + [CONDITIONS[1]] * 2
    whole = run_job(sized, job, range(8), tmp_path / "whole")
    for share in ([0], [1, 2, 6], [3, 4, 5, 7]):
        for path in run_job(sized, job, share, tmp_path / "shares"):
            assert path.read_bytes() == (tmp_path / "whole" / path.name).read_bytes()
    assert len(whole) == len(list((tmp_path / "shares").iterdir())) == 8


def test_packs_hold_the_files_that_would_be_written_without(tmp_path: Path, generator: Generator) -> None:
    expected = generate_models(generator, CONDITIONS, 20, 7, tmp_path / "files", SAMPLING)
    packs = generate_models(generator, CONDITIONS, 20, 7, tmp_path / "packs", SAMPLING, packed=True)
    assert sorted((tmp_path / "packs").iterdir()) == sorted(packs)
    found: dict[str, bytes] = {}
    for path in packs:
        with tarfile.open(str(path)) as pack:
            for member in pack:
                content = pack.extractfile(member)
                assert content is not None
                found[member.name] = content.read()
    assert found == {path.name: path.read_bytes() for path in expected}
    with pytest.raises(RPGError, match="there are packed models already"):
        generate_models(generator, CONDITIONS, 20, 7, tmp_path / "packs", SAMPLING, packed=True)


def test_an_interrupted_job_leaves_whole_files_only(
    tmp_path: Path, sized: Generator, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = generate_models(sized, CONDITIONS, 3, 5, tmp_path / "whole", SAMPLING)
    is_large = sized.layout.token_size == 2**16
    write, write_token, written = small_files._write, ModelWriter.write_token, 0

    def interrupt_at(count: int) -> None:
        nonlocal written
        written += 1
        if written == count:
            raise KeyboardInterrupt

    def interrupted(file: ModelWriter, index: int, values: Tensor) -> None:
        interrupt_at(3 * sized.layout.tokens + 2)
        write_token(file, index, values)

    def interrupted_whole(directory: int, path: Path, content: bytes) -> None:
        interrupt_at(4)
        write(directory, path, content)

    monkeypatch.setattr(ModelWriter, "write_token", interrupted)
    monkeypatch.setattr(small_files, "_write", interrupted_whole)
    with pytest.raises(KeyboardInterrupt):
        generate_models(sized, CONDITIONS, 3, 5, tmp_path / "out", SAMPLING)
    monkeypatch.undo()
    left = sorted((tmp_path / "out").iterdir())
    # Several threads may have finished others than the first three, and fewer.
    assert 0 < len(left) < len(expected)
    assert is_large or len(left) >= 3
    for path in left:
        assert path.read_bytes() == (tmp_path / "whole" / path.name).read_bytes()
    before = stamps(left)
    paths = generate_models(sized, CONDITIONS, 3, 5, tmp_path / "out", SAMPLING)
    assert changed(before, left) == []
    assert [p.read_bytes() for p in paths] == [p.read_bytes() for p in expected]


def test_an_interrupt_while_writing_leaves_whole_files_only(
    tmp_path: Path, large_generator: Generator, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Ctrl-C comes to the main thread, which waits for threads that write slowly."""
    began = threading.Event()
    put = ModelWriter._put

    def slow(file: ModelWriter, position: int, data: memoryview) -> None:
        began.set()
        time.sleep(0.02)
        put(file, position, data)

    monkeypatch.setattr(ModelWriter, "_put", slow)
    here, before = threading.get_ident(), set(threading.enumerate())

    def interrupt() -> None:
        began.wait(20)
        time.sleep(0.3)
        signal.pthread_kill(here, signal.SIGINT)

    threading.Thread(target=interrupt).start()
    with pytest.raises(KeyboardInterrupt):
        generate_models(large_generator, CONDITIONS, 30, 5, tmp_path, SAMPLING)
    assert not [path for path in tmp_path.iterdir() if path.name.startswith(".")]
    assert len(list(tmp_path.iterdir())) < 60
    begun = set(threading.enumerate()) - before
    assert not [each for each in begun if each.name.startswith(("write", "finish")) and _works(each)]


def test_an_interrupt_while_the_last_tokens_are_written_leaves_no_half_file(
    tmp_path: Path, large_generator: Generator, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All is sampled by then, and the main thread only waits for the writing threads."""
    close = OrderedWriters.close
    put = ModelWriter._put
    here = threading.get_ident()

    def slow(file: ModelWriter, position: int, data: memoryview) -> None:
        time.sleep(0.05)
        put(file, position, data)

    def interrupted(writers: OrderedWriters) -> None:
        threading.Timer(0.2, signal.pthread_kill, [here, signal.SIGINT]).start()
        close(writers)

    monkeypatch.setattr(ModelWriter, "_put", slow)
    monkeypatch.setattr(OrderedWriters, "close", interrupted)
    with pytest.raises(KeyboardInterrupt):
        generate_models(large_generator, CONDITIONS[:1], 4, 5, tmp_path, SAMPLING)
    assert not [path for path in tmp_path.iterdir() if path.name.startswith(".")]


def _works(thread: threading.Thread) -> bool:
    """Whether a thread goes on for longer than a moment."""
    thread.join(5)
    return thread.is_alive()


def test_a_full_disk_is_told_of_the_file_that_met_it(
    tmp_path: Path, large_generator: Generator, monkeypatch: pytest.MonkeyPatch
) -> None:
    others = threading.Event()
    put = ModelWriter._put

    def full(file: ModelWriter, position: int, data: memoryview) -> None:
        if file.path.name == "model_000001.safetensors":
            # While others are being written.
            others.wait(20)
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        put(file, position, data)
        if file.path.name == "model_000002.safetensors":
            others.set()
            time.sleep(0.1)

    monkeypatch.setattr(ModelWriter, "_put", full)
    with pytest.raises(
        RPGError, match=r"model_000001\.safetensors: cannot be written: No space left on device"
    ):
        generate_models(large_generator, CONDITIONS, 3, 5, tmp_path, SAMPLING)
    assert not [path for path in tmp_path.iterdir() if path.name.startswith(".")]
    assert not (tmp_path / "model_000001.safetensors").exists()


def test_a_layout_of_constants_alone(tmp_path: Path, make_generator: MakeGenerator) -> None:
    same = {"weight": torch.randn(3), "steps": torch.tensor(4)}
    statistics = LayoutStatistics(same)
    statistics.update(same)
    statistics.update(same)
    generator = make_generator(statistics.layout(8, Normalisation.residual))
    calls: list[tuple[int, int]] = []
    paths = generate_models(generator, CONDITIONS, 1, 0, tmp_path, SAMPLING, lambda *done: calls.append(done))
    assert calls[-1] == (2, 2)
    for path in paths:
        found = load_file(path)
        assert all(torch.equal(found[name], same[name]) for name in same)


@pytest.mark.parametrize(
    ("conditions", "number", "message"),
    [
        ([[0.0, 1.0]], 1, "condition: expected 3 values, got 2"),
        ([[0.0, 1.0, 2.0], [0.0, float("inf"), 0.0]], 1, "condition: expected finite values"),
        (None, 1, "condition: this generator needs one of 3 values"),
        (CONDITIONS, 0, "number: expected at least 1 model, got 0"),
        (CONDITIONS, -1, "number: expected at least 1 model, got -1"),
    ],
)
def test_bad_jobs_are_refused_before_anything_is_written(
    tmp_path: Path, generator: Generator, conditions: list[list[float]] | None, number: int, message: str
) -> None:
    with pytest.raises(RPGError, match=message):
        generate_models(generator, conditions, number, 0, tmp_path / "out", SAMPLING)
    assert not (tmp_path / "out").exists()


def test_conditions_for_a_generator_that_takes_none_are_refused(
    tmp_path: Path, make_generator: MakeGenerator, make_layout: MakeLayout
) -> None:
    generator = make_generator(make_layout(16), condition=ConditionKind.none)
    with pytest.raises(RPGError, match="takes none"):
        generate_models(generator, CONDITIONS, 1, 0, tmp_path / "out", SAMPLING)


def test_a_full_disk_leaves_earlier_files_whole(tmp_path: Path, make_layout: MakeLayout) -> None:
    """What is limited is a file's size, in a process of its own: everything that it writes is."""
    script = """
        import resource, sys
        from pathlib import Path
        from rpg.config import SamplingConfig
        from rpg.errors import RPGError
        from rpg.sampling.generate import generate_models
        from rpg.generator.generator import Generator
        generator = Generator.from_pretrained(sys.argv[1])
        resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, 10_000))
        try:
            generate_models(generator, [[0.0, 1.0, 2.0]], 2, 0, Path(sys.argv[2]), SamplingConfig(steps=2))
        except RPGError as error:
            print(error)
            sys.exit(2)
    """
    config = GeneratorConfig(
        recurrent=RecurrentConfig(width=16, depth=1, head_size=8),
        denoiser=DenoiserConfig(width=16, depth=1),
        condition=ConditionConfig(size=3),
    )
    layout = make_layout(512, template={"weight": torch.zeros(100, 100)})
    Generator(config, layout).save_pretrained(tmp_path / "generator")
    generator = Generator.from_pretrained(tmp_path / "generator")
    out = tmp_path / "out"
    generate_models(generator, [[0.0, 1.0, 2.0]], 2, 0, out, SamplingConfig(steps=2))
    before = {path.name: path.read_bytes() for path in out.iterdir()}
    first = out / "model_000000.safetensors"
    first.unlink()
    result = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(script), str(tmp_path / "generator"), str(out)],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])},
    )
    assert result.returncode == 2, result.stderr
    assert result.stdout == f"{first}: cannot be written: File too large\n"
    assert result.stderr == ""
    left = {path.name: path.read_bytes() for path in out.iterdir()}
    assert left == {name: content for name, content in before.items() if name != first.name}
    generate_models(generator, [[0.0, 1.0, 2.0]], 2, 0, out, SamplingConfig(steps=2))
    assert {path.name: path.read_bytes() for path in out.iterdir()} == before


def test_every_model_of_a_task_has_a_state_of_its_own(
    tmp_path: Path, make_generator: MakeGenerator, make_layout: MakeLayout
) -> None:
    generator = make_generator(make_layout(16), states=3)
    paths = generate_models(generator, CONDITIONS, 4, 5, tmp_path, SAMPLING)
    states = permutation_states(5, range(8), 3)
    assert set(states) == {0, 1, 2}
    rows = [torch.tensor([*CONDITIONS[i // 4], state]) for i, state in enumerate(states)]
    sampled = sampled_tokens(generator, SAMPLING, [Asked(i, row) for i, row in enumerate(rows)], 5)
    models = sampled.view(8, generator.layout.tokens, -1)
    for path, tokens in zip(paths, models, strict=True):
        expected = generator.layout.decode(Encoded(tokens, generator.layout.constants))
        for name, tensor in load_file(path).items():
            assert torch.equal(tensor, expected[name]), name
