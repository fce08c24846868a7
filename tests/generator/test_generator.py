"""The generator: its loss, its presets, and saving and loading."""

import dataclasses
import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from rpg.collection.layout import CENTRE_FILE, LAYOUT_FILE, Layout
from rpg.config import (
    ConditionConfig,
    ConditionForm,
    ConditionKind,
    DenoiserConfig,
    DenoiserKind,
    GeneratorConfig,
    Positions,
    Prediction,
    RecurrentConfig,
    RecurrentKind,
    SamplingConfig,
    TokenDtype,
)
from rpg.errors import RPGError
from rpg.generator import saving
from rpg.generator.generator import Batch, Generator
from rpg.generator.networks import build_networks
from rpg.generator.saving import CARD_FILE, CONFIG_FILE, CONFIG_KEY, WEIGHTS_FILE, _expected
from tests.sampling.packing import Asked, sampled_tokens

MakeGenerator = Callable[..., Generator]
MakeLayout = Callable[..., Layout]


def random_batch(layout: Layout, batch: int = 4, tokens: int = 3) -> Batch:
    random = torch.Generator().manual_seed(3)
    indices = torch.stack([torch.randperm(layout.tokens, generator=random)[:tokens] for _ in range(batch)])
    mask = layout.mask()[indices]
    shape = (batch, tokens, layout.token_size)
    return Batch(
        tokens=torch.randn(shape, generator=random) * mask,
        mask=mask,
        indices=indices,
        condition=torch.randn(batch, 3, generator=random),
        t=torch.randint(1000, (batch,), generator=random),
        noise=torch.randn(shape, generator=random),
    )


@pytest.mark.parametrize("prediction", list(Prediction))
@pytest.mark.parametrize("denoiser", list(DenoiserKind))
def test_loss_equals_a_loop_over_values(
    make_generator: MakeGenerator, make_layout: MakeLayout, prediction: Prediction, denoiser: DenoiserKind
) -> None:
    layout = make_layout(16)
    generator = make_generator(layout, prediction=prediction, denoiser=denoiser).double()
    given = random_batch(layout, tokens=layout.tokens)
    floats = {
        "tokens": given.tokens.double(), "condition": given.condition.double(), "noise": given.noise.double()
    }  # fmt: skip
    found = generator.loss(dataclasses.replace(given, **floats))
    for b in range(4):
        power = generator.diffusion.alpha_bar[given.t[b]]
        prototypes = generator.prototypes(given.condition[b][None].double())[0]
        errors = []
        for k in range(layout.tokens):
            index = int(given.indices[b, k])
            x0, noise = given.tokens[b, k].double(), given.noise[b, k].double()
            xt = power.sqrt() * x0 + (1 - power).sqrt() * noise
            answer = generator.denoiser(xt[None], given.t[b][None], prototypes[index][None])[0]
            v = power.sqrt() * noise - (1 - power).sqrt() * x0
            target = {Prediction.noise: noise, Prediction.x0: x0, Prediction.v: v}[prediction]
            length = int(layout.lengths()[index])
            errors += ((answer.float() - target) ** 2)[:length].tolist()
        assert found[b].item() == pytest.approx(sum(errors) / len(errors), rel=1e-5)


def test_loss_ignores_answers_at_padding(make_generator: MakeGenerator, make_layout: MakeLayout) -> None:
    layout = make_layout(16)
    generator = make_generator(layout)
    given = random_batch(layout, tokens=layout.tokens)
    assert not given.mask.all()
    answered: list[Tensor] = []
    denoise = generator.denoiser.forward

    def spy(x: Tensor, t: Tensor, prototype: Tensor) -> Tensor:
        answered.append(denoise(x, t, prototype))
        return answered[-1]

    generator.denoiser.forward = spy  # type: ignore[method-assign]
    (gradient,) = torch.autograd.grad(generator.loss(given).sum(), answered[0])
    used = gradient.view_as(given.mask) != 0
    assert torch.equal(used, given.mask)


def test_loss_of_nothing_but_padding_is_zero(make_generator: MakeGenerator, make_layout: MakeLayout) -> None:
    layout = make_layout(16)
    given = random_batch(layout)
    given.mask = torch.zeros_like(given.mask)
    assert torch.equal(make_generator(layout).loss(given), torch.zeros(4))


