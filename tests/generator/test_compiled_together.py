"""Kernels that Triton compiles for an H100, without one: a stand-in for its driver does what they would."""

import importlib
import logging
import threading
import weakref
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from rpg.generator.recurrent.compiled_together import CompiledTogether

triton = pytest.importorskip("triton")
tl = importlib.import_module("triton.language")


def _scale(x, y, size, factor, block: tl.constexpr):
    at = tl.program_id(0) * block + tl.arange(0, block)
    tl.store(y + at, tl.load(x + at, mask=at < size) * factor, mask=at < size)


def _scale_back(dy, dx, size, factor, block: tl.constexpr):
    at = tl.program_id(0) * block + tl.arange(0, block)
    tl.store(dx + at, tl.load(dy + at, mask=at < size) * factor, mask=at < size)


def _broken(x):
    tl.store(x, tl.there_is_no_such_thing)


class Driver:
    """Triton's driver for an H100 at which launches are done by PyTorch, on a CPU."""

    def __init__(self) -> None:
        self.utils = self
        self.launched: list[str] = []
        self.timed = 0

    def launcher_cls(self, src: Any, metadata: Any) -> Any:
        def launch(*arguments: Any) -> None:
            x, y, _, factor, *_ = arguments[9:]  # before: grid, stream, function, what hooks get
            self.launched.append(metadata.name)
            y.copy_(x * factor)

        return launch

    def get_benchmarker(self) -> Any:
        def seconds(launch: Any, quantiles: Any) -> list[float]:
            launch()
            self.timed += 1
            return [1.0 / self.timed] * 3  # the last one is fastest

        return seconds

    def get_current_target(self) -> Any:
        return importlib.import_module("triton.backends.compiler").GPUTarget("cuda", 90, 32)

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_device_properties(self, device: int) -> dict[str, int]:
        return {"max_shared_mem": 232448}

    def load_binary(self, *arguments: Any) -> tuple[int, int, int, int, int]:
        return 1, 1, 0, 0, 1024


@pytest.fixture
def driver(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Driver]:
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    config = triton.runtime.driver
    monkeypatch.setattr(config, "_active", Driver())
    yield config.active


class Scaled:
    """x · factor by two kernels of its own, and how often it was called."""

    def __init__(self) -> None:
        # Not `triton.jit`: where the tests run without a GPU that asks for the interpreter.
        self.forward = triton.JITFunction(_scale)
        self.backward = triton.JITFunction(_scale_back)
        self.kernels = [self.forward, self.backward]
        self.calls = 0
        self.before_launch: Any = lambda: None

    def __call__(self, x: Tensor, factor: float = 3.0, twice: bool = False) -> Any:
        self.calls += 1
        self.before_launch()
        result = _ScaledFunction.apply(x, factor, self)
        return (result, result.detach()) if twice else result


class _ScaledFunction(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, factor: float, kernels: Scaled) -> Tensor:
        ctx.kernels, ctx.factor = kernels, factor
        ctx.save_for_backward(x)
        y = torch.empty_like(x)
        kernels.forward[(triton.cdiv(x.numel(), 64),)](x, y, x.numel(), factor, block=64)
        return y

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, None, None]:
        (x,) = ctx.saved_tensors
        dx = torch.empty_like(x)
        ctx.kernels.backward[(1,)](dy.contiguous(), dx, x.numel(), ctx.factor, block=64)
        return dx, None, None


def _compiled(kernel: Any) -> int:
    kernels = kernel.device_caches[0][0].values()
    assert all(type(each).__name__ == "CompiledKernel" for each in kernels)
    return len(kernels)


def _assert_restored(function: Scaled) -> None:
    assert not any("run" in vars(kernel) for kernel in function.kernels)


def test_kernels_are_compiled_by_a_rehearsal_and_launched_by_the_call_alone(driver: Driver) -> None:
    function = Scaled()
    leaf = torch.randn(40, requires_grad=True)
    leaf.register_hook(lambda gradient: seen.append(gradient))
    seen: list[Tensor] = []
    launched = []
    function.before_launch = lambda: launched.append(list(driver.launched))
    values, state = leaf.detach().clone(), torch.random.get_rng_state()
    y = CompiledTogether(function, function.kernels)(leaf, factor=2.0)
    assert launched == [[], []]  # the rehearsal and the call
    assert driver.launched == ["_scale"]
    assert [_compiled(kernel) for kernel in function.kernels] == [1, 1]
    _assert_restored(function)
    assert leaf.grad is None and not seen
    assert torch.equal(leaf, values) and torch.equal(torch.random.get_rng_state(), state)
    torch.autograd.backward(y.sum())
    assert driver.launched == ["_scale", "_scale_back"]
    assert torch.equal(y, leaf * 2) and leaf.grad is not None
    assert torch.equal(leaf.grad, torch.full_like(leaf, 2)) and len(seen) == 1


def test_each_kind_of_call_is_rehearsed_once(driver: Driver) -> None:
    function = Scaled()
    together = CompiledTogether(function, function.kernels)

    def calls(*arguments: Any, **options: Any) -> int:
        before = function.calls
        together(*arguments, **options)
        return function.calls - before

    x = torch.randn(40, requires_grad=True)
    assert calls(x) == 2
    assert calls(x) == calls(torch.randn(72, requires_grad=True)) == 1
    assert calls(torch.randn(64, requires_grad=True)) == 2  # Triton compiles for multiples of 16
    assert calls(torch.randn(1, requires_grad=True)) == 2  # and for 1
    assert calls(x.detach()) == 2
    assert calls(x.bfloat16()) == 2
    assert calls(x, 4.0) == calls(x, factor=4.0) == calls(x, 4.0, twice=True) == 2
    with torch.no_grad():
        assert calls(x) == 2
        assert calls(x) == 1
    assert calls(x) == calls(x, 4.0, twice=True) == 1


