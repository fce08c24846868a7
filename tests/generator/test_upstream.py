"""Generators of the published code: imported, they make the networks that a transcription of it makes."""

import os
import pickle
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file
from torch import Tensor

from rpg.commands.main import main
from rpg.config import ConditionForm, ConditionKind, Positions, SamplingConfig, Solver, TokenCut, load_config
from rpg.errors import RPGError
from rpg.generator.generator import Generator
from rpg.generator.structure_cache import read_structure
from rpg.generator.upstream import import_upstream
from rpg.sampling.generate import generate_models
from rpg.sampling.noise import gaussian, permutation_states
from tests.generator.published import (
    CLASS,
    FULL,
    TOKENS_16384,
    UNCONDITIONAL,
    Noise,
    Preset,
    StateDict,
    checkpoint_of,
    networks,
    postprocess,
    sample,
    structure_of,
    tokens_of,
    write_structure,
)

SEED = 11
CONDITION = [0.0, 1, 1, 0, 1, 0, 0, 0, 1, 0]


class Saved:
    """What the published code leaves on the disk."""

    def __init__(self, directory: Path, preset: Preset, change: Callable[[StateDict], Any] | None = None):
        self.structure = structure_of(networks())
        self.tensors = checkpoint_of(preset, self.structure)
        if change is not None:
            change(self.tensors)
        self.checkpoint, self.cache = directory / "checkpoint.pth", directory / "structure.cache"
        torch.save(self.tensors, self.checkpoint)
        write_structure(self.cache, self.structure)

    def noise(self, model: int, preset: Preset) -> Noise:
        tokens = torch.arange(sum(tokens_of(self.structure, preset.token_size, preset.flat)))
        models = torch.full_like(tokens, model)
        return lambda draw: gaussian(SEED, models, tokens, draw, preset.token_size)


def assert_equal_networks(found: StateDict, expected: StateDict) -> None:
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert found[name].dtype == tensor.dtype
        torch.testing.assert_close(found[name], tensor, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("preset", "draws_states"),
    [
        (UNCONDITIONAL, None),
        (replace(UNCONDITIONAL, timesteps=30), False),
        (TOKENS_16384, None),
        (CLASS, None),
        (CLASS, True),
        (replace(CLASS, sampler="ddpm", timesteps=80), None),
        (FULL, None),
        (replace(UNCONDITIONAL, timesteps=30, flat=True), None),
        (replace(UNCONDITIONAL, timesteps=30, trainable_positions=True, layers=1), None),
    ],
)
def test_from_the_same_noise_it_makes_the_same_networks(
    tmp_path: Path, preset: Preset, draws_states: bool | None
) -> None:
    saved = Saved(tmp_path, preset)
    generator = import_upstream(saved.checkpoint, saved.cache, draws_states)
    generator.save_pretrained(tmp_path / "generator")
    generator = Generator.from_pretrained(tmp_path / "generator")
    conditions = None if preset.condition is None else [CONDITION]
    sampling = replace(generator.config.sampling, token_batch=32)
    paths = generate_models(generator, conditions, 2, SEED, tmp_path / "out", sampling)
    made = []
    for model, path in enumerate(paths):
        state = None
        if draws_states or (draws_states is None and preset.condition is None):
            [state] = permutation_states(SEED, [model], preset.permutations)
        condition = None if conditions is None else torch.tensor(CONDITION)
        tokens = sample(saved.tensors, saved.noise(model, preset), condition, state)
        assert 0.1 < tokens.abs().median() < 10  # else the tolerance would say little
        made.append(load_file(path))
        assert_equal_networks(made[-1], postprocess(tokens, saved.structure, preset.flat))
    assert not torch.equal(made[0]["head.weight"], made[1]["head.weight"])


def test_its_configuration_is_that_of_the_preset(tmp_path: Path) -> None:
    saved = Saved(tmp_path, TOKENS_16384)
    config = import_upstream(saved.checkpoint, saved.cache).config
    assert (config.recurrent.width, config.recurrent.output_width, config.recurrent.depth) == (96, 128, 2)
    assert (config.recurrent.expand, config.recurrent.head_size, config.recurrent.state_size) == (2, 64, 16)
    assert config.recurrent.positions is Positions.sinusoid_2d
    assert config.denoiser.channels == [1, 64, 96, 64, 1]
    assert (config.diffusion.timesteps, config.diffusion.beta_start, config.diffusion.beta_end) == (
        1000, 1e-4, 0.02,
    )  # fmt: skip
    assert config.sampling == SamplingConfig(solver=Solver.ddim_leading, steps=60, eta=0.05)
    assert (config.condition.kind, config.condition.size) == (ConditionKind.permutation, 5)