def test_dropped_conditions_have_no_effect_on_the_loss(
    make_generator: MakeGenerator, make_layout: MakeLayout
) -> None:
    layout = make_layout(16)
    generator = make_generator(layout, dropout=0.5)
    given = random_batch(layout)
    dropped = dataclasses.replace(given, dropped=torch.tensor([True, False, True, False]))
    other = dataclasses.replace(dropped, condition=given.condition + 1)
    one, two = generator.loss(dropped), generator.loss(other)
    assert torch.equal(one == two, torch.tensor([True, False, True, False]))
    assert not torch.equal(generator.loss(given), one)


PAPER = GeneratorConfig(
    recurrent=RecurrentConfig(kind=RecurrentKind.mamba2, width=32, depth=2, head_size=16),
    denoiser=DenoiserConfig(kind=DenoiserKind.unet),
    condition=ConditionConfig(kind=ConditionKind.permutation, size=7),
)
FAST = GeneratorConfig(
    recurrent=RecurrentConfig(kind=RecurrentKind.mamba2, width=32, depth=1, head_size=16),
    denoiser=DenoiserConfig(kind=DenoiserKind.adaln_mlp, width=48, depth=3),
    condition=ConditionConfig(kind=ConditionKind.vector, size=3),
)


CLASS, FULL, NO_DIFFUSION = (
    dataclasses.replace(
        PAPER,
        recurrent=dataclasses.replace(PAPER.recurrent, output_width=48, positions=Positions.learned),
        denoiser=DenoiserConfig(kind=denoiser),
        condition=ConditionConfig(size=3, width=8, form=form),
    )
    for form, denoiser in (
        (ConditionForm.gated, DenoiserKind.unet),
        (ConditionForm.convolutional, DenoiserKind.unet),
        (ConditionForm.gated, DenoiserKind.direct),
    )
)


@pytest.mark.parametrize(
    ("config", "condition"),
    [
        (PAPER, torch.tensor([0, 6])),
        *((each, torch.ones(2, 3)) for each in (FAST, CLASS, FULL, NO_DIFFUSION)),
    ],
    ids=["paper", "fast", "class", "full", "no diffusion"],
)
def test_shapes_and_gradients_of_presets(
    make_layout: MakeLayout, config: GeneratorConfig, condition: Tensor
) -> None:
    layout = make_layout(24)
    generator = Generator(config, layout)
    assert generator.positions.shape == (layout.tokens, 32)
    width = config.recurrent.prototype_width
    assert generator.prototypes(condition).shape == (2, layout.tokens, width)
    losses = generator.loss(dataclasses.replace(random_batch(layout, batch=2), condition=condition))
    assert losses.shape == (2,)
    assert losses.isfinite().all()
    torch.autograd.backward(losses.sum())
    unused = [name for name, p in generator.named_parameters() if p.grad is None]
    # Without dropout the null vector gets no gradient.
    assert unused == (["condition.null"] if config is FAST else [])


def test_for_collection_takes_sizes_from_the_collection(make_layout: MakeLayout) -> None:
    layout = make_layout(16)
    conditions = torch.tensor([[0.0, 1, 2], [4.0, 1, 0]])

    def made(kind: ConditionKind, size: int = 0, conditions: Tensor | None = conditions) -> Generator:
        config = dataclasses.replace(FAST, condition=ConditionConfig(kind=kind, size=size))
        return Generator.for_collection(config, layout, conditions, checkpoints=2)

    fitted = made(ConditionKind.vector)
    assert fitted.config.condition.size == 3
    assert torch.equal(fitted.state_dict()["condition.mean"], torch.tensor([2.0, 1, 1]))
    assert made(ConditionKind.vector, 3).config.condition.size == 3
    assert made(ConditionKind.permutation).config.condition.size == 2
    assert made(ConditionKind.none, conditions=None).config.condition.size == 0
    with pytest.raises(RPGError, match="the collection has 3, got 4"):
        made(ConditionKind.vector, 4)
    with pytest.raises(RPGError, match="needs a collection with conditions"):
        made(ConditionKind.vector, conditions=None)


