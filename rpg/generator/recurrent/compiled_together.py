"""Compiling a function's Triton kernels side by side, before it is called for the first time.

Triton compiles a kernel when it is first launched, one after the other. A rehearsal of the call, forward and
backward, in which kernels are compiled but not run, tells which there are; a thread each then compiles them.
"""

import logging
import os
import threading
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from contextvars import copy_context
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks

from rpg.errors import one_line

_log = logging.getLogger("rpg.generator")

_MOST_THREADS = 16
"""There are hardly more kernels than that, and other workers of the machine compile at the same time."""
_alone = threading.RLock()
"""Held by a rehearsal: functions may share kernels, whose `run` it replaces for as long as it takes."""


class CompiledTogether:
    """Calls `function`, whose kernels are compiled side by side before its first call of each kind.

    Nothing is rehearsed while a CUDA graph is captured or torch.compile traces, nor with Triton before 3.5,
    which compiles in turn alone. A rehearsal that fails is told in the log, and is the last one: from then on
    kernels are compiled as they are launched.

    Args:
        function: returns a tensor or a tuple with tensors. It draws no random numbers and changes nothing
            that it is given, since a rehearsal calls it with the caller's values. Its arguments are tensors
            or hashable.
        kernels: what it may launch, `triton.jit` with or without `triton.autotune` and
            `triton.heuristics`. What is no kernel, or one of Triton's interpreter, is passed over.

    Attributes:
        function: to call without rehearsal.
    """

    def __init__(self, function: Callable[..., Any], kernels: Iterable[Any]) -> None:
        self.function = function
        layers = {id(layer): layer for kernel in kernels for layer in _layers(kernel)}
        self._kernels = list(layers.values())
        self._rehearsed: set[object] = set()

    def __call__(self, *arguments: Any, **options: Any) -> Any:
        """What `function` returns."""
        if self._kernels and not torch.compiler.is_compiling() and not _is_capturing():
            self._prepare(arguments, options)
        return self.function(*arguments, **options)

    def _prepare(self, arguments: tuple[Any, ...], options: dict[str, Any]) -> None:
        kind = _kind(arguments, options)
        if kind in self._rehearsed:
            return
        with _alone:
            if kind in self._rehearsed:
                return
            try:
                # Triton's compile mode lasts when its end fails; in a copy of the context it does not.
                copy_context().run(self._rehearse, arguments, options)
            except Exception as error:
                # Whatever it is that another release of Triton or of the function does: all that is lost
                # is time, and what is wrong with the call itself will be raised by the call.
                self._kernels = []
                _log.warning(
                    "kernels are compiled one after the other: side by side failed with %s: %s",
                    type(error).__name__,
                    one_line(error),
                )
            self._rehearsed.add(kind)

    def _rehearse(self, arguments: tuple[Any, ...], options: dict[str, Any]) -> None:
        try:
            from triton import AsyncCompileMode
        except ImportError:
            return
        arguments = tuple(map(_leaf, arguments))
        options = {name: _leaf(value) for name, value in options.items()}
        threads = ThreadPoolExecutor(min(_MOST_THREADS, os.cpu_count() or 1), "compile")
        with (
            threads,
            AsyncCompileMode(threads),
            # The mode is this thread's own, and so is what `_idle` does: the backward pass must stay here.
            torch.autograd.set_multithreading_enabled(False),
            # In place of a caller's hooks: torch.utils.checkpoint's would count what is saved here.
            saved_tensors_hooks(Tensor.detach, _unchanged),
            self._idle(),
        ):
            results = self.function(*arguments, **options)
            results = results if isinstance(results, tuple) else (results,)
            outputs = [each for each in results if isinstance(each, Tensor) and each.requires_grad]
            if outputs:
                # A caller's backward pass runs outside of the autocast that its forward pass runs in.
                with torch.autocast(outputs[0].device.type, enabled=False):
                    torch.autograd.backward(outputs, [torch.zeros_like(each) for each in outputs])

    @contextmanager
    def _idle(self) -> Iterator[None]:
        """Kernels that this thread launches are compiled, and not run."""
        before = [(kernel, vars(kernel).get("run")) for kernel in self._kernels]
        try:
            for kernel in self._kernels:
                kernel.run = _compiling(kernel, threading.get_ident())
            yield
        finally:
            for kernel, run in before:
                vars(kernel).pop("run", None)
                if run is not None:
                    kernel.run = run


def _compiling(kernel: Any, thread: int) -> Callable[..., Any]:
    """`kernel.run` that compiles in `thread`, and launches in every other."""
    run = kernel.run
    tunes = len(getattr(kernel, "configs", ())) > 1

    def compile_or_run(*arguments: Any, warmup: bool, **options: Any) -> Any:
        if threading.get_ident() != thread:
            return run(*arguments, warmup=warmup, **options)
        if tunes:
            # All configurations: timed while nothing runs, the wrong one would be kept for good.
            return kernel.warmup(*arguments, **options)
        return run(*arguments, warmup=True, **options)

    return compile_or_run


def _layers(kernel: Any) -> list[Any]:
    """A kernel from its outermost decorator to its `JITFunction`; nothing if it has none."""
    from triton.runtime.jit import JITFunction

    layers = [kernel]
    while not isinstance(layers[-1], JITFunction):
        if not hasattr(layers[-1], "fn"):
            return []
        layers.append(layers[-1].fn)
    return layers


def _is_capturing() -> bool:
    return torch.cuda.is_initialized() and torch.cuda.is_current_stream_capturing()


def _kind(arguments: tuple[Any, ...], options: dict[str, Any]) -> object:
    """Calls of one kind need the same kernels, as far as their arguments tell.

    Sizes that `function` derives from its arguments' may differ all the same: those kernels are compiled when
    they are launched.
    """
    modes = torch.is_grad_enabled(), torch.is_autocast_enabled()
    named = tuple((name, _traits(value)) for name, value in options.items())
    return modes, tuple(map(_traits, arguments)), named


def _traits(value: Any) -> object:
    """Of a tensor: what Triton compiles another kernel for. A size of one and multiples of 16 are such."""
    if not isinstance(value, Tensor):
        return value
    sizes = tuple((size == 1, size % 16 == 0) for size in value.shape)
    return value.dtype, value.device, value.requires_grad, sizes


def _leaf(value: Any) -> Any:
    """A tensor's values without its history, so that gradients end here; anything else as it is."""
    return value.detach().requires_grad_(value.requires_grad) if isinstance(value, Tensor) else value


def _unchanged(value: Tensor) -> Tensor:
    return value