@pytest.mark.parametrize("name", ["digits_paper", "cifar10-binary-paper"])
def test_the_presets_describe_the_published_model(tmp_path: Path, name: str) -> None:
    """At their sizes: what the published code would save is imported as what the preset says."""
    expected = load_config(Path(__file__).parents[2] / "configs" / f"{name}.yaml", []).generator
    width = expected.recurrent.width
    preset = replace(CLASS, token_size=width, d_model=width, d_state=128, d_condition=width)
    saved = Saved(tmp_path, preset)
    found = import_upstream(saved.checkpoint, saved.cache).config
    # The small networks of this test have seven tokens, and the preset takes its classes from its collection.
    expected.condition = replace(expected.condition, last_tokens=7, size=10)
    expected.sampling = replace(expected.sampling, token_batch=found.sampling.token_batch)
    assert found == expected


def test_a_class_condition_reaches_the_last_eight_tokens(tmp_path: Path) -> None:
    saved = Saved(tmp_path, CLASS)
    generator = import_upstream(saved.checkpoint, saved.cache)
    assert generator.config.condition.form is ConditionForm.gated
    assert generator.config.condition.last_tokens == 8
    one, other = generator.condition(torch.tensor([[0.0] * 10, CONDITION]))
    assert torch.equal(one[:-8], other[:-8])
    assert (one[-8:] != other[-8:]).all(1).all()


def test_positions_that_are_no_sinusoids_are_kept_as_they_are(tmp_path: Path) -> None:
    saved = Saved(tmp_path, replace(UNCONDITIONAL, trainable_positions=True))
    generator = import_upstream(saved.checkpoint, saved.cache)
    assert generator.config.recurrent.positions is Positions.learned
    assert torch.equal(generator.positions, saved.tensors["model.pe"][0])


def test_flat_tokens_and_one_dimensional_positions_are_recognised(tmp_path: Path) -> None:
    saved = Saved(tmp_path, replace(UNCONDITIONAL, flat=True))
    generator = import_upstream(saved.checkpoint, saved.cache)
    assert generator.layout.cut is TokenCut.flat
    assert generator.config.recurrent.positions is Positions.sinusoid_1d