def test_states_are_those_of_the_collection(make_layout: MakeLayout) -> None:
    layout = make_layout(16)
    conditions = torch.tensor([[0.0, 1, 2], [4.0, 1, 0], [4.0, 1, 0]])

    def made(asked: int, states: list[int] | None) -> Generator:
        config = dataclasses.replace(FAST, condition=ConditionConfig(states=asked))
        given = None if states is None else torch.tensor(states)
        return Generator.for_collection(config, layout, conditions, 3, states=given)

    for asked in (2, -1):
        fitted = made(asked, [1, 0, 1])
        assert fitted.state_dict()["condition.state.weight"].shape[0] == fitted.config.condition.states == 2
    # A generator that does not ask for states ignores the collection's.
    assert made(0, [1, 0, 1]).digest() != made(2, [1, 0, 1]).digest()
    assert made(0, [1, 0, 1]).state_dict().keys() == made(0, None).state_dict().keys()
    for asked, states, words in (
        (-1, None, "the collection's checkpoints have none; expected 0"),
        (3, [1, 0, 1], "the collection has 2, got 3"),
        (1, [3, 0, 3], "the collection has 2, got 1"),
    ):
        with pytest.raises(RPGError, match=words):
            made(asked, states)


def test_states_are_saved_and_named(
    tmp_path: Path, make_generator: MakeGenerator, make_layout: MakeLayout
) -> None:
    generator = make_generator(make_layout(16), states=3)
    generator.save_pretrained(tmp_path)
    assert "a condition of 3 values (3 permutation states, by seed)" in (tmp_path / CARD_FILE).read_text()
    loaded = Generator.from_pretrained(tmp_path)
    assert loaded.digest() == generator.digest()
    row = torch.tensor([1.0, 0, 1, 2])
    assert torch.equal(sampled(loaded, row), sampled(generator, row))
    assert not torch.equal(sampled(loaded, row), sampled(loaded, torch.tensor([1.0, 0, 1, 0])))


def sampled(generator: Generator, condition: Tensor) -> Tensor:
    return sampled_tokens(generator, SamplingConfig(steps=3, token_batch=32), [Asked(0, condition)], seed=1)


@pytest.mark.parametrize("recurrent", list(RecurrentKind))
@pytest.mark.parametrize("denoiser", list(DenoiserKind))
@pytest.mark.parametrize("condition", list(ConditionKind))
def test_a_loaded_generator_equals_the_saved_one(
    tmp_path: Path,
    make_generator: MakeGenerator,
    make_layout: MakeLayout,
    recurrent: RecurrentKind,
    denoiser: DenoiserKind,
    condition: ConditionKind,
) -> None:
    generator = make_generator(
        make_layout(16), recurrent=recurrent, denoiser=denoiser, condition=condition, dropout=0.1
    )
    generator.save_pretrained(tmp_path / "generator")
    files = {CONFIG_FILE, WEIGHTS_FILE, LAYOUT_FILE, CENTRE_FILE, CARD_FILE}
    assert {path.name for path in (tmp_path / "generator").iterdir()} == files
    loaded = Generator.from_pretrained(tmp_path / "generator")
    assert not loaded.training
    assert loaded.config == generator.config
    assert loaded.digest() == generator.digest()
    expected = generator.state_dict()
    assert loaded.state_dict().keys() == expected.keys()
    for name, tensor in loaded.state_dict().items():
        assert tensor.dtype == expected[name].dtype
        assert torch.equal(tensor, expected[name])
    row = torch.tensor(2) if condition == ConditionKind.permutation else torch.ones(loaded.condition.size)
    assert torch.equal(sampled(loaded, row), sampled(generator, row))


def test_learned_positions_begin_as_sinusoids_are_trained_and_saved(
    tmp_path: Path, make_generator: MakeGenerator, make_layout: MakeLayout
) -> None:
    layout = make_layout(16)
    config = make_generator(layout).config
    recurrent = dataclasses.replace(config.recurrent, positions=Positions.learned)
    generator = Generator(dataclasses.replace(config, recurrent=recurrent), layout)
    fixed = Generator(config, layout)
    assert torch.equal(generator.positions, fixed.positions)
    # The gates of a fresh AdaLN MLP let no gradient through.
    for parameter in generator.denoiser.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    (gradient,) = torch.autograd.grad(
        generator.loss(random_batch(layout, tokens=layout.tokens)).sum(), generator.positions
    )
    assert (gradient != 0).any(1).all()
    with torch.no_grad():
        generator.positions.add_(0.1)
    generator.save_pretrained(tmp_path / "generator")
    loaded = Generator.from_pretrained(tmp_path / "generator")
    assert torch.equal(loaded.positions, generator.positions)
    assert loaded.digest() == generator.digest()
    change_weights(tmp_path / "generator", lambda weights: weights.pop("positions"))
    with pytest.raises(RPGError, match="tensor 'positions' is missing"):
        Generator.from_pretrained(tmp_path / "generator")


