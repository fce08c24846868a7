"""Mamba-2 in plain PyTorch: the layer (`Mamba2`) and the published stack of layers (`Mamba2Stack`).

The layer has the parameters of `mamba_ssm.Mamba2`, so that upstream checkpoints load, but needs neither a GPU
nor a compiled kernel. Its sequence is scanned in chunks (state-space duality, arXiv 2405.21060, section 6):
quadratic products within a chunk, a recurrent state between chunks. On a GPU, training uses mamba_ssm's own
kernels where they are installed.
"""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from rpg.errors import RPGError
from rpg.generator.recurrent.elements import elements_at
from rpg.generator.recurrent.mamba_kernels import fused_kernel


class Mamba2State(NamedTuple):
    """What a layer remembers of the sequence so far."""

    conv: Tensor
    """[B, d_conv - 1, channels]: the convolution's last inputs."""
    ssm: Tensor
    """[B, ngroups, d_state, heads per group * headdim]: the state-space model's state, at least float32."""


class GatedRMSNorm(nn.Module):
    """RMSNorm(x · silu(gate)) · weight over groups of channels: mamba_ssm's `norm_before_gate=False`."""

    def __init__(self, width: int, groups: int = 1, eps: float = 1e-5) -> None:
        super().__init__()
        self.groups = groups
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(width))

    def forward(self, x: Tensor, gate: Tensor) -> Tensor:
        """Both [..., width] -> [..., width], at least float32."""
        accurate = _accurate(x)
        gated = torch.unflatten(x.to(accurate) * F.silu(gate.to(accurate)), -1, (self.groups, -1))
        return F.rms_norm(gated, gated.shape[-1:], eps=self.eps).flatten(-2) * self.weight