def test_the_command_makes_a_generator_that_generates(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    saved = Saved(tmp_path, replace(CLASS, sampler="ddpm", timesteps=4))
    out = tmp_path / "generator"
    assert main(["import-upstream", str(saved.checkpoint), str(saved.cache), str(out)]) == 0
    assert "9 tensors in 14 tokens of 64 values, condition vector of 10" in capsys.readouterr().out
    models = tmp_path / "models"
    assert main(["generate", str(out), "--condition", "0110100010", "--out", str(models)]) == 0
    (path,) = models.iterdir()
    assert {name: tensor.shape for name, tensor in load_file(path).items()} == {
        name: tensor.shape for name, tensor in networks()[0].items()
    }


def without(key: str) -> Callable[[StateDict], Any]:
    return lambda tensors: tensors.pop(key)


def with_tensor(key: str, value: Tensor) -> Callable[[StateDict], Any]:
    return lambda tensors: tensors.update({key: value})


@pytest.mark.parametrize(
    ("preset", "change", "message"),
    [
        (CLASS, without("model.pe"), "tensor 'model.pe' is missing"),
        (CLASS, without("to_condition_linear.bias"), "tensor 'to_condition_linear.bias' is missing"),
        (UNCONDITIONAL, without("to_condition.bias"), "tensor 'to_condition.bias' is missing"),
        (
            CLASS,
            without("criteria.net.encoder_list.1.1.0.running_var"),
            "tensor 'criteria.net.encoder_list.1.1.0.running_var' is missing",
        ),
        (
            CLASS,
            without("model.mamba_forward.0.in_proj.weight"),
            "tensor 'model.mamba_forward.0.in_proj.weight' is missing",
        ),
        (
            CLASS,
            with_tensor("model.mamba_forward.1.in_proj.weight", torch.zeros(3, 4)),
            r"tensor 'model.mamba_forward.1.in_proj.weight': expected shape \[290, 64\], found \[3, 4\]",
        ),
        (
            CLASS,
            with_tensor("model.pe", torch.zeros(1, 15, 64)),
            "tensor 'model.pe': expected as many tokens of 64 values as the tensors .* fill, found 15",
        ),
        (
            CLASS,
            with_tensor("to_condition_gate", torch.ones(1, 14, 1) / 2),
            "tensor 'to_condition_gate': expected zeros",
        ),
        (
            CLASS,
            with_tensor("criteria.diffusion_trainer.beta_t", torch.linspace(0.01, 0.1, 50) ** 2),
            "tensor 'criteria.diffusion_trainer.beta_t': expected a linear schedule",
        ),
        (
            UNCONDITIONAL,
            with_tensor("model.mamba_forward.0.D", torch.tensor([1.0, torch.nan])),
            "tensor 'model.mamba_forward.0.D' holds NaN",
        ),
        (
            UNCONDITIONAL,
            with_tensor("to_condition.weight", torch.zeros(64, 4)),
            r"tensor 'to_condition.weight': expected shape \[64, 1\], found \[64, 4\]",
        ),
        (
            UNCONDITIONAL,
            with_tensor("cond_stage_model.proj.weight", torch.zeros(2, 2)),
            "unexpected tensor 'cond_stage_model.proj.weight'",
        ),
        (
            UNCONDITIONAL,
            with_tensor("to_permutation_state.weight", torch.zeros(1, 32)),
            r"tensor 'to_permutation_state.weight': expected shape \[1, 64\], found \[1, 32\]",
        ),
    ],
)
def test_what_does_not_fit_is_named_in_one_line(
    tmp_path: Path, preset: Preset, change: Callable[[StateDict], Any], message: str
) -> None:
    saved = Saved(tmp_path, preset, change)
    with pytest.raises(RPGError, match=message) as caught:
        import_upstream(saved.checkpoint, saved.cache)
    assert str(caught.value).startswith(str(saved.checkpoint))
    assert "\n" not in str(caught.value)


VALUE = torch.tensor(1.0)


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        ((torch.Size([2]), VALUE), "expected 3 values"),
        ((torch.Size([2]), VALUE, VALUE, VALUE), "expected 3 values"),
        (("2", VALUE, VALUE), "expected a shape, found '2'"),
        ((torch.Size([2]), VALUE, 0 * VALUE), "expected a standard deviation above 0, found 0"),
        ((torch.Size([2]), VALUE * torch.nan, VALUE), "expected finite numbers"),
        ((torch.Size([2]), "x", VALUE), "expected finite numbers"),
        ((torch.Size([2]), VALUE, None), r"expected its value, of shape \[2\]"),
        ((torch.Size([0]), VALUE, VALUE), r"expected values, found the shape \[0\]"),
    ],
)
def test_entries_that_are_not_as_published_are_named(tmp_path: Path, entry: Any, message: str) -> None:
    path = tmp_path / "structure.cache"
    write_structure(path, {"a.weight": entry})
    with pytest.raises(RPGError, match=f"structure.cache: tensor 'a.weight': {message}"):
        read_structure(path)


class Command:
    """Unpickled, it would make a directory."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.path),)


def test_a_structure_cache_is_never_executed(tmp_path: Path) -> None:
    made = tmp_path / "made"
    content = pickle.dumps({"structure": {"a": (torch.Size([2]), Command(made), VALUE)}})
    pickle.loads(content)
    assert made.is_dir()
    made.rmdir()
    path = tmp_path / "structure.cache"
    path.write_bytes(content)
    with pytest.raises(RPGError, match=r"holds 'posix\.mkdir'.*never executes a pickle"):
        read_structure(path)
    assert not made.exists()


def test_a_command_within_a_tensors_values_is_not_executed(tmp_path: Path) -> None:
    made = tmp_path / "made"

    class Bytes:
        def __reduce__(self) -> tuple[Any, ...]:
            load: Any = torch.storage._load_from_bytes  # type: ignore[attr-defined]
            return load, (pickle.dumps(Command(made)),)

    path = tmp_path / "structure.cache"
    path.write_bytes(pickle.dumps({"structure": {"a": (torch.Size([2]), Bytes(), VALUE)}}))
    with pytest.raises(RPGError, match="not a structure cache"):
        read_structure(path)
    assert not made.exists()


CONTENT = pickle.dumps({"structure": structure_of(networks()), "checkpoint_list": ["a"]})


@given(
    damage=st.lists(st.tuples(st.integers(0, len(CONTENT) - 1), st.integers(0, 255)), max_size=6),
    end=st.integers(0, len(CONTENT)),
)
@settings(deadline=None, max_examples=150, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_a_damaged_structure_cache_is_read_or_refused_in_one_line(
    tmp_path: Path, damage: list[tuple[int, int]], end: int
) -> None:
    content = bytearray(CONTENT)
    for place, value in damage:
        content[place] = value
    path = tmp_path / "structure.cache"
    path.write_bytes(bytes(content[: end if end % 3 else None]))
    try:
        read_structure(path)
    except RPGError as error:
        assert str(error).startswith(str(path))
        assert "\n" not in str(error)
