"""The published code of arXiv 2501.11587 as plain functions: what it saves, and what it makes of it.

Written from the paper and from what github.com/NUS-HPC-AI-Lab/Recurrent-Parameter-Generation does, in float32
as there; nothing of this library is called. Tensors have the names of its `state_dict`.
"""

import math
import pickle
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

StateDict = dict[str, Tensor]
Structure = dict[str, tuple[Any, ...]]
Noise = Callable[[int], Tensor]
"""The normal values [tokens, token size] of a draw: 0 starts, i is added after step i."""


@dataclass(frozen=True)
class Preset:
    """The part of a published preset that the saved tensors depend on."""

    token_size: int = 64
    d_model: int = 64
    post_d_model: int | None = None
    d_state: int = 16
    layers: int = 2
    channels: tuple[int, ...] = (1, 32, 64, 128, 64, 32, 1)
    sampler: str = "ddpm"
    timesteps: int = 1000
    permutations: int = 5
    condition: str | None = None
    d_condition: int = 24
    classes: int = 10
    trainable_positions: bool = False
    flat: bool = False


UNCONDITIONAL = Preset(timesteps=50)
CLASS = Preset(condition="class", sampler="ddim")
FULL = Preset(condition="full", timesteps=60)
TOKENS_16384 = Preset(
    token_size=128, d_model=96, post_d_model=128, channels=(1, 64, 96, 64, 1), sampler="ddim"
)
"""Its widths are 12,288 and 16,384 in the published presets, and its tokens have 16,384 values."""


# What the networks look like


def networks(count: int = 3) -> list[StateDict]:
    """Training checkpoints: weights over several tokens, a BatchNorm, a number and an unused integer."""
    random = torch.Generator().manual_seed(7)
    shapes = {
        "conv.weight": (9, 3, 3, 3), "norm.weight": (9,), "norm.bias": (9,), "norm.running_mean": (9,),
        "norm.running_var": (9,), "head.weight": (10, 27), "head.bias": (10,), "scale": (1,),
    }  # fmt: skip
    checkpoints = []
    for _ in range(count):
        values = {name: 0.5 * torch.randn(shape, generator=random) for name, shape in shapes.items()}
        values["norm.running_var"] = (0.2 * values["norm.running_var"]).exp()
        ordered = {name: values[name] for name in list(shapes)[:5]}
        ordered["norm.num_batches_tracked"] = torch.tensor(300)
        checkpoints.append(ordered | {name: values[name] for name in list(shapes)[5:]})
    return checkpoints


def structure_of(checkpoints: list[StateDict]) -> Structure:
    """What `get_structure` finds."""
    structure: Structure = {}
    for name, first in checkpoints[0].items():
        values = [checkpoint[name] for checkpoint in checkpoints]
        if "num_batches_tracked" in name or first.numel() == 1 or not first.is_floating_point():
            structure[name] = (first.shape, first, None)
            continue
        before = []
        if "running_var" in name:
            before = [value.mean() * 0.95 for value in values]
            values = [torch.log(value / each + 0.05) for value, each in zip(values, before, strict=True)]
        numbers = [[value.mean() for value in values], [value.std() for value in values]]
        means = [sum(each) / len(each) for each in ([before] if before else []) + numbers]
        structure[name] = (first.shape, *means)
    return structure