def test_the_digest_covers_everything_that_determines_the_models(
    make_generator: MakeGenerator, make_layout: MakeLayout
) -> None:
    layout = make_layout(16)
    first = make_generator(layout)
    assert make_generator(layout).digest() == first.digest()
    other_sampling = make_generator(layout)
    other_sampling.config.sampling = SamplingConfig(steps=7)
    assert other_sampling.digest() == first.digest()
    changed = make_generator(layout)
    with torch.no_grad():
        changed.denoiser.get_parameter("output.bias")[0] += 1e-6
    assert changed.digest() != first.digest()
    assert make_generator(make_layout(17)).digest() != first.digest()
    assert make_generator(layout, prediction=Prediction.x0).digest() != first.digest()


@pytest.fixture
def saved(tmp_path: Path, make_generator: MakeGenerator, make_layout: MakeLayout) -> Path:
    make_generator(make_layout(16)).save_pretrained(tmp_path / "generator")
    return tmp_path / "generator"


def change_weights(directory: Path, change: Callable[[dict[str, Tensor]], object]) -> None:
    weights = load_file(directory / WEIGHTS_FILE)
    change(weights)
    save_file(weights, directory / WEIGHTS_FILE)


def change_metadata(directory: Path, change: Callable[[dict[str, str]], object]) -> None:
    with safe_open(directory / WEIGHTS_FILE, "pt") as file:
        metadata = file.metadata()
    change(metadata)
    save_file(load_file(directory / WEIGHTS_FILE), directory / WEIGHTS_FILE, metadata)


def change_config(directory: Path, before: str, after: str) -> None:
    path = directory / CONFIG_FILE
    assert before in path.read_text()
    path.write_text(path.read_text().replace(before, after, 1))


