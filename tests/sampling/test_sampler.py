"""Packed sampling: against sampling one model plainly, and invariants 2 and 3 of the design."""

import os
import subprocess
import sys
import textwrap
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

import rpg.sampling.prototypes
from rpg.collection.layout import Layout
from rpg.config import (
    ConditionForm,
    ConditionKind,
    DenoiserKind,
    Prediction,
    RecurrentKind,
    SamplingConfig,
    Solver,
)
from rpg.errors import RPGError
from rpg.generator.generator import Generator
from rpg.sampling.batch_sampler import BatchSampler
from rpg.sampling.job import GenerationJob, checked_condition
from rpg.sampling.noise import gaussian
from rpg.sampling.prototypes import PROTOTYPE_PIECE, Prototypes
from rpg.sampling.solvers import solver_steps
from tests.sampling.packing import Asked, packed

MakeGenerator = Callable[..., Generator]
MakeLayout = Callable[..., Layout]


@pytest.fixture
def threads() -> Iterator[Callable[[int], None]]:
    """Sets PyTorch's threads, and sets them back."""
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


def requests_for(generator: Generator, models: int) -> list[Asked]:
    """Models of four conditions, some of neighbours that are alike."""
    kind = generator.config.condition.kind
    random = torch.Generator().manual_seed(2)
    vectors = torch.randn(4, 3, generator=random)
    rows = {
        ConditionKind.vector: lambda i: vectors[i // 3 % 4],
        ConditionKind.permutation: lambda i: torch.tensor(i % 3),
        ConditionKind.none: lambda i: torch.zeros(0),
    }
    return [Asked(i, rows[kind](i)) for i in range(models)]


def sample(
    generator: Generator, sampling: SamplingConfig, requests: Sequence[Asked], seed: int = 11
) -> dict[int, Tensor]:
    """Every model's tokens, which must come in order and all of them."""
    pieces: dict[int, list[Tensor]] = {}
    order = []
    for models, tokens, values in packed(generator, sampling, requests, seed):
        for model, token, row in zip(models.tolist(), tokens.tolist(), values, strict=True):
            order.append((model, token))
            pieces.setdefault(model, []).append(row)
    assert order == [(r.index, token) for r in requests for token in range(generator.layout.tokens)]
    return {model: torch.stack(rows) for model, rows in pieces.items()}


def assert_alike(generator: Generator, sampling: SamplingConfig, models: int = 64) -> None:
    """Alone, in a batch of 7, in one of `models` and in another order, every byte is the same."""
    requests = requests_for(generator, models)
    together = sample(generator, sampling, requests)
    assert not torch.equal(together[0], together[1])
    shuffled = [requests[i] for i in torch.randperm(models, generator=torch.Generator().manual_seed(0))]
    groups = [requests[i : i + 1] for i in (0, 1, 5, models // 2, models - 1)]
    for group in (*groups, requests[3:10], shuffled):
        for model, tokens in sample(generator, sampling, group).items():
            assert tokens.numpy().tobytes() == together[model].numpy().tobytes()


@pytest.mark.parametrize(
    ("recurrent", "denoiser"),
    [*((kind, DenoiserKind.adaln_mlp) for kind in RecurrentKind), (RecurrentKind.mamba2, DenoiserKind.unet)],
)
@pytest.mark.parametrize(
    "sampling",
    [
        SamplingConfig(solver=Solver.ddim, steps=4, token_batch=64),
        SamplingConfig(solver=Solver.ddpm, steps=3, token_batch=50),
        SamplingConfig(solver=Solver.dpmpp_2m, steps=4, token_batch=100, guidance=1.5),
    ],
    ids=["ddim", "ddpm", "dpmpp-guided"],
)
def test_a_model_is_the_same_in_any_batch(
    make_generator: MakeGenerator,
    make_layout: MakeLayout,
    recurrent: RecurrentKind,
    denoiser: DenoiserKind,
    sampling: SamplingConfig,
) -> None:
    generator = make_generator(make_layout(16), recurrent=recurrent, denoiser=denoiser, dropout=0.1)
    assert_alike(generator, sampling)


@pytest.mark.parametrize("condition", [ConditionKind.permutation, ConditionKind.none])
def test_so_is_one_of_a_permutation_state_or_of_no_condition(
    make_generator: MakeGenerator, make_layout: MakeLayout, condition: ConditionKind
) -> None:
    generator = make_generator(make_layout(16), condition=condition, dropout=0.1)
    sampling = SamplingConfig(solver=Solver.ddim, steps=3, token_batch=32, guidance=2.0, eta=0.5)
    assert_alike(generator, sampling)


@pytest.mark.parametrize("count", [1, 2, 3])
@pytest.mark.parametrize("width", [37, 601])
@pytest.mark.parametrize("token_batch", [1, 10, 100])
def test_so_it_is_with_sizes_that_leave_remainders_of_vectors_and_threads(
    make_generator: MakeGenerator,
    make_layout: MakeLayout,
    threads: Callable[[int], None],
    count: int,
    width: int,
    token_batch: int,
) -> None:
    """601 times 64 values are enough for PyTorch to share them among threads."""
    generator = make_generator(make_layout(13), width=width)
    threads(count)
    sampling = SamplingConfig(steps=3, token_batch=token_batch)
    assert_alike(generator, sampling, models=20)
    assert torch.get_num_threads() == count
    threads(1)
    alone = sample(generator, sampling, requests_for(generator, 1))
    threads(count)
    assert torch.equal(sample(generator, sampling, requests_for(generator, 1))[0], alone[0])


@pytest.mark.parametrize(
    ("recurrent", "denoiser"),
    [*((kind, DenoiserKind.adaln_mlp) for kind in RecurrentKind), (RecurrentKind.lstm, DenoiserKind.unet)],
)
def test_so_is_one_of_more_tokens_than_are_embedded_at_once(
    make_generator: MakeGenerator, make_layout: MakeLayout, recurrent: RecurrentKind, denoiser: DenoiserKind
) -> None:
    tokens = 2 * PROTOTYPE_PIECE + 44
    layout = make_layout(8, template={"weight": torch.zeros(tokens * 8 - 3)})
    assert layout.tokens == tokens
    generator = make_generator(layout, recurrent=recurrent, denoiser=denoiser, dropout=0.1)
    assert_alike(generator, SamplingConfig(steps=2, token_batch=200, guidance=1.5), models=11)


@pytest.mark.parametrize("recurrent", list(RecurrentKind))
@pytest.mark.parametrize("pieces", [1, 2.5])
def test_prototypes_are_the_generators(
    make_generator: MakeGenerator,
    make_layout: MakeLayout,
    monkeypatch: pytest.MonkeyPatch,
    recurrent: RecurrentKind,
    pieces: float,
) -> None:
    tokens = int(pieces * PROTOTYPE_PIECE)
    generator = make_generator(
        make_layout(4, template={"a": torch.zeros(400), "b": torch.zeros(tokens * 4 - 400)}),
        recurrent=recurrent,
    )
    seen: list[Tensor] = []
    prepare = generator.denoiser.prepare

    def spy(prototypes: Tensor) -> Tensor:
        seen.append(prototypes)
        return prepare(prototypes)

    monkeypatch.setattr(generator.denoiser, "prepare", spy)
    requests = requests_for(generator, 5)
    sample(generator, SamplingConfig(steps=1, token_batch=96), requests)
    expected = generator.prototypes(torch.stack([request.condition for request in requests])).flatten(0, 1)
    torch.testing.assert_close(torch.cat(seen)[: len(expected)], expected, rtol=1e-4, atol=1e-5)


def test_jobs_that_take_turns_do_not_compute_prototypes_anew(
    make_generator: MakeGenerator, make_layout: MakeLayout
) -> None:
    generator = make_generator(make_layout())
    conditions = torch.randn(40, 3, generator=torch.Generator().manual_seed(0))
    requests = [Asked(index, conditions[index % 40]) for index in range(120)]
    computed: list[int] = []
    generator.recurrent.register_forward_hook(lambda *call: computed.append(1))
    sampling = SamplingConfig(steps=1, token_batch=96)
    sample(generator, sampling, requests)
    assert len(computed) == 40
    # With room for none each is computed again, and is the same.
    kept, forgotten = Prototypes(generator, sampling), Prototypes(generator, sampling, remembered_bytes=0)
    for _ in range(2):
        for condition in conditions:
            pairs = zip(kept.pieces(condition), forgotten.pieces(condition), strict=True)
            assert all(torch.equal(known[0], again[0]) for known, again in pairs)
    assert len(computed) == 40 + 40 + 80


@torch.no_grad()
def plainly(generator: Generator, sampling: SamplingConfig, request: Asked, seed: int = 11) -> Tensor:
    """One model, all of its tokens at once, from the definitions."""
    layout, row = generator.layout, request.condition[None]
    models, tokens = torch.full((layout.tokens,), request.index), torch.arange(layout.tokens)

    def noise(draw: int) -> Tensor:
        return gaussian(seed, models, tokens, draw, layout.token_size)

    conditional = generator.prototypes(row)[0]
    without = generator.prototypes(row, torch.tensor([True]))[0]
    x = sampling.temperature * noise(0)
    previous = torch.zeros_like(x)
    for i, step in enumerate(solver_steps(generator.diffusion.alpha_bar, sampling)):
        t = torch.full((layout.tokens,), step.t)
        asked, unasked = generator.denoiser(x, t, conditional), generator.denoiser(x, t, without)
        answer = (1 - sampling.guidance) * unasked + sampling.guidance * asked
        estimate = generator.diffusion.to_x0(answer, x, step.t)
        if sampling.clip:
            estimate = torch.minimum(estimate.abs(), torch.tensor(sampling.clip)) * estimate.sign()
        x = step.current * x + step.estimate * estimate
        x = x + step.previous_estimate * previous + step.noise * noise(i + 1)
        previous = estimate
    return x


@pytest.mark.parametrize("prediction", list(Prediction))
@pytest.mark.parametrize("denoiser", [DenoiserKind.adaln_mlp, DenoiserKind.unet])
@pytest.mark.parametrize(
    "sampling",
    [
        SamplingConfig(solver=Solver.ddim, steps=5, eta=0.3, guidance=2.0, temperature=0.8, token_batch=32),
        SamplingConfig(solver=Solver.ddpm, steps=5, guidance=0.0, token_batch=64),
        SamplingConfig(solver=Solver.dpmpp_2m, steps=5, token_batch=7),
        SamplingConfig(solver=Solver.dpmpp_2m, steps=5, guidance=2.0, clip=0.4, token_batch=32),
    ],
    ids=["ddim", "ddpm", "dpmpp", "clipped"],
)
def test_packed_equals_plain(
    make_generator: MakeGenerator,
    make_layout: MakeLayout,
    prediction: Prediction,
    denoiser: DenoiserKind,
    sampling: SamplingConfig,
) -> None:
    # Few timesteps: with a signal near zero, an untrained network's rounding would swamp the values.
    generator = make_generator(
        make_layout(16), prediction=prediction, denoiser=denoiser, dropout=0.1, timesteps=50
    )
    requests = requests_for(generator, 6)
    together = sample(generator, sampling, requests)
    for request in requests:
        expected = plainly(generator, sampling, request)
        scale = expected.abs().max().item()
        torch.testing.assert_close(together[request.index], expected, rtol=1e-4, atol=1e-4 * scale)


@pytest.mark.parametrize("solver", list(Solver))
def test_without_diffusion_the_prediction_is_the_token(
    make_generator: MakeGenerator, make_layout: MakeLayout, solver: Solver
) -> None:
    generator = make_generator(make_layout(16), denoiser=DenoiserKind.direct)
    (request,) = requests_for(generator, 1)
    expected = generator.prototypes(request.condition[None])[0] @ generator.denoiser.output.weight.T
    expected = expected + generator.denoiser.output.bias
    for seed in (1, 2):
        found = sample(generator, SamplingConfig(solver=solver, steps=3, eta=0.5), [request], seed=seed)
        torch.testing.assert_close(found[request.index], expected)


@pytest.mark.parametrize("form", [ConditionForm.gated, ConditionForm.convolutional])
def test_pieces_take_their_own_part_of_a_condition(
    make_generator: MakeGenerator,
    make_layout: MakeLayout,
    monkeypatch: pytest.MonkeyPatch,
    form: ConditionForm,
) -> None:
    monkeypatch.setattr(rpg.sampling.prototypes, "PROTOTYPE_PIECE", 6)
    layout = make_layout(4)
    config = make_generator(layout).config
    config = replace(config, condition=replace(config.condition, form=form))
    torch.manual_seed(0)
    generator = Generator(config, layout).eval()
    assert layout.tokens % 6
    pieces = [known for known, _ in Prototypes(generator, SamplingConfig()).pieces(torch.ones(3))]
    assert len(pieces) > 2
    torch.testing.assert_close(torch.cat(pieces), generator.prototypes(torch.ones(1, 3))[0])


def test_seed_index_and_condition_all_matter(make_generator: MakeGenerator, make_layout: MakeLayout) -> None:
    generator = make_generator(make_layout(16))
    sampling = SamplingConfig(steps=3)
    row = torch.ones(3)
    base = sample(generator, sampling, [Asked(4, row)])[4]
    assert not torch.equal(sample(generator, sampling, [Asked(4, row)], seed=12)[4], base)
    assert not torch.equal(sample(generator, sampling, [Asked(5, row)])[5], base)
    assert not torch.equal(sample(generator, sampling, [Asked(4, 2 * row)])[4], base)
    cold = SamplingConfig(steps=3, temperature=0.0)
    still = sample(generator, cold, [Asked(4, row), Asked(5, row)])
    assert torch.equal(still[4], still[5])


def test_nothing_asked_for_is_nothing_sampled(make_generator: MakeGenerator, make_layout: MakeLayout) -> None:
    assert sample(make_generator(make_layout(16)), SamplingConfig(), []) == {}


@pytest.mark.parametrize(
    ("sampling", "seed", "message"),
    [
        (SamplingConfig(guidance=2.0), 0, "guidance: needs a generator trained with condition.dropout > 0"),
        (SamplingConfig(steps=1001), 0, "steps: expected at most diffusion.timesteps = 1000, got 1001"),
        (SamplingConfig(token_batch=0), 0, "token_batch: expected .* at least 1, got 0"),
        (SamplingConfig(temperature=float("nan")), 0, "temperature: expected a finite value"),
        (SamplingConfig(clip=-1), 0, "clip: expected a finite value of at least 0"),
        (SamplingConfig(), -1, r"seed: expected 0 <= seed < 2\*\*64, got -1"),
        (SamplingConfig(), 2**64, r"seed: expected 0 <= seed < 2\*\*64"),
    ],
)
def test_bad_settings_are_refused(
    make_generator: MakeGenerator, make_layout: MakeLayout, sampling: SamplingConfig, seed: int, message: str
) -> None:
    with pytest.raises(RPGError, match=message):
        job = GenerationJob(None, 1, seed, sampling)
        BatchSampler(make_generator(make_layout(16)), job.sampling)


@pytest.mark.parametrize(
    ("kind", "condition", "message"),
    [
        (ConditionKind.vector, [0.0, 1.0], "condition: expected 3 values, got 2"),
        (ConditionKind.vector, [0.0, 1.0, float("nan")], "condition: expected finite values"),
        (ConditionKind.vector, [0.0, 1.0, 1e39], "condition: expected finite values"),
        (ConditionKind.none, [0.0], "condition: this generator takes none .*'none'.*got 1 values"),
        (ConditionKind.permutation, [0.0], "condition: this generator takes none .*'permutation'"),
    ],
)
def test_bad_conditions_are_refused(
    make_generator: MakeGenerator,
    make_layout: MakeLayout,
    kind: ConditionKind,
    condition: list[float],
    message: str,
) -> None:
    with pytest.raises(RPGError, match=message):
        checked_condition(make_generator(make_layout(16), condition=kind).config.condition, condition)


PEAK_MEMORY = """
    import ctypes
    import sys
    from pathlib import Path
    import torch
    from rpg.collection.layout import Layout
    from rpg.collection.statistics import LayoutStatistics
    from rpg.config import (
        ConditionConfig, ConditionKind, DenoiserConfig, GeneratorConfig, Normalisation, RecurrentConfig,
        SamplingConfig,
    )
    from rpg.sampling.generate import run_job
    from rpg.sampling.job import GenerationJob
    from rpg.generator.generator import Generator

    torch.set_num_threads(1)

    def memory(key):
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith(key + ":"):
                return int(line.split()[1]) / 1024

    def generator(tokens):
        checkpoints = [{"weight": torch.randn(tokens * 512)} for _ in range(2)]
        statistics = LayoutStatistics(checkpoints[0])
        for checkpoint in checkpoints:
            statistics.update(checkpoint)
        config = GeneratorConfig(
            recurrent=RecurrentConfig(width=16, depth=1, state_size=8, head_size=8),
            denoiser=DenoiserConfig(width=16, depth=1),
            condition=ConditionConfig(kind=ConditionKind.none),
        )
        return Generator(config, statistics.layout(512, Normalisation.residual))

    def peak(generator, models, name):
        job = GenerationJob(None, models, 0, SamplingConfig(steps=1, token_batch=128))
        ctypes.CDLL(None).malloc_trim(0)
        Path("/proc/self/clear_refs").write_text("5")
        before = memory("VmRSS")
        run_job(generator, job, range(models), Path(sys.argv[1]) / name)
        return memory("VmHWM") - before

    small, large = generator(512), generator(64 * 512)
    peak(small, 1, "warm")
    print(peak(small, 1, "one"), peak(small, 64, "many"), peak(large, 1, "large"))
"""


@pytest.mark.skipif(sys.platform != "linux", reason="measures memory by /proc")
def test_peak_memory_depends_on_the_token_batch_alone(tmp_path: Path) -> None:
    """64 models of 1 MB, or one of 64 MB, need little more than one of 1 MB: finished tokens stream out."""
    result = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(PEAK_MEMORY), str(tmp_path)],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": str(Path(__file__).parents[2]), "OMP_NUM_THREADS": "1"},
    )
    if "clear_refs" in result.stderr or "malloc_trim" in result.stderr:
        pytest.skip("this system does not let a process forget its peak memory")
    assert result.returncode == 0, result.stderr
    one, many, large = map(float, result.stdout.split())
    # Where the allocator happens to give pages back moves the peak by some megabytes.
    assert many < one + 16
    assert large < one + 16