def tokens_of(structure: Structure, size: int, flat: bool = False) -> list[int]:
    """How many tokens each tensor has that is not constant; `flat`: all together."""
    counts = [math.prod(entry[0]) for entry in structure.values() if entry[-1] is not None]
    return [-(-count // size) for count in ([sum(counts)] if flat else counts)]


def write_structure(path: Path, structure: Structure) -> None:
    content = {"structure": structure, "checkpoint_list": ["./dataset/x/checkpoint/0001_acc0.9_seed1.pth"]}
    path.write_bytes(pickle.dumps(content))


def postprocess(tokens: Tensor, structure: Structure, flat: bool = False) -> StateDict:
    """Tokens [tokens, size] as a network; `flat`: without padding at the end of tensors."""
    network = {}
    size = tokens.shape[1]
    for name, entry in structure.items():
        if entry[-1] is None:
            network[name] = entry[1]
            continue
        count = math.prod(entry[0])
        used = count if flat else size * -(-count // size)
        values = tokens.flatten()[:count].view(entry[0]) * entry[-1] + entry[-2]
        if "running_var" in name:
            values = torch.clip(torch.exp(values) - 0.05, min=0.001) * entry[1]
        network[name] = values
        tokens = tokens.flatten()[used:]
    return network


# What is saved


def positions_2d(counts: list[int], width: int) -> Tensor:
    """[tokens, width]: token index in the first half, tensor index in the second."""
    half = width // 2
    rows = []
    frequencies = torch.exp(torch.arange(0.0, half, 2) * -(math.log(10000.0) / half))
    for tensor, count in enumerate(counts):
        for token in range(count):
            row = torch.zeros(width)
            for start, index in ((0, token), (half, tensor)):
                row[start : start + half : 2] = torch.sin(index * frequencies)
                row[start + 1 : start + half : 2] = torch.cos(index * frequencies)
            rows.append(row)
    return torch.stack(rows)


def checkpoint_of(preset: Preset, structure: Structure, seed: int = 0) -> StateDict:
    """A `state_dict` as the published code saves it, with random weights."""
    random = torch.Generator().manual_seed(seed)
    saved: StateDict = {}

    def normal(name: str, *shape: int, scale: float | None = None, around: float = 0.0) -> None:
        spread = shape[-1] ** -0.5 if scale is None else scale
        saved[name] = around + spread * torch.randn(shape, generator=random)

    def linear(name: str, outputs: int, inputs: int) -> None:
        normal(f"{name}.weight", outputs, inputs)
        normal(f"{name}.bias", outputs, scale=0.1)

    counts = tokens_of(structure, preset.token_size, preset.flat)
    length, width = sum(counts), preset.d_model
    last_width = preset.post_d_model or width
    linear("criteria.net.time_embedder.mlp.0", preset.token_size, 256)
    linear("criteria.net.time_embedder.mlp.2", preset.token_size, preset.token_size)
    saved["criteria.net.time_embedder.freqs"] = torch.exp(-math.log(10000) * torch.arange(0, 128) / 128)
    linear("criteria.net.condi_embedder", preset.token_size, last_width)
    encoder = len(preset.channels) // 2 + 1
    for i, (before, after) in enumerate(zip(preset.channels, preset.channels[1:], strict=False)):
        name = f"criteria.net.encoder_list.{i}"
        if i >= encoder:
            name = f"criteria.net.decoder_list.{i - encoder}"
        normal(f"{name}.0.weight", after, before, 7, scale=(7 * before) ** -0.5)
        normal(f"{name}.0.bias", after, scale=0.1)
        if after != 1:
            normal(f"{name}.1.0.weight", after, scale=0.1, around=1.0)
            normal(f"{name}.1.0.bias", after, scale=0.1)
            normal(f"{name}.1.0.running_mean", after, scale=0.1)
            normal(f"{name}.1.0.running_var", after, scale=0.05, around=1.0)
            saved[f"{name}.1.0.num_batches_tracked"] = torch.tensor(77)
    # A trained network answers about its input where noise is most of it. Without that samples would grow.
    first, last = "criteria.net.encoder_list.0.0.weight", f"{name}.0.weight"
    saved["criteria.net.condi_embedder.weight"] *= 0.3
    saved["criteria.net.time_embedder.mlp.2.weight"] *= 0.1
    saved["criteria.net.time_embedder.mlp.2.bias"] += 1.0
    saved[last] *= 0.3
    for channel, sign in ((0, 1.0), (1, -1.0)):
        saved[first][channel, 0, 3] += sign
        saved[last][0, channel, 3] += 0.6 * sign
    net = {name: value for name, value in saved.items() if name.startswith("criteria.net.")}
    for part in ("diffusion_trainer", "diffusion_sampler"):
        saved |= {name.replace("net", f"{part}.model", 1): value for name, value in net.items()}
    beta = torch.linspace(0.0001, 0.02, preset.timesteps)
    bar = torch.cumprod(1.0 - beta, dim=0)
    trainer, sampler = "criteria.diffusion_trainer.", "criteria.diffusion_sampler."
    saved |= {f"{trainer}beta_t": beta, f"{trainer}signal_rate": bar.sqrt()}
    saved[f"{trainer}noise_rate"] = (1.0 - bar).sqrt()
    if preset.sampler == "ddim":
        saved[f"{sampler}alpha_t_bar"] = bar
    else:
        first = torch.sqrt(1.0 / (1.0 - beta))
        before_bar = F.pad(bar[:-1], (1, 0), value=1.0)
        saved |= {f"{sampler}beta_t": beta, f"{sampler}coeff_1": first}
        saved[f"{sampler}coeff_2"] = first * beta / torch.sqrt(1.0 - bar)
        saved[f"{sampler}posterior_variance"] = beta * (1.0 - before_bar) / (1.0 - bar)
    normal("to_permutation_state.weight", preset.permutations, width, scale=0.3)
    if preset.condition is None:
        linear("to_condition", width, 1)
    else:
        linear("get_condition.0", preset.d_condition, preset.classes)
        linear("to_condition_linear", width, preset.d_condition)
    if preset.condition == "class":
        saved["to_condition_gate"] = torch.zeros(1, length, 1)
        saved["to_condition_gate"][:, -8:] = 1.0
    if preset.condition == "full":
        normal("get_condition.1.weight", preset.d_condition, scale=0.1, around=1.0)
        normal("get_condition.1.bias", preset.d_condition, scale=0.1)
        normal("to_condition_conv.0.weight", length, 1, 9)
        normal("to_condition_conv.0.bias", length, scale=0.1)
        normal("to_condition_conv.1.weight", length, scale=0.1, around=1.0)
        normal("to_condition_conv.1.bias", length, scale=0.1)
        normal("to_condition_conv.2.weight", length, length, 9, scale=0.1)
        normal("to_condition_conv.2.bias", length, scale=0.1)
    for i in range(preset.layers):
        name = f"model.mamba_forward.{i}"
        outputs = last_width if i + 1 == preset.layers else width
        inner, heads, channels = 2 * outputs, 2 * outputs // 64, 2 * outputs + 2 * preset.d_state
        normal(f"{name}.in_proj.weight", inner + channels + heads, width)
        normal(f"{name}.conv1d.weight", channels, 1, 4)
        normal(f"{name}.conv1d.bias", channels, scale=0.1)
        normal(f"{name}.dt_bias", heads, scale=0.5, around=-2.0)
        normal(f"{name}.A_log", heads, scale=0.5, around=1.0)
        normal(f"{name}.D", heads, scale=0.1, around=1.0)
        normal(f"{name}.norm.weight", inner, scale=0.1, around=1.0)
        normal(f"{name}.out_proj.weight", outputs, inner)
    saved["model.pe"] = positions_2d(counts, width)[None]
    if preset.flat:
        # Its positions are 1-D: the first half of the 2-D ones of a single tensor and twice the width.
        saved["model.pe"] = positions_2d(counts, 2 * width)[None, :, :width]
    if preset.trainable_positions:
        saved["model.pe"] = saved["model.pe"] + 0.1 * torch.randn(1, length, width, generator=random)
    return saved


# What is made of it


def _linear(saved: Mapping[str, Tensor], name: str, x: Tensor) -> Tensor:
    return x @ saved[f"{name}.weight"].T + saved[f"{name}.bias"]


def _silu(x: Tensor) -> Tensor:
    return x * torch.sigmoid(x)


def embedded_condition(saved: StateDict, condition: Tensor | None, state: int | None) -> Tensor:
    """[1 or tokens, d_model]: what is added to the positions."""
    if condition is None:
        embedded = saved["to_condition.bias"][None]
    elif "to_condition_gate" in saved:
        hidden = _silu(_linear(saved, "get_condition.0", condition))
        embedded = _linear(saved, "to_condition_linear", hidden) * saved["to_condition_gate"][0]
    else:
        hidden = _linear(saved, "get_condition.0", condition)
        hidden = (hidden - hidden.mean()) / torch.sqrt(hidden.var(correction=0) + 1e-5)
        hidden = hidden * saved["get_condition.1.weight"] + saved["get_condition.1.bias"]
        wide = _linear(saved, "to_condition_linear", hidden)[None, None]
        name = "to_condition_conv"
        first = F.conv1d(wide, saved[f"{name}.0.weight"], saved[f"{name}.0.bias"], padding=4)[0]
        first = (first - first.mean()) / torch.sqrt(first.var(correction=0) + 1e-5)
        first = first * saved[f"{name}.1.weight"][:, None] + saved[f"{name}.1.bias"][:, None]
        embedded = F.conv1d(first[None], saved[f"{name}.2.weight"], saved[f"{name}.2.bias"], padding=4)[0]
    return embedded if state is None else embedded + saved["to_permutation_state.weight"][state]


def mamba2(saved: StateDict, name: str, u: Tensor) -> Tensor:
    """One layer, [L, width in] to [L, width out], an element at a time."""
    inner = saved[f"{name}.norm.weight"].numel()
    heads = saved[f"{name}.A_log"].numel()
    states = (saved[f"{name}.conv1d.bias"].numel() - inner) // 2
    z, xbc, dt = torch.split(u @ saved[f"{name}.in_proj.weight"].T, [inner, inner + 2 * states, heads], 1)
    weight = saved[f"{name}.conv1d.weight"][:, 0]
    padded = torch.cat([torch.zeros(3, xbc.shape[1]), xbc])
    xbc = _silu(
        torch.stack([(padded[i : i + 4].T * weight).sum(1) for i in range(len(u))])
        + saved[f"{name}.conv1d.bias"]
    )
    dt = torch.log1p(torch.exp(dt + saved[f"{name}.dt_bias"]))
    decay = torch.exp(-dt * torch.exp(saved[f"{name}.A_log"]))
    h = torch.zeros(heads, inner // heads, states)
    rows = []
    for i in range(len(u)):
        x, b, c = torch.split(xbc[i], [inner, states, states])
        x = x.view(heads, -1)
        h = decay[i, :, None, None] * h + dt[i, :, None, None] * x[:, :, None] * b
        rows.append((h @ c + saved[f"{name}.D"][:, None] * x).flatten())
    gated = torch.stack(rows) * _silu(z)
    normed = gated / torch.sqrt((gated**2).mean(1, keepdim=True) + 1e-5) * saved[f"{name}.norm.weight"]
    return normed @ saved[f"{name}.out_proj.weight"].T


def prototypes(saved: StateDict, condition: Tensor | None, state: int | None) -> Tensor:
    """[tokens, d_model or post_d_model]."""
    x = saved["model.pe"][0] + embedded_condition(saved, condition, state)
    layer = 0
    while f"model.mamba_forward.{layer}.D" in saved:
        x = mamba2(saved, f"model.mamba_forward.{layer}", x)
        layer += 1
    return x


def predicted_noise(saved: StateDict, x: Tensor, t: int, c: Tensor) -> Tensor:
    """The U-Net's answer for tokens and prototypes, a row each."""
    net = "criteria.net."
    angles = t * saved[f"{net}time_embedder.freqs"]
    features = torch.cat([torch.cos(angles), torch.sin(angles)])
    hidden = _silu(_linear(saved, f"{net}time_embedder.mlp.0", features))
    time = _linear(saved, f"{net}time_embedder.mlp.2", hidden)
    c = _linear(saved, f"{net}condi_embedder", c)[:, None]
    parts = [f"{part}.{i}" for part in ("encoder_list", "decoder_list") for i in range(9)]
    names = [f"{net}{part}" for part in parts if f"{net}{part}.0.weight" in saved]
    encoder = sum("encoder" in name for name in names)
    x, kept = x[:, None], []
    for i, name in enumerate(names):
        if i >= encoder:
            x = x + kept.pop()
        x = F.conv1d((x + c) * time, saved[f"{name}.0.weight"], saved[f"{name}.0.bias"], padding=3)
        if f"{name}.1.0.weight" in saved:
            mean, variance = saved[f"{name}.1.0.running_mean"], saved[f"{name}.1.0.running_var"]
            x = (x - mean[:, None]) / torch.sqrt(variance[:, None] + 1e-5)
            x = F.elu(x * saved[f"{name}.1.0.weight"][:, None] + saved[f"{name}.1.0.bias"][:, None])
        if i < encoder - 2:
            kept.append(x)
    return x[:, 0]


def sample(
    saved: StateDict, noise: Noise, condition: Tensor | None = None, state: int | None = None
) -> Tensor:
    """The tokens [tokens, token size] of one network."""
    c = prototypes(saved, condition, state)
    x = noise(0)
    bar = saved.get("criteria.diffusion_sampler.alpha_t_bar")
    if bar is None:
        first, second, variance = (
            saved[f"criteria.diffusion_sampler.{name}"]
            for name in ("coeff_1", "coeff_2", "posterior_variance")
        )
        for draw, t in enumerate(reversed(range(len(first))), start=1):
            x = first[t] * x - second[t] * predicted_noise(saved, x, t, c)
            x = x + torch.sqrt(variance[t]) * noise(draw) if t > 0 else x
        return x
    steps, eta = 60, 0.05
    times = [t + 1 for t in range(0, len(bar), len(bar) // steps)]
    for draw, i in enumerate(reversed(range(steps)), start=1):
        now, after = bar[times[i]], bar[times[i - 1] if i else 0]
        sigma = eta * torch.sqrt((1 - after) / (1 - now) * (1 - now / after))
        along = torch.sqrt(1 - after - sigma**2) - torch.sqrt(after * (1 - now) / now)
        x = torch.sqrt(after / now) * x + along * predicted_noise(saved, x, times[i], c)
        x = x + sigma * noise(draw)
    return x