class Mamba2(nn.Module):
    """One Mamba-2 layer (arXiv 2405.21060, section 7), without residual connection.

    Names, shapes and initial values of the parameters are those of `mamba_ssm.Mamba2`; so are the arguments'
    names. The result does not depend on `chunk_size`, only speed and memory do: memory grows with
    sequence · chunk_size. On a CPU 64 was fastest for sequences of 10 to 1,000. `input_width` is for a layer
    whose input is not of its own width, `d_model`.

    Raises:
        RPGError: if `headdim` does not divide expand · d_model, or `ngroups` the number of heads.
    """

    def __init__(
        self,
        d_model: int,
        d_state: int = 128,
        d_conv: int = 4,
        expand: int = 2,
        headdim: int = 64,
        ngroups: int = 1,
        chunk_size: int = 64,
        input_width: int | None = None,
    ) -> None:
        super().__init__()
        self.d_inner = expand * d_model
        self.d_state = d_state
        self.d_conv = d_conv
        self.headdim = headdim
        self.ngroups = ngroups
        self.chunk_size = chunk_size
        if self.d_inner % headdim:
            raise RPGError(
                f"Mamba2: headdim: expected a divisor of expand * d_model = {self.d_inner}, got {headdim}"
            )
        self.nheads = self.d_inner // headdim
        if self.nheads % ngroups:
            raise RPGError(f"Mamba2: ngroups: expected a divisor of {self.nheads} heads, got {ngroups}")
        self.conv_channels = self.d_inner + 2 * ngroups * d_state
        projected = self.d_inner + self.conv_channels + self.nheads
        self.in_proj = nn.Linear(input_width or d_model, projected, bias=False)
        self.conv1d = nn.Conv1d(self.conv_channels, self.conv_channels, d_conv, groups=self.conv_channels)
        step = torch.empty(self.nheads).uniform_(math.log(1e-3), math.log(1e-1)).exp()
        self.dt_bias = nn.Parameter(step.expm1().log())  # the inverse of softplus: the layer starts at `step`
        self.A_log = nn.Parameter(torch.empty(self.nheads).uniform_(1, 16).log())
        self.D = nn.Parameter(torch.ones(self.nheads))
        self.norm = GatedRMSNorm(self.d_inner, ngroups)
        self.out_proj = nn.Linear(self.d_inner, d_model, bias=False)

    def forward(
        self,
        u: Tensor,
        state: Mamba2State | None = None,
        keep_state: bool = True,
        at: Tensor | None = None,
    ) -> tuple[Tensor, Mamba2State | None]:
        """Scan a sequence, or its continuation.

        Args:
            u: [B, L, d_model or input_width], L at least 1.
            state: what the call for the previous piece returned; None at the start of a sequence.
            keep_state: False saves the time and memory of the final state, B · d_state · expand · d_model
                values, which is more than the activations of a short sequence.
            at: int64 [B, K], the elements whose outputs are wanted; None: all. The output product is computed
                for these elements only.

        Returns:
            [B, L or K, d_model] in u's dtype (autocast's under autocast), and the state after the last
            element, or None without `keep_state`.
        """
        projected = autocast_linear(self.in_proj, u)
        a = -self.A_log.to(_accurate(projected)).exp()
        kernel = fused_kernel() if self._kernel_serves(projected, state) else None
        if kernel is not None:
            return self._forward_kernel(kernel, projected, a, keep_state, at)
        gate, inputs, dt = torch.split(projected, [self.d_inner, self.conv_channels, self.nheads], dim=-1)
        inputs, conv_state = self._convolve(inputs, None if state is None else state.conv)
        group_states = self.ngroups * self.d_state
        x, b, c = torch.split(F.silu(inputs), [self.d_inner, group_states, group_states], dim=-1)
        dt = F.softplus(dt.to(a.dtype) + self.dt_bias)
        y, ssm_state = scan(
            torch.unflatten(x, -1, (self.nheads, self.headdim)),
            dt,
            a,
            torch.unflatten(b, -1, (self.ngroups, self.d_state)),
            torch.unflatten(c, -1, (self.ngroups, self.d_state)),
            self.chunk_size,
            None if state is None else state.ssm,
            keep_state,
        )
        y = y + x * self.D.repeat_interleave(self.headdim).to(x.dtype)
        normed = self.norm(elements_at(y, at), elements_at(gate, at)).to(gate.dtype)
        out = autocast_linear(self.out_proj, normed)
        return out, None if ssm_state is None else Mamba2State(conv_state, ssm_state)

    def _convolve(self, inputs: Tensor, before: Tensor | None) -> tuple[Tensor, Tensor]:
        """Causal depthwise convolution of [B, L, C], and the inputs that the next call needs."""
        if before is None:
            extended = F.pad(inputs, (0, 0, self.d_conv - 1, 0))
        else:
            extended = torch.cat([before.to(inputs.dtype), inputs], dim=1)
        # A 2-D convolution of height 1 reads [B, L, C] as it lies in memory (channels last). On a CPU it
        # takes a third of the time of conv1d, which rearranges its input and output.
        image = extended.transpose(1, 2).unsqueeze(2)
        out = F.conv2d(image, self.conv1d.weight.unsqueeze(2), self.conv1d.bias, groups=self.conv_channels)
        return out.squeeze(2).transpose(1, 2), extended[:, inputs.shape[1] :].clone()

    def _kernel_serves(self, projected: Tensor, state: Mamba2State | None) -> bool:
        # Generation does without the kernels: importing and compiling them takes a fresh process longer than
        # the prototypes of a job take. Older causal_conv1d kernels refuse rows that are not a multiple of
        # eight values.
        fits = projected.dtype != torch.float64 and projected.shape[-1] % 8 == 0
        return projected.is_cuda and fits and state is None and torch.is_grad_enabled()

    def _forward_kernel(
        self, kernel: Callable[..., Any], projected: Tensor, a: Tensor, keep_state: bool, at: Tensor | None
    ) -> tuple[Tensor, Mamba2State | None]:
        result = kernel(
            projected,
            self.conv1d.weight.squeeze(1),
            self.conv1d.bias,
            self.dt_bias,
            a,
            D=self.D,
            chunk_size=256,
            return_final_states=keep_state,
            activation="silu",
            rmsnorm_weight=self.norm.weight,
            rmsnorm_eps=self.norm.eps,
            outproj_weight=self.out_proj.weight if at is None else None,
            headdim=self.headdim,
            ngroups=self.ngroups,
            norm_before_gate=False,
        )
        out, ssm_state = result if keep_state else (result, None)
        if at is not None:
            out = autocast_linear(self.out_proj, elements_at(out, at))
        if ssm_state is None:
            return out, None
        inputs = projected[..., self.d_inner : self.d_inner + self.conv_channels]
        kept = self.d_conv - 1
        last = inputs[:, max(inputs.shape[1] - kept, 0) :]
        conv_state = F.pad(last, (0, 0, kept - last.shape[1], 0))
        grouped = torch.unflatten(ssm_state, 1, (self.ngroups, -1)).permute(0, 1, 4, 2, 3).flatten(3)
        return out, Mamba2State(conv_state, grouped)


