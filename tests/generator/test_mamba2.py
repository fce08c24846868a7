"""Mamba-2 against the recurrence that defines it, written step by step in float64."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from rpg.errors import RPGError
from rpg.generator.recurrent.mamba2 import Mamba2, Mamba2Stack, Mamba2State, scan


def recurrence(x: Tensor, dt: Tensor, a: Tensor, b: Tensor, c: Tensor) -> tuple[Tensor, Tensor]:
    """h_t = exp(dt A) h_{t-1} + dt B x_t and y_t = C h_t, head by head; h is [B, heads, P, N]."""
    batch, length, heads, values = x.shape
    share = heads // b.shape[2]
    h = torch.zeros(batch, heads, values, b.shape[-1], dtype=x.dtype)
    outputs = []
    for t in range(length):
        columns = []
        after = []
        for head in range(heads):
            decay = torch.exp(dt[:, t, head] * a[head])[:, None, None]
            into = dt[:, t, head, None, None] * x[:, t, head, :, None] * b[:, t, head // share, None, :]
            state = decay * h[:, head] + into
            after.append(state)
            columns.append((state * c[:, t, head // share, None, :]).sum(-1))
        h = torch.stack(after, dim=1)
        outputs.append(torch.cat(columns, dim=-1))
    return torch.stack(outputs, dim=1), h


def direct(layer: Mamba2, u: Tensor) -> Tensor:
    """The whole layer, one element at a time, from the published description."""
    inner, states = layer.d_inner, layer.ngroups * layer.d_state
    projected = u @ layer.in_proj.weight.T
    z, xbc, dt = torch.split(projected, [inner, inner + 2 * states, layer.nheads], dim=-1)
    weight, bias = layer.conv1d.weight[:, 0], layer.conv1d.bias
    assert bias is not None
    convolved = torch.zeros_like(xbc)
    for t in range(u.shape[1]):
        for k in range(layer.d_conv):
            if t - k >= 0:
                convolved[:, t] = convolved[:, t] + xbc[:, t - k] * weight[:, layer.d_conv - 1 - k]
    xbc = convolved + bias
    xbc = xbc * torch.sigmoid(xbc)
    x = torch.unflatten(xbc[..., :inner], -1, (layer.nheads, layer.headdim))
    b = torch.unflatten(xbc[..., inner : inner + states], -1, (layer.ngroups, layer.d_state))
    c = torch.unflatten(xbc[..., inner + states :], -1, (layer.ngroups, layer.d_state))
    dt = torch.log1p(torch.exp(dt + layer.dt_bias))
    y, _ = recurrence(x, dt, -torch.exp(layer.A_log), b, c)
    y = (torch.unflatten(y, -1, (layer.nheads, -1)) + layer.D[:, None] * x).flatten(-2)
    gated = torch.unflatten(y * z * torch.sigmoid(z), -1, (layer.ngroups, -1))
    normed = gated / torch.sqrt(gated.square().mean(-1, keepdim=True) + 1e-5)
    result: Tensor = (normed.flatten(-2) * layer.norm.weight) @ layer.out_proj.weight.T
    return result


def scan_inputs(
    batch: int, length: int, heads: int, groups: int, values: int = 3, states: int = 5, seed: int = 0
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    draw = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=draw, dtype=torch.float64)

    return (
        normal(batch, length, heads, values),
        normal(batch, length, heads).exp(),
        -normal(heads).exp(),
        normal(batch, length, groups, states),
        normal(batch, length, groups, states),
    )


@settings(deadline=None, max_examples=40)
@given(
    length=st.integers(1, 20),
    chunk=st.integers(1, 24),
    heads_per_group=st.integers(1, 3),
    groups=st.integers(1, 2),
    seed=st.integers(0, 1000),
)
def test_scan_equals_recurrence(
    length: int, chunk: int, heads_per_group: int, groups: int, seed: int
) -> None:
    inputs = scan_inputs(2, length, heads_per_group * groups, groups, seed=seed)
    expected, h = recurrence(*inputs)
    y, state = scan(*inputs, chunk)
    torch.testing.assert_close(y, expected)
    assert state is not None
    by_head = torch.unflatten(h, 1, (groups, -1)).permute(0, 1, 4, 2, 3).flatten(3)
    torch.testing.assert_close(state, by_head)


def test_scan_gradients_equal_those_of_the_recurrence() -> None:
    inputs = scan_inputs(2, 11, 4, 2)
    weights = torch.randn(2, 11, 12, dtype=torch.float64)
    for values in inputs:
        values.requires_grad_()
    expected = torch.autograd.grad((recurrence(*inputs)[0] * weights).sum(), inputs)
    actual = torch.autograd.grad((scan(*inputs, 4)[0] * weights).sum(), inputs)
    for one, other in zip(actual, expected, strict=True):
        torch.testing.assert_close(one, other)


def test_scan_gradcheck_with_state() -> None:
    x, dt, a, b, c = scan_inputs(1, 5, 2, 1, values=2, states=2)
    state = torch.randn(1, 1, 2, 4, dtype=torch.float64)
    inputs = [values.requires_grad_() for values in (x, dt, a, b, c, state)]

    def both(x: Tensor, dt: Tensor, a: Tensor, b: Tensor, c: Tensor, h: Tensor) -> tuple[Tensor, Tensor]:
        y, after = scan(x, dt, a, b, c, 3, h)
        assert after is not None
        return y, after

    assert torch.autograd.gradcheck(both, inputs)


def test_scan_survives_steps_that_overflow_naive_decays() -> None:
    x, dt, a, b, c = scan_inputs(1, 12, 2, 1)
    dt = (dt + 100).requires_grad_()
    y, _ = scan(x.float(), dt.float(), a.float() * 16, b.float(), c.float(), 64)
    torch.autograd.backward(y.sum())
    assert y.isfinite().all()
    assert dt.grad is not None
    assert dt.grad.isfinite().all()


@pytest.mark.parametrize(("length", "chunk", "groups"), [(1, 64, 1), (9, 4, 1), (12, 4, 2), (7, 64, 2)])
def test_layer_equals_step_by_step_layer(length: int, chunk: int, groups: int) -> None:
    torch.manual_seed(0)
    layer = Mamba2(8, d_state=6, d_conv=4, expand=2, headdim=4, ngroups=groups, chunk_size=chunk).double()
    torch.nn.init.normal_(layer.norm.weight)
    torch.nn.init.normal_(layer.D)
    u = torch.randn(2, length, 8, dtype=torch.float64, requires_grad=True)
    expected, (actual, _) = direct(layer, u), layer(u)
    torch.testing.assert_close(actual, expected)
    weights = torch.randn_like(expected)
    wanted = [u, *layer.parameters()]
    for one, other in zip(
        torch.autograd.grad((actual * weights).sum(), wanted),
        torch.autograd.grad((expected * weights).sum(), wanted),
        strict=True,
    ):
        torch.testing.assert_close(one, other)


def test_layer_gradcheck() -> None:
    torch.manual_seed(0)
    layer = Mamba2(4, d_state=2, d_conv=3, expand=2, headdim=4, chunk_size=2).double()
    u = torch.randn(1, 5, 4, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda u: layer(u)[0], [u])


@settings(deadline=None, max_examples=25)
@given(pieces=st.lists(st.integers(1, 7), min_size=1, max_size=5), d_conv=st.integers(1, 4))
def test_pieces_with_the_state_carried_over_equal_the_whole(pieces: list[int], d_conv: int) -> None:
    torch.manual_seed(1)
    stack = Mamba2Stack(8, depth=2, d_state=4, d_conv=d_conv, expand=2, headdim=4).double()
    x = torch.randn(3, sum(pieces), 8, dtype=torch.float64)
    whole, final = stack(x)
    state = None
    outputs = []
    for piece in torch.split(x, pieces, dim=1):
        y, state = stack(piece, state)
        outputs.append(y)
    torch.testing.assert_close(torch.cat(outputs, dim=1), whole)
    assert state is not None
    for one, other in zip(state, final, strict=True):
        torch.testing.assert_close(one.conv, other.conv)
        torch.testing.assert_close(one.ssm, other.ssm)


def test_without_keep_state_the_output_is_the_same_and_there_is_no_state() -> None:
    torch.manual_seed(0)
    layer = Mamba2(16, d_state=8, headdim=8, chunk_size=4)
    u = torch.randn(2, 10, 16)
    y, state = layer(u[:, :6])
    assert isinstance(state, Mamba2State)
    y_only, none = layer(u[:, :6], keep_state=False)
    assert none is None
    torch.testing.assert_close(y_only, y, rtol=0, atol=0)
    continued, _ = layer(u[:, 6:], state, keep_state=False)
    torch.testing.assert_close(continued, layer(u)[0][:, 6:])


def test_parameters_are_those_of_mamba_ssm() -> None:
    # mamba_ssm.Mamba2(d_model=64): d_inner 128, 2 heads; in_proj gives z 128, x 128, B 128, C 128, dt 2.
    expected = {
        "dt_bias": (2,),
        "A_log": (2,),
        "D": (2,),
        "in_proj.weight": (514, 64),
        "conv1d.weight": (384, 1, 4),
        "conv1d.bias": (384,),
        "norm.weight": (128,),
        "out_proj.weight": (64, 128),
    }
    layer = Mamba2(64)
    assert {name: tuple(value.shape) for name, value in layer.state_dict().items()} == expected
    stack = Mamba2Stack(64, depth=2, d_state=128, d_conv=4, expand=2, headdim=64)
    assert set(stack.state_dict()) == {f"layers.{index}.{name}" for index in (0, 1) for name in expected}


def test_initial_values_are_in_the_published_ranges() -> None:
    torch.manual_seed(0)
    layer = Mamba2(1024, headdim=2)
    step = torch.nn.functional.softplus(layer.dt_bias)
    assert 1e-3 * 0.999 <= step.min() < 1.1e-3
    assert 9e-2 < step.max() <= 1e-1 * 1.001
    # uniform in the logarithm: half of the steps lie below the geometric mean
    assert abs((step < 1e-2).double().mean() - 0.5) < 0.06
    decay = layer.A_log.exp()
    assert 1 <= decay.min() < 1.1
    assert 15.9 < decay.max() <= 16
    assert abs(decay.mean() - 8.5) < 0.5
    assert torch.equal(layer.D, torch.ones(1024))
    assert layer.conv1d.weight.abs().max() <= 1 / math.sqrt(4)


@pytest.mark.parametrize("autocast", [False, True])
def test_bfloat16_follows_float32(autocast: bool) -> None:
    torch.manual_seed(0)
    layer = Mamba2(64, d_state=16, headdim=16, chunk_size=16)
    u = torch.randn(2, 50, 64)
    exact, _ = layer(u)
    if autocast:
        with torch.autocast("cpu", torch.bfloat16):
            y, state = layer(u)
    else:
        y, state = layer.bfloat16()(u.bfloat16())
    assert y.dtype == torch.bfloat16
    assert state.ssm.dtype == torch.float32
    error = (y.float() - exact).square().mean().sqrt() / exact.square().mean().sqrt()
    assert error < 0.02
    torch.autograd.backward(y.float().square().sum())
    assert all(p.grad is not None and p.grad.isfinite().all() for p in layer.parameters())


@pytest.mark.parametrize(
    ("arguments", "named"), [({"headdim": 24}, "headdim"), ({"headdim": 16, "ngroups": 3}, "ngroups")]
)
def test_impossible_head_sizes_are_refused(arguments: dict[str, int], named: str) -> None:
    with pytest.raises(RPGError, match=named):
        Mamba2(32, **arguments)


@pytest.mark.gpu
@pytest.mark.parametrize("length", [1, 2, 24, 300])
@pytest.mark.parametrize("groups", [1, 2])
def test_fused_kernel_equals_plain_pytorch(length: int, groups: int, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("mamba_ssm")
    if not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")
    import mamba_ssm

    from rpg.generator.recurrent import mamba2

    torch.manual_seed(0)
    layer = Mamba2(128, ngroups=groups, headdim=32).cuda()
    published = mamba_ssm.Mamba2(128, ngroups=groups, headdim=32).cuda()
    published.load_state_dict(layer.state_dict())
    u = torch.randn(2, length, 128, device="cuda")

    def outputs() -> list[Tensor]:
        y, state = layer(u)
        gradients = torch.autograd.grad(y.square().sum(), list(layer.parameters()))
        return [y, state.conv, state.ssm, *gradients, layer(u, keep_state=False)[0]]

    fused = outputs()
    reference = published(u)
    monkeypatch.setattr(mamba2, "fused_kernel", lambda: None)
    plain = outputs()
    # The kernels multiply in TF32.
    assert (plain[0] - reference).abs().max() < 5e-3 * reference.abs().max()
    for one, other in zip(plain, fused, strict=True):
        assert one.shape == other.shape
        assert (one - other).abs().max() <= 1e-2 * other.abs().max()