NAME = "denoiser.output.bias"
DEPTHS = {
    "recurrent": [f"  kind: mamba2\n  width: 16\n  depth: {depth}" for depth in (2, 10**7)],
    "denoiser": [f"  kind: adaln_mlp\n  width: 32\n  depth: {depth}" for depth in (2, 10**7)],
}


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda d: (d / LAYOUT_FILE).unlink(), f"{LAYOUT_FILE}: not found"),
        (lambda d: (d / CENTRE_FILE).unlink(), f"{CENTRE_FILE}: not found"),
        (lambda d: (d / CONFIG_FILE).unlink(), f"{CONFIG_FILE}: not found"),
        (lambda d: (d / WEIGHTS_FILE).unlink(), f"{WEIGHTS_FILE}: not found"),
        (lambda d: (d / WEIGHTS_FILE).write_bytes(b""), f"{WEIGHTS_FILE}: not a readable safetensors file"),
        (lambda d: shutil.copy(d / CONFIG_FILE, d / WEIGHTS_FILE), f"{WEIGHTS_FILE}: not a readable"),
        (lambda d: shutil.rmtree(d), "generator: not found"),
        (
            lambda d: change_weights(d, lambda w: w.update({NAME: torch.zeros(5)})),
            rf"{WEIGHTS_FILE}: tensor '{NAME}': expected shape \[16\].*found \[5\]",
        ),
        (
            lambda d: change_weights(d, lambda w: w[NAME].fill_(torch.nan)),
            f"{WEIGHTS_FILE}: tensor '{NAME}' holds NaN",
        ),
        (lambda d: change_weights(d, lambda w: w.pop(NAME)), f"{WEIGHTS_FILE}: tensor '{NAME}' is missing"),
        (
            lambda d: change_weights(d, lambda w: w.update({"more": torch.zeros(5)})),
            f"{WEIGHTS_FILE}: unexpected tensor 'more'",
        ),
        (
            lambda d: change_config(d, "state_size:", "sate_size:"),
            f"{CONFIG_FILE}: unknown key 'recurrent.sate_size'; did you mean 'recurrent.state_size'",
        ),
        (
            lambda d: change_config(d, "size: 3", "size: 0"),
            rf"{CONFIG_FILE}: condition\.size: expected at least 1",
        ),
        (lambda d: change_config(d, "depth: 2", "depth: two"), f"{CONFIG_FILE}: .*depth"),
        (lambda d: change_config(d, "prediction: v", "prediction: w"), f"{CONFIG_FILE}: .*prediction"),
        (
            lambda d: change_config(d, "width: 16", "width: 32"),
            f"{WEIGHTS_FILE}: tensor '.*': expected shape",
        ),
        *(
            (
                lambda d, dtype=dtype: change_weights(d, lambda w: w.update({NAME: w[NAME].to(dtype)})),
                f"{WEIGHTS_FILE}: tensor '{NAME}': expected torch.float32, found {dtype}",
            )
            for dtype in (torch.float8_e4m3fn, torch.complex64, torch.int64, torch.bool)
        ),
        *(
            (
                lambda d, section=section: change_config(
                    d, *(f"{section}:\n{before}" for before in DEPTHS[section])
                ),
                rf"{CONFIG_FILE}: {section}\.depth: expected no more layers than {WEIGHTS_FILE} has tensors",
            )
            for section in ("recurrent", "denoiser")
        ),
        (
            lambda d: change_config(d, "timesteps: 1000", "timesteps: 1000000000000"),
            rf"{CONFIG_FILE}: diffusion\.timesteps: expected at most 1000000, got",
        ),
        (
            lambda d: change_config(d, "token_batch: 256", "token_batch: 1000000000000000"),
            rf"{CONFIG_FILE}: sampling\.token_batch: expected at most 1048576, got",
        ),
        (lambda d: (d / CONFIG_FILE).write_text("- 1\n"), f"{CONFIG_FILE}: expected a mapping"),
        (lambda d: (d / CONFIG_FILE).write_text("a: [\n"), f"{CONFIG_FILE}: not valid YAML"),
    ],
)
def test_damaged_directories_are_refused_in_one_line(
    saved: Path, damage: Callable[[Path], object], message: str
) -> None:
    damage(saved)
    with pytest.raises(RPGError, match=message) as caught:
        Generator.from_pretrained(saved)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("before", "after"),
    [
        ("prediction: v", "prediction: x0"),
        ("schedule: linear", "schedule: cosine"),
        ("timesteps: 1000", "timesteps: 999"),
    ],
)
def test_weights_of_another_configuration_are_refused(saved: Path, before: str, after: str) -> None:
    """Shapes are equal, as after a kill while files behind a URI were replaced one by one."""
    change_config(saved, before, after)
    with pytest.raises(RPGError, match=f"{WEIGHTS_FILE}: was saved with another configuration"):
        Generator.from_pretrained(saved)
    # The metadata of older files has no configuration.
    change_weights(saved, lambda weights: None)
    Generator.from_pretrained(saved)


def test_a_configuration_key_of_a_later_version_is_accepted(saved: Path) -> None:
    def without_a_key(metadata: dict[str, str]) -> None:
        known = json.loads(metadata[CONFIG_KEY])
        del known["denoiser"]["kernel_size"]
        metadata[CONFIG_KEY] = json.dumps(known)

    change_metadata(saved, without_a_key)
    Generator.from_pretrained(saved)
    change_metadata(saved, lambda metadata: metadata.update({CONFIG_KEY: "no JSON"}))
    with pytest.raises(RPGError, match="was saved with another configuration"):
        Generator.from_pretrained(saved)


def test_sampling_settings_may_be_changed_in_a_saved_generator(saved: Path) -> None:
    change_config(saved, "steps: 8", "steps: 3")
    change_config(saved, "solver: dpmpp_2m", "solver: ddim")
    assert Generator.from_pretrained(saved).config.sampling.steps == 3