class Mamba2Stack(nn.Module):
    """The published recurrent network: Mamba-2 layers one after the other, no residual connections, no norms.

    Source: the published code of arXiv 2501.11587, an `nn.Sequential` of `mamba_ssm.Mamba2`; its names behind
    the prefix are these behind `layers.`: `0.in_proj.weight` and so on. As in its presets with tokens of
    16,384 values, the last layer may have a width of its own, `output_width`.
    """

    def __init__(
        self,
        width: int,
        depth: int,
        d_state: int,
        d_conv: int,
        expand: int,
        headdim: int,
        output_width: int | None = None,
    ) -> None:
        super().__init__()
        widths = [width] * (depth - 1) + [output_width or width]
        self.layers = nn.ModuleList(
            Mamba2(each, d_state, d_conv, expand, headdim, input_width=width) for each in widths
        )

    def forward(
        self,
        x: Tensor,
        state: tuple[Mamba2State, ...] | None = None,
        keep_state: bool = True,
        at: Tensor | None = None,
    ) -> tuple[Tensor, tuple[Mamba2State, ...] | None]:
        """[B, L, width] -> [B, L or K, output_width], one state a layer or None without `keep_state`."""
        states = []
        for index, layer in enumerate(self.layers):
            last = index + 1 == len(self.layers)
            x, after = layer(x, None if state is None else state[index], keep_state, at if last else None)
            states.append(after)
        return x, tuple(states) if keep_state else None


def scan(
    x: Tensor,
    dt: Tensor,
    a: Tensor,
    b: Tensor,
    c: Tensor,
    chunk_size: int,
    state: Tensor | None = None,
    keep_state: bool = True,
) -> tuple[Tensor, Tensor | None]:
    """The selective state-space model h_t = exp(dt_t · a) h_{t-1} + dt_t · b_t x_t, y_t = c_t h_t, in chunks.

    Source: arXiv 2405.21060, section 6 (block decomposition). Chunks run one after the other, so that memory
    without gradients is that of one chunk.

    Args:
        x: [B, L, heads, P], the inputs.
        dt: [B, L, heads], step sizes, positive, at least float32.
        a: [heads], negative, at least float32.
        b: [B, L, G, N], input projections, each shared by heads / G consecutive heads.
        c: [B, L, G, N], output projections.
        chunk_size: elements handled by one quadratic product.
        state: [B, G, N, heads / G * P], h before the first element; None is zero.
        keep_state: whether h after the last element is wanted.

    Returns:
        y, [B, L, heads * P] in x's dtype (autocast's under autocast), and h after the last element, at least
        float32, or None.
    """
    groups = b.shape[2]
    x, dt, log_decay = (torch.unflatten(values, 2, (groups, -1)) for values in (x, dt, dt * a))
    pieces = [torch.split(values, chunk_size, dim=1) for values in (x, dt, log_decay, b, c)]
    outputs = []
    last = len(pieces[0]) - 1
    for index, (x, dt, log_decay, b, c) in enumerate(zip(*pieces, strict=True)):
        y, state = _scan_chunk(x, dt, log_decay, b, c, state, keep_state or index < last)
        outputs.append(y)
    return outputs[0] if last == 0 else torch.cat(outputs, dim=1), state


