"""The exchange of gradients by itself; what several workers make of it is in `test_workers.py`."""

import gc
import weakref
from collections.abc import Iterator

import pytest
import torch
import torch.distributed as dist
from torch import nn

from rpg.training import exchange
from rpg.training.exchange import GradientExchange


@pytest.fixture(autouse=True)
def group() -> Iterator[None]:
    store = dist.HashStore()  # type: ignore[attr-defined]
    dist.init_process_group("gloo", store=store, rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def network() -> nn.ModuleDict:
    torch.manual_seed(0)
    return nn.ModuleDict({"first": nn.Linear(4, 30), "unused": nn.Linear(3, 3), "last": nn.Linear(30, 2)})


def backward(module: nn.ModuleDict, step: int) -> None:
    inputs = torch.randn(5, 4, generator=torch.Generator().manual_seed(step))
    # The last layer takes part twice.
    hidden = module["last"](module["first"](inputs).tanh())
    torch.autograd.backward((hidden + module["last"](torch.ones(5, 30))).square().sum())


@pytest.mark.parametrize("bucket_bytes", [1, 500, 2**20])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-6), (torch.bfloat16, 1e-2)])
@pytest.mark.parametrize("limit", [0.5, 1e6])
def test_gradients_are_those_of_plain_pytorch_clipped(
    bucket_bytes: int,
    dtype: torch.dtype,
    tolerance: float,
    limit: float,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(exchange, "_BUCKET_BYTES", bucket_bytes)
    plain, exchanged = network(), network()
    exchanging = GradientExchange(exchanged, dtype)
    for step in range(3):
        for module in (plain, exchanged):
            module.zero_grad(set_to_none=True)
        backward(plain, step)
        expected = torch.nn.utils.clip_grad_norm_(plain.parameters(), limit)
        exchanging.begin()
        backward(exchanged, step)
        assert float(exchanging.finish(limit)) == pytest.approx(float(expected), rel=tolerance)
        for one, other in zip(exchanged.parameters(), plain.parameters(), strict=True):
            assert (one.grad is None) == (other.grad is None)
            if one.grad is not None and other.grad is not None:
                assert one.grad.dtype == torch.float32
                torch.testing.assert_close(one.grad, other.grad, rtol=tolerance, atol=tolerance)


def test_large_buckets_are_sent_while_the_backward_pass_goes_on(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(exchange, "_BUCKET_BYTES", 1)
    module, sent = network(), []
    exchanging = GradientExchange(module, torch.float32)
    all_reduce = dist.all_reduce

    def spy(tensor: torch.Tensor, async_op: bool) -> object:
        sent.append((len(tensor), module["first"].weight.grad is None))
        return all_reduce(tensor, async_op=async_op)

    monkeypatch.setattr(dist, "all_reduce", spy)
    exchanging.begin()
    backward(module, 0)
    # The last layer's bias and weight, before there is a gradient of the first layer's weight.
    assert sent == [(2, True), (60, True)]
    exchanging.finish(1.0)
    assert [size for size, _ in sent] == [2, 60, 3, 9, 30, 120]


def test_hooks_keep_nothing_alive() -> None:
    module = network()
    exchanging = GradientExchange(module, torch.float32)
    exchanging.begin()
    backward(module, 0)
    exchanging.finish(1.0)
    known = weakref.ref(exchanging), weakref.ref(module["first"].weight)
    del module, exchanging
    gc.collect()
    assert [each() for each in known] == [None, None]
