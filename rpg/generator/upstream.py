"""Generators of the published code: what it saves, as a generator of this library that samples the same.

Source: github.com/NUS-HPC-AI-Lab/Recurrent-Parameter-Generation, whose classes `MambaDiffusion`,
`ClassConditionMambaDiffusion` and `ClassConditionMambaDiffusionFull` save their `state_dict`.
"""

import re
from collections.abc import Mapping

import torch
from torch import Tensor

from rpg.collection.checkpoint import read_checkpoint
from rpg.collection.layout import Layout
from rpg.config import (
    ConditionConfig,
    ConditionForm,
    ConditionKind,
    DenoiserConfig,
    DenoiserKind,
    DiffusionConfig,
    GeneratorConfig,
    Positions,
    Prediction,
    RecurrentConfig,
    RecurrentKind,
    SamplingConfig,
    Schedule,
    Solver,
    validate_generator,
)
from rpg.errors import RPGError
from rpg.generator.embeddings import embedded_positions
from rpg.generator.generator import Generator
from rpg.generator.structure_cache import layout_of, read_structure
from rpg.storage.locations import AnyPath

_LAYER = "model.mamba_forward."
_NET = "criteria.net."
_STATES = "to_permutation_state.weight"
_DDIM_STEPS, _DDIM_ETA = 60, 0.05
"""What the published code samples with, if its preset says DDIM."""
_ENTRIES = {
    ConditionForm.gated: {"mlp.0": "get_condition.0", "mlp.2": "to_condition_linear"},
    ConditionForm.convolutional: {
        "embedding.0": "get_condition.0",
        "embedding.1": "get_condition.1",
        "embedding.2": "to_condition_linear",
        **{f"convolutions.{i}": f"to_condition_conv.{i}" for i in range(3)},
    },
}
"""The modules of a condition here and there."""


def import_upstream(checkpoint: AnyPath, structure: AnyPath, draws_states: bool | None = None) -> Generator:
    """The generator that the published code saved.

    Args:
        checkpoint: the file of its weights, `checkpoint/….pth`.
        structure: the file `structure.cache` of its training set.
        draws_states: whether every generated network gets one of the permutation states. None: without a
            class condition it does, with one it does not, as in the published scripts.

    Returns:
        It in evaluation mode, with the preset's sampler.

    Raises:
        RPGError: naming the file and the key that is missing or does not fit, in one line.
    """
    weights = _Weights(checkpoint)
    token_size = weights.shape(f"{_NET}condi_embedder.weight", 2)[0]
    positions = weights.of("model.pe", 3)[0]
    layout = layout_of(read_structure(structure), token_size, len(positions))
    if layout is None:
        raise RPGError(
            f"{checkpoint}: tensor 'model.pe': expected as many tokens of {token_size} values as the tensors "
            f"of {structure} fill, found {len(positions)}"
        )
    form = _form(weights)
    states = form is None if draws_states is None else draws_states
    config = GeneratorConfig(
        recurrent=_recurrent(weights, layout, positions),
        denoiser=_denoiser(weights),
        condition=_condition(weights, form, states),
        diffusion=_diffusion(weights),
    )
    config.sampling = _sampling(weights, config.diffusion.timesteps)
    try:
        validate_generator(config)
        generator = Generator(config, layout)
    except RPGError as error:
        raise RPGError(f"{checkpoint}: {error}") from error
    values = {}
    for name, tensor in generator.state_dict().items():
        if name == "positions":
            values[name] = positions
        elif name == "condition.embedding.weight":
            values[name] = _embedded_states(weights, tensor.shape, states)
        else:
            values[name] = weights.shaped(_key(config.condition, name), tensor.shape)
    weights.refuse_others()
    generator.load_state_dict(values)
    return generator.eval()


class _Weights:
    """The tensors of a checkpoint, and which of them have been asked for."""

    def __init__(self, path: AnyPath) -> None:
        self.path = path
        self._tensors: Mapping[str, Tensor] = read_checkpoint(path)
        self._used: set[str] = set()

    def __contains__(self, key: str) -> bool:
        return key in self._tensors

    def of(self, key: str, dimensions: int | None = None) -> Tensor:
        """The tensor `key`, which must have so many dimensions."""
        if key not in self._tensors:
            raise RPGError(f"{self.path}: tensor '{key}' is missing; expected what the published code saves")
        self._used.add(key)
        tensor = self._tensors[key]
        if dimensions is not None and (tensor.dim() != dimensions or not tensor.numel()):
            raise RPGError(
                f"{self.path}: tensor '{key}': expected {dimensions} dimensions, found the shape "
                f"{list(tensor.shape)}"
            )
        if not tensor.isfinite().all():
            raise RPGError(f"{self.path}: tensor '{key}' holds NaN or infinite values")
        return tensor

    def shaped(self, key: str, shape: torch.Size) -> Tensor:
        """The tensor `key`, which must have this shape."""
        tensor = self.of(key)
        if tensor.shape != shape:
            raise RPGError(
                f"{self.path}: tensor '{key}': expected shape {list(shape)}, found {list(tensor.shape)}"
            )
        return tensor

    def shape(self, key: str, dimensions: int) -> list[int]:
        """The shape of the tensor `key`, of so many dimensions."""
        return list(self.of(key, dimensions).shape)

    def matching(self, pattern: str) -> list[int]:
        """The numbers in the keys that match a pattern with one group, ascending."""
        found = [re.fullmatch(pattern, key) for key in self._tensors]
        return sorted({int(match[1]) for match in found if match})

    def refuse_others(self) -> None:
        """Refuse a tensor that nothing was made of; copies of the denoiser and of its schedule are known."""
        known = ("criteria.diffusion_trainer.", "criteria.diffusion_sampler.", _STATES)
        for key in self._tensors:
            if key not in self._used and not key.startswith(known):
                raise RPGError(
                    f"{self.path}: unexpected tensor '{key}': not of one of the published code's Mamba models"
                )