def _scan_chunk(
    x: Tensor, dt: Tensor, log_decay: Tensor, b: Tensor, c: Tensor, state: Tensor | None, keep_state: bool
) -> tuple[Tensor, Tensor | None]:
    """Scan one chunk: x [B, Q, G, R, P], dt and log_decay [B, Q, G, R], b and c [B, Q, G, N]."""
    length, per_value = x.shape[1], x.shape[-1]
    total = log_decay.cumsum(dim=1)
    b, c = b.transpose(1, 2), c.transpose(1, 2)
    # weights[i, j] = exp(log decay from j to i) · dt_j · (c_i · b_j) for j <= i. The exponent is a
    # difference, never a quotient of exponentials: those overflow for a long chunk or a large step.
    by_head = total.permute(0, 2, 3, 1)
    future = torch.ones(length, length, dtype=torch.bool, device=x.device).triu(1)
    between = (by_head[..., :, None] - by_head[..., None, :]).masked_fill(future, -math.inf)
    weights = between.exp() * (c @ b.transpose(2, 3)).unsqueeze(2) * dt.permute(0, 2, 3, 1).unsqueeze(3)
    y = (weights.to(x.dtype) @ x.permute(0, 2, 3, 1, 4)).permute(0, 3, 1, 2, 4).flatten(2)
    if state is not None:
        carried = torch.unflatten((c @ state.to(c.dtype)).transpose(1, 2), 3, (-1, per_value))
        y = y + (carried * total.exp().to(c.dtype).unsqueeze(-1)).flatten(2)
    if not keep_state:
        return y, None
    to_end = (total[:, -1:] - total).exp() * dt
    weighted = (x * to_end.to(x.dtype).unsqueeze(-1)).transpose(1, 2).flatten(3)
    after = (b.transpose(2, 3) @ weighted).to(dt.dtype)
    if state is not None:
        after = after + state * total[:, -1].exp().repeat_interleave(per_value, dim=-1).unsqueeze(2)
    return y, after


def _accurate(values: Tensor) -> torch.dtype:
    """The dtype for decays: half precision would lose the difference of two long sums."""
    return torch.promote_types(values.dtype, torch.float32)


def autocast_linear(layer: nn.Linear, x: Tensor) -> Tensor:
    """`layer(x)` for a layer without bias and hooks, with less memory under autocast.

    For the backward pass autograd keeps what a product was made of. If a layer is large against its batch,
    that is above all its weight rounded to half precision. Here the float32 weight is kept instead, which is
    there anyway, and rounded once more in the backward pass.
    """
    assert layer.bias is None
    kind = x.device.type
    rounds = torch.is_autocast_enabled(kind) and x.dtype != torch.float64
    if not (rounds and torch.is_grad_enabled()):
        return F.linear(x, layer.weight)
    out: Tensor = _RoundedWeight.apply(  # type: ignore[no-untyped-call]
        x, layer.weight, torch.get_autocast_dtype(kind)
    )
    return out


class _RoundedWeight(torch.autograd.Function):
    """A product with a weight rounded to `dtype`, which is rounded again for the gradient."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, dtype: torch.dtype) -> Tensor:
        ctx.x_dtype = x.dtype
        x = x.to(dtype)
        ctx.save_for_backward(x, weight)
        return F.linear(x, weight.to(dtype))

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        (gradient,) = gradients
        x, weight = ctx.saved_tensors
        by_x = (gradient @ weight.to(gradient.dtype)).to(ctx.x_dtype) if ctx.needs_input_grad[0] else None
        by_weight = None
        if ctx.needs_input_grad[1]:
            rows = gradient.reshape(-1, gradient.shape[-1])
            by_weight = (rows.T @ x.reshape(-1, x.shape[-1])).to(weight.dtype)
        return by_x, by_weight, None
