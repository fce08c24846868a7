"""Prototypes of one model, piece by piece: what the recurrent network makes of positions and condition."""

import copy
import math
from collections import OrderedDict
from collections.abc import Iterator
from contextlib import AbstractContextManager, ExitStack, nullcontext

import torch
from torch import Tensor, nn

from rpg.config import SamplingConfig
from rpg.generator.generator import Generator
from rpg.generator.recurrent.mamba2 import Mamba2
from rpg.sampling.precision import samples_on_gpu
from rpg.threads import one_thread

PROTOTYPE_PIECE = 256
"""Positions that the recurrent network takes at once on a CPU, its state carried over."""

GPU_PROTOTYPE_PIECE = 2048

_GPU_CHUNK = 256
"""Of Mamba-2's scan: with few sequences, starting kernels takes longer than their work."""

REMEMBERED_BYTES = 2**26
"""Limit of the kept prototypes of small networks. Jobs take turns: if the prototypes of fewer conditions were
kept than there are jobs, all of them would be computed again for every model."""
ROW_MULTIPLE = 32
"""Two vectors of the widest processors, in float32 values."""
_ENTRY_BYTES = 2048
"""What Python and PyTorch need for one, besides its values and its condition."""


class Prototypes:
    """Prototypes of a generator for the conditions of models.

    All models are cut into the same pieces, so a model's prototypes do not depend on other models.
    """

    def __init__(
        self, generator: Generator, sampling: SamplingConfig, remembered_bytes: int = REMEMBERED_BYTES
    ) -> None:
        """Prototypes as `sampling` needs them.

        `remembered_bytes` limits the memory for those of conditions that may come again.
        """
        self._generator = generator
        self._guided = sampling.guidance != 1
        self._device = generator.positions.device
        self._half = samples_on_gpu(generator, sampling)
        self._piece = GPU_PROTOTYPE_PIECE if self._device.type == "cuda" else PROTOTYPE_PIECE
        self._recurrent = _half_products(generator.recurrent) if self._half else generator.recurrent
        self._conditions = _conditions_at_once(len(generator.positions), self._piece)
        self._latest: OrderedDict[bytes, tuple[Tensor, Tensor]] = OrderedDict()
        width = generator.config.recurrent.prototype_width
        values = len(generator.positions) * width * (2 if self._guided else 1)
        each = (values + generator.config.condition.size) * torch.float32.itemsize + _ENTRY_BYTES
        self._remembered = remembered_bytes // each

    @property
    def has_one_piece(self) -> bool:
        """Whether a model's prototypes are one piece."""
        return len(self._generator.positions) <= self._piece

    def pieces(self, condition: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
        """The model's prototypes and, for guidance, those without condition: [n, width] each, in order."""
        if self.has_one_piece:
            yield self.of_models(condition[None])
            return
        positions = self._generator.positions
        embedded, null = self._embedded(condition[None])
        state = null_state = None
        # A condition is the same for all tokens, or each has its own.
        own = torch.split(embedded.expand(1, len(positions), -1), self._piece, dim=1)
        for piece, each in zip(torch.split(positions.detach(), self._piece), own, strict=True):
            with self._arithmetic():
                prototypes, state = self._recurrent(piece[None] + each, state)
                unconditional = prototypes
                if self._guided:
                    unconditional, null_state = self._recurrent(piece[None] + null, null_state)
            known = prototypes[0].float()
            yield known, unconditional[0].float() if self._guided else known

    def of_models(self, conditions: Tensor) -> tuple[Tensor, Tensor]:
        """As `pieces`, for models of one piece and their conditions, one model after the other.

        Args:
            conditions: a row for each model.
        """
        keys = [row.tobytes() for row in conditions.cpu().numpy()]
        found: dict[bytes, tuple[Tensor, Tensor]] = {}
        missing: dict[bytes, int] = {}
        for row, key in enumerate(keys):
            if key in self._latest:
                # Models of one condition follow each other, so a network's prototypes are computed once.
                self._latest.move_to_end(key)
                found[key] = self._latest[key]
            else:
                missing.setdefault(key, row)
        for start in range(0, len(missing), self._conditions):
            some = list(missing)[start : start + self._conditions]
            # Always as many: how products are rounded may depend on their number.
            rows = [missing[key] for key in some] + [missing[some[0]]] * (self._conditions - len(some))
            found.update(zip(some, self._whole(conditions[rows]), strict=False))
        for key in missing:
            self._latest[key] = found[key]
            if len(self._latest) > self._remembered:
                self._latest.popitem(last=False)
        known = torch.cat([found[key][0] for key in keys])
        return known, torch.cat([found[key][1] for key in keys]) if self._guided else known

    def _whole(self, conditions: Tensor) -> list[tuple[Tensor, Tensor]]:
        """The prototypes of models of one piece, for each row of `conditions`."""
        positions = self._generator.positions.detach()
        embedded, null = self._embedded(conditions)
        with self._arithmetic():
            prototypes = self._recurrent(positions + embedded)[0].float()
            unconditional = self._recurrent(positions + null)[0].float() if self._guided else prototypes
        # Copied, because a view would keep the others of its batch in memory.
        known = [each.clone() for each in prototypes.unbind()]
        if not self._guided:
            return [(each, each) for each in known]
        return [(each, without.clone()) for each, without in zip(known, unconditional.unbind(), strict=True)]

    def _embedded(self, conditions: Tensor) -> tuple[Tensor, Tensor]:
        """What conditions, a row each, and no conditions are embedded as."""
        rows = conditions.to(self._device)
        with self._arithmetic():
            embedded = self._generator.condition(rows)
            if not self._guided:
                return embedded, embedded
            return embedded, self._generator.condition(
                rows, torch.ones(len(rows), dtype=torch.bool, device=self._device)
            )

    def _arithmetic(self) -> AbstractContextManager[object]:
        stack = ExitStack()
        stack.enter_context(torch.inference_mode())
        stack.enter_context(sampling_threads(self._device))
        if self._half:
            stack.enter_context(torch.autocast(self._device.type, torch.bfloat16))
        return stack


def _conditions_at_once(tokens: int, piece: int) -> int:
    """How many conditions the recurrent network takes at once, for models of so many tokens.

    It takes little longer for several than for one. Rows come out the same wherever in the batch they are
    if their number is a multiple of two vectors (`rpg.sampling.batch_sampler`).
    """
    count = ROW_MULTIPLE // math.gcd(tokens, ROW_MULTIPLE)
    return count if count * tokens <= 2 * piece else 1


def sampling_threads(device: torch.device) -> AbstractContextManager[None]:
    """Run a block's CPU operations on one thread; nothing changes for other devices."""
    return one_thread() if device.type == "cpu" else nullcontext()


def _half_products(recurrent: nn.Module) -> nn.Module:
    """A copy whose linear layers hold bfloat16: autocast would convert them anew for every piece."""
    half = copy.deepcopy(recurrent)
    for module in half.modules():
        if isinstance(module, nn.Linear):
            module.to(torch.bfloat16)
        if isinstance(module, Mamba2):
            module.chunk_size = _GPU_CHUNK
    return half