def _recurrent(weights: _Weights, layout: Layout, positions: Tensor) -> RecurrentConfig:
    depth = len(weights.matching(rf"{re.escape(_LAYER)}(\d+)\.out_proj\.weight"))
    last = f"{_LAYER}{max(depth - 1, 0)}."
    output_width, inner = weights.shape(f"{last}out_proj.weight", 2)
    channels, _, conv_width = weights.shape(f"{last}conv1d.weight", 3)
    (heads,) = weights.shape(f"{last}A_log", 1)
    width = positions.shape[1]
    if width % 4:
        raise RPGError(f"{weights.path}: tensor 'model.pe': expected a width that 4 divides, found {width}")
    kind = Positions.learned
    for each in (Positions.sinusoid_2d, Positions.sinusoid_1d):
        # float32 angles, as the published code computes them, are off by this much for long tensors.
        if torch.allclose(embedded_positions(each, layout, width), positions, rtol=0, atol=3e-5):
            kind = each
            break
    return RecurrentConfig(
        kind=RecurrentKind.mamba2,
        width=width,
        output_width=0 if output_width == width else output_width,
        positions=kind,
        depth=depth,
        state_size=max((channels - inner) // 2, 1),
        conv_width=conv_width,
        expand=max(inner // output_width, 1),
        head_size=max(inner // heads, 1),
    )


def _denoiser(weights: _Weights) -> DenoiserConfig:
    keys = [
        f"{_NET}{part}.{i}.0.weight"
        for part in ("encoder_list", "decoder_list")
        for i in weights.matching(rf"{re.escape(_NET + part)}\.(\d+)\.0\.weight")
    ] or [f"{_NET}encoder_list.0.0.weight"]
    return DenoiserConfig(
        kind=DenoiserKind.unet,
        channels=[1, *(weights.shape(key, 3)[0] for key in keys)],
        kernel_size=weights.shape(keys[0], 3)[2],
    )


def _form(weights: _Weights) -> ConditionForm | None:
    """How the class condition enters; None if the model has none."""
    if "to_condition_gate" in weights:
        return ConditionForm.gated
    if "get_condition.0.weight" in weights:
        return ConditionForm.convolutional
    return None


def _condition(weights: _Weights, form: ConditionForm | None, draws_states: bool) -> ConditionConfig:
    states = weights.shape(_STATES, 2)[0] if draws_states else 0
    if form is None:
        # Without states there is one, that which the bias alone makes.
        return ConditionConfig(kind=ConditionKind.permutation, size=states or 1)
    hidden, size = weights.shape("get_condition.0.weight", 2)
    config = ConditionConfig(kind=ConditionKind.vector, size=size, states=states, form=form, width=hidden)
    if form == ConditionForm.gated:
        gate = weights.of("to_condition_gate", 3).flatten()
        config.last_tokens = max(int(gate.sum()), 1)
        if not torch.equal(gate, (torch.arange(len(gate)) >= len(gate) - gate.sum()).to(gate.dtype)):
            raise RPGError(
                f"{weights.path}: tensor 'to_condition_gate': expected zeros and, for the last tokens, ones"
            )
    return config


def _diffusion(weights: _Weights) -> DiffusionConfig:
    key = "criteria.diffusion_trainer.beta_t"
    betas = weights.of(key, 1)
    # float32 rounds the preset's decimal numbers.
    start, end = (float(f"{float(beta):.6g}") for beta in (betas[0], betas[-1]))
    if not torch.allclose(betas, torch.linspace(start, end, len(betas)), rtol=1e-4, atol=0):
        raise RPGError(f"{weights.path}: tensor '{key}': expected a linear schedule")
    return DiffusionConfig(
        schedule=Schedule.linear,
        prediction=Prediction.noise,
        timesteps=len(betas),
        beta_start=start,
        beta_end=end,
    )


def _sampling(weights: _Weights, timesteps: int) -> SamplingConfig:
    if "criteria.diffusion_sampler.posterior_variance" in weights:
        return SamplingConfig(solver=Solver.ddpm, steps=timesteps)
    weights.of("criteria.diffusion_sampler.alpha_t_bar", 1)
    return SamplingConfig(solver=Solver.ddim_leading, steps=min(_DDIM_STEPS, timesteps - 1), eta=_DDIM_ETA)


def _key(config: ConditionConfig, name: str) -> str:
    """What the published code calls the generator's tensor `name`."""
    part, _, rest = name.partition(".")
    if part == "recurrent":
        return f"{_LAYER}{rest.removeprefix('layers.')}"
    if part == "denoiser":
        return f"{_NET}{rest}"
    module, _, tensor = rest.rpartition(".")
    if module == "state":
        return _STATES
    return f"{_ENTRIES[config.form][module]}.{tensor}"


def _embedded_states(weights: _Weights, shape: torch.Size, draws_states: bool) -> Tensor:
    """The embeddings of the permutation states [states, width] of a generator without a class condition.

    The published code adds an embedded condition, a linear layer of zeros. Its bias is what is left of it.
    """
    # A condition of several values would have to be asked for.
    weights.shaped("to_condition.weight", torch.Size([shape[1], 1]))
    bias = weights.shaped("to_condition.bias", shape[1:])
    return weights.shaped(_STATES, shape) + bias if draws_states else bias[None]