def test_what_a_rehearsal_allocates_is_freed_before_the_call(driver: Driver) -> None:
    function = Scaled()
    results: list[weakref.ref[Tensor]] = []

    def observed(x: Tensor) -> Tensor:
        assert all(result() is None for result in results)
        results.append(weakref.ref(result := function(x)))
        return result

    y = CompiledTogether(observed, function.kernels)(torch.randn(40, requires_grad=True))
    assert len(results) == 2 and results[1]() is y


def test_of_a_kernel_with_a_choice_all_are_compiled_and_none_is_timed(driver: Driver) -> None:
    function = Scaled()
    configs = [triton.Config({"block": 64}, num_warps=warps) for warps in (1, 2)]
    tuned = triton.autotune(configs, key=["size"])(triton.JITFunction(_scale))
    compiled_and_timed = []

    def scaled(x: Tensor) -> Tensor:
        compiled_and_timed.append((len(tuned.fn.device_caches[0][0]), driver.timed))
        y = torch.empty_like(x)
        tuned[(1,)](x, y, x.numel(), 2.0)
        return y

    x = torch.randn(40)
    assert torch.equal(CompiledTogether(scaled, [tuned, *function.kernels])(x), 2 * x)
    assert compiled_and_timed == [(0, 0), (2, 0)]
    assert driver.timed == 2 and tuned.best_config is configs[1]
    assert "run" not in vars(tuned) and "run" not in vars(tuned.fn)


def test_a_rehearsal_that_fails_is_told_once_and_changes_nothing(
    driver: Driver, caplog: pytest.LogCaptureFixture
) -> None:
    function = Scaled()

    def fail_first() -> None:
        if function.calls == 1:
            raise ValueError("not today,\nsaid the kernel")

    function.before_launch = fail_first
    together = CompiledTogether(function, function.kernels)
    x = torch.randn(40, requires_grad=True)
    with caplog.at_level(logging.WARNING):
        assert torch.equal(together(x), 3 * x)
        assert torch.equal(together(x.detach()), 3 * x)
    assert caplog.messages == [
        "kernels are compiled one after the other: side by side failed with ValueError: "
        "not today, said the kernel"
    ]
    assert function.calls == 3
    _assert_restored(function)


def test_a_kernel_that_does_not_compile_leaves_triton_as_it_was(
    driver: Driver, caplog: pytest.LogCaptureFixture
) -> None:
    function, broken = Scaled(), triton.JITFunction(_broken)
    x = torch.randn(40, requires_grad=True)
    function.before_launch = lambda: broken[(1,)](x) if function.calls == 1 else None
    y = CompiledTogether(function, [broken, *function.kernels])(x)
    assert "side by side failed with CompilationError" in caplog.text
    torch.autograd.backward(y.sum())
    another = Scaled()
    assert torch.equal(another(x), y)  # would fail in a compile mode that lasts
    with pytest.raises(Exception, match="there_is_no_such_thing"):
        broken[(1,)](x)


@pytest.mark.parametrize("during", ["capture", "tracing", "old Triton", "interpreter"])
def test_there_are_times_without_a_rehearsal(
    during: str, driver: Driver, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    function = Scaled()
    kernels = function.kernels
    if during == "capture":
        monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
        monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    elif during == "tracing":
        monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    elif during == "old Triton":
        monkeypatch.delattr(triton, "AsyncCompileMode")
    else:
        kernels = [importlib.import_module("triton.runtime.interpreter").InterpretedFunction(_scale)]
    x = torch.randn(40)
    assert torch.equal(CompiledTogether(function, kernels)(x), 3 * x)
    assert function.calls == 1 and driver.launched == ["_scale"]
    assert not caplog.messages


def test_checkpointing_does_not_count_what_a_rehearsal_saves(driver: Driver) -> None:
    function = Scaled()
    together = CompiledTogether(function, function.kernels)
    x = torch.randn(40, requires_grad=True)
    y = checkpoint(lambda values: together(values * 2), x, use_reentrant=False)
    torch.autograd.backward(y.sum())
    assert torch.equal(y, 6 * x) and x.grad is not None
    assert torch.equal(x.grad, torch.full_like(x, 6))
    assert function.calls == 3  # the rehearsal, the call, and again for its backward pass


def test_other_threads_launch_the_same_kernels_meanwhile(driver: Driver) -> None:
    function, other = Scaled(), torch.randn(40)
    results: list[Tensor] = []

    def launch_elsewhere() -> None:
        if function.calls == 1:
            thread = threading.Thread(target=lambda: results.append(function(other)))
            thread.start()
            thread.join()

    function.before_launch = launch_elsewhere
    CompiledTogether(function, function.kernels)(torch.randn(40, requires_grad=True))
    assert driver.launched == ["_scale", "_scale"] and torch.equal(results[0], 3 * other)


def test_threads_may_call_at_once(driver: Driver) -> None:
    function = Scaled()
    together = CompiledTogether(function, function.kernels)
    inputs = [torch.randn(40, requires_grad=True) for _ in range(4)]
    gate = threading.Barrier(len(inputs))

    def call(x: Tensor) -> None:
        gate.wait()
        y = together(x)
        assert torch.equal(y, 3 * x)
        torch.autograd.backward(y.sum())

    threads = [threading.Thread(target=call, args=(x,)) for x in inputs]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(x.grad is not None and torch.equal(x.grad, torch.full_like(x, 3)) for x in inputs)
    assert function.calls == 1 + len(inputs)
    _assert_restored(function)