def test_a_failed_save_leaves_the_earlier_generator(
    saved: Path, make_generator: MakeGenerator, make_layout: MakeLayout, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = {path.name: path.read_bytes() for path in saved.iterdir()}
    other = make_generator(make_layout(17))

    def full(path: Path, text: str) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(saving, "write_text", full)
    with pytest.raises(RPGError, match="generator: cannot be written: No space left on device"):
        other.save_pretrained(saved)
    assert {path.name: path.read_bytes() for path in saved.iterdir()} == before
    assert [path.name for path in saved.parent.iterdir()] == ["generator"]
    monkeypatch.undo()
    other.save_pretrained(saved)
    assert Generator.from_pretrained(saved).digest() == other.digest()


def test_saving_never_replaces_a_directory_with_other_files(
    make_generator: Callable[..., Generator], make_layout: Callable[..., Layout], tmp_path: Path
) -> None:
    (tmp_path / "thesis.txt").write_text("mine")
    with pytest.raises(RPGError, match="holds other files"):
        make_generator(make_layout()).save_pretrained(str(tmp_path))
    assert (tmp_path / "thesis.txt").read_text() == "mine"


@pytest.mark.parametrize("size", [10**14, 2**70])
def test_sizes_beyond_the_memory_are_refused_in_one_line(
    make_generator: Callable[..., Generator], make_layout: Callable[..., Layout], tmp_path: Path, size: int
) -> None:
    directory = tmp_path / "generator"
    make_generator(make_layout()).save_pretrained(directory)
    config = directory / CONFIG_FILE
    config.write_text(re.sub(r"(\n  size: )\d+", rf"\g<1>{size}", config.read_text()))
    with pytest.raises(RPGError, match=r"cannot be built|'condition\.mean': expected shape") as refused:
        Generator.from_pretrained(directory)
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_weights_of_another_floating_point_type_load(saved: Path, dtype: torch.dtype) -> None:
    expected = Generator.from_pretrained(saved).state_dict()[NAME].to(dtype).float()
    change_weights(saved, lambda weights: weights.update({NAME: weights[NAME].to(dtype)}))
    assert torch.equal(Generator.from_pretrained(saved).state_dict()[NAME], expected)


@pytest.mark.parametrize("dtype", [TokenDtype.float16, TokenDtype.bfloat16])
def test_weights_are_stored_as_the_configuration_says(
    make_generator: MakeGenerator, make_layout: MakeLayout, tmp_path: Path, dtype: TokenDtype
) -> None:
    generator = make_generator(make_layout(16))
    whole = generator.digest()
    generator.config.dtype = dtype
    assert generator.digest() == whole, "how weights are stored does not change what they mean"
    generator.save_pretrained(tmp_path / "generator")
    stored = load_file(tmp_path / "generator" / WEIGHTS_FILE)
    loaded = Generator.from_pretrained(tmp_path / "generator")
    for name, tensor in generator.state_dict().items():
        assert stored[name].dtype == (getattr(torch, dtype) if tensor.is_floating_point() else tensor.dtype)
        assert torch.equal(loaded.state_dict()[name], tensor.to(stored[name].dtype).to(tensor.dtype))
    loaded.save_pretrained(tmp_path / "again")
    assert Generator.from_pretrained(tmp_path / "again").digest() == loaded.digest()


def test_weights_beyond_the_dtype_are_refused(
    make_generator: MakeGenerator, make_layout: MakeLayout, tmp_path: Path
) -> None:
    generator = make_generator(make_layout(16))
    generator.config.dtype = TokenDtype.float16
    with torch.no_grad():
        dict(generator.named_parameters())[NAME].fill_(1e6)
    with pytest.raises(RPGError, match=f"tensor '{NAME}' has values that are too large for float16"):
        generator.save_pretrained(tmp_path / "generator")
    assert not (tmp_path / "generator").exists()


@pytest.mark.parametrize("recurrent", list(RecurrentKind))
@pytest.mark.parametrize("denoiser", list(DenoiserKind))
@pytest.mark.parametrize("form", list(ConditionForm))
def test_what_weights_are_expected_is_what_the_networks_have(
    make_layout: MakeLayout, recurrent: RecurrentKind, denoiser: DenoiserKind, form: ConditionForm
) -> None:
    config = GeneratorConfig()
    config.recurrent.kind, config.denoiser.kind, config.condition.form = recurrent, denoiser, form
    config.condition.size, config.condition.states = 10, 0 if form == ConditionForm.gated else 3
    layout = make_layout(16)
    networks = build_networks(config, layout.token_size, layout.tokens)._asdict()
    built = {
        f"{part}.{name}": (tensor.shape, tensor.dtype)
        for part, network in networks.items()
        for name, tensor in network.state_dict().items()
    }
    found = _expected(config, layout, 1000)
    assert {name: (tensor.shape, tensor.dtype) for name, tensor in found.items()} == built
