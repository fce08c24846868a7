"""Small models, many at a time, are the files that are written token by token."""

import hashlib
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from rpg.collection.layout import Layout
from rpg.config import Normalisation, RecurrentKind, SamplingConfig, Solver, TokenCut
from rpg.generator.generator import Generator
from rpg.sampling import small_models
from rpg.sampling.batch_sampler import SampledValues
from rpg.sampling.job import GenerationJob, JobPlan
from rpg.sampling.model_format import ModelFormat, NotFiniteError
from rpg.sampling.model_writer import ModelWriter
from rpg.sampling.prototypes import Prototypes
from rpg.sampling.request import FinishedModel, Models, Request
from tests.sampling.test_model_writer import mixed_layout

SAMPLING = SamplingConfig(solver=Solver.ddim, steps=2, token_batch=64)


@settings(deadline=None, max_examples=25)
@given(
    token_size=st.integers(1, 40),
    normalisation=st.sampled_from(list(Normalisation)),
    cut=st.sampled_from(list(TokenCut)),
    dtype=st.sampled_from([None, torch.float16, torch.float32]),
)
def test_the_bytes_are_those_of_a_file_written_token_by_token(
    tmp_path_factory: pytest.TempPathFactory,
    make_checkpoints: Callable[..., list[dict[str, Tensor]]],
    token_size: int,
    normalisation: Normalisation,
    cut: TokenCut,
    dtype: torch.dtype | None,
) -> None:
    layout = mixed_layout(make_checkpoints, token_size, normalisation, cut)
    random = torch.Generator().manual_seed(token_size)
    tokens = torch.randn(3, layout.tokens, token_size, generator=random)
    form = ModelFormat(layout, dtype)
    encoded = form.encode(SampledValues(tokens.flatten(0, 1)).models(slice(None), layout))
    assert encoded.not_finite == [None] * 3
    for model, content in zip(tokens, encoded.contents.numpy(), strict=True):
        metadata = {"rpg.index": "7", "wörter": '"'}
        file = ModelWriter(tmp_path_factory.mktemp("models") / "model.safetensors", layout, metadata, dtype)
        file.open()
        for index, values in enumerate(model):
            file.write_token(index, values)
        file.commit()
        assert form.values.header(metadata) + content.tobytes() == file.path.read_bytes()


@pytest.fixture
def request_of(
    tmp_path: Path, make_generator: Callable[..., Generator], make_layout: Callable[..., Layout]
) -> Request:
    plan = JobPlan(make_generator(make_layout(16)), GenerationJob([[0.0, 1.0, 2.0]], 100, 0, SAMPLING))
    finished: list[FinishedModel] = []
    return Request(plan, range(100), tmp_path / "out", finished.extend, lambda error: None, hashed=True)


def encoded(request: Request, tokens: Tensor, *indices: int) -> list[tuple[Request, tuple[int, ...], object]]:
    sampled = SampledValues(tokens.flatten(0, 1))
    return list(small_models.encode([Models(request, indices)], sampled, 0))  # type: ignore[arg-type]


def test_what_is_told_of_files_is_what_they_are(request_of: Request, tmp_path: Path) -> None:
    layout = request_of.plan.format.layout
    tokens = torch.randn(20, layout.tokens, 16, generator=torch.Generator().manual_seed(0))
    parts = encoded(request_of, tokens, *range(40, 60))
    assert [index for _, indices, _ in parts for index in indices] == list(range(40, 60))
    for request, indices, some in parts:
        for finished in small_models.write(request, indices, some):  # type: ignore[arg-type]
            assert finished.path == tmp_path / "out" / f"model_{finished.model:06d}.safetensors"
            content = Path(finished.path).read_bytes()
            assert (finished.size, finished.sha256) == (len(content), hashlib.sha256(content).hexdigest())
    assert len(list((tmp_path / "out").iterdir())) == 20


@pytest.mark.parametrize("value", [float("nan"), float("inf"), 1e38])
def test_a_model_that_is_not_finite_is_named(request_of: Request, tmp_path: Path, value: float) -> None:
    """1e38 times the tensor's scale may be finite; as float16 it is not."""
    job = GenerationJob([[0.0, 1.0, 2.0]], 100, 0, SAMPLING, dtype="float16")
    request_of.plan = JobPlan(request_of.plan._generator, job)
    tokens = torch.zeros(2, request_of.plan.format.layout.tokens, 16)
    tokens[1, 0, 3] = value
    [(request, indices, some)] = encoded(request_of, tokens, 4, 5)
    name = request_of.plan.format.layout.specs[0].name
    with pytest.raises(NotFiniteError, match=rf"model_000005\.safetensors: tensor '{name}': NaN or infinite"):
        small_models.write(request, indices, some)  # type: ignore[arg-type]
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("kind", list(RecurrentKind))
@pytest.mark.parametrize("token_size", [7, 16, 40, 300])
def test_prototypes_do_not_depend_on_the_conditions_beside_them(
    make_generator: Callable[..., Generator],
    make_layout: Callable[..., Layout],
    kind: RecurrentKind,
    token_size: int,
) -> None:
    """To the bit: alone, or at any place among others, remembered or not."""
    generator = make_generator(make_layout(token_size), recurrent=kind).eval()
    conditions = torch.randn(70, 3, generator=torch.Generator().manual_seed(1))
    together, _ = Prototypes(generator, SAMPLING).of_models(conditions)
    alone = [Prototypes(generator, SAMPLING, 0).of_models(row[None])[0] for row in conditions]
    assert together.equal(torch.cat(alone))
    few = Prototypes(generator, SAMPLING, remembered_bytes=10_000)
    for some in (conditions[60:], conditions[20:], conditions):
        known, _ = few.of_models(some)
        assert known.equal(torch.cat(alone[-len(some) :]))
