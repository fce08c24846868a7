"""One training step, and the state that it changes: generator, moving average, optimiser, step number."""

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn

from rpg.captured import CapturedStep
from rpg.config import OptimiserConfig, Sharding, TrainConfig
from rpg.errors import RPGError, one_line
from rpg.generator.condition import VectorCondition
from rpg.generator.denoiser.unet import ConditionalUNet
from rpg.generator.generator import Generator
from rpg.gpu_compiler import has_gpu_compiler
from rpg.storage.files import replacing_file
from rpg.training.gradients import Computed, Gradients, Objective, fitting_loss
from rpg.training.optimiser import (
    build_optimiser,
    can_be_captured,
    learning_rate,
    load_optimiser_state,
    optimiser_state,
    set_rate,
    step,
)
from rpg.training.sharding import load_state, local, shard, whole_state
from rpg.training.workers import Workers, normalise_globally

STATE_FILE = "training_state.pt"


class Trainer:
    """Fits a generator, in this process only or together with the other workers of its process group.

    All workers call the same methods in the same order, each with its own rows of a batch.

    Attributes:
        config: training settings.
        device: of the generator and the batches.
        workers: tells which of the workers this process is.
        generator: being fitted; this worker's share if the generator is sharded.
        average: the moving average of its weights, in evaluation mode, sharded like it.
        gradients: computes the gradients of a batch.
        optimiser: changes the weights.
        changing: computes the gradients of a batch and changes the weights; on a GPU as one CUDA graph.
        step: number of finished steps.
    """

    def __init__(
        self,
        generator: Generator,
        config: OptimiserConfig,
        device: torch.device,
        objective: Objective = fitting_loss,
    ) -> None:
        """Train `generator`, the same for every worker, on `device`, to minimise `objective`."""
        self.config = config
        self.device = device
        self.workers = Workers.current()
        self.generator = generator
        condition = generator.condition
        if isinstance(condition, VectorCondition) and not generator.config.condition.dropout:
            # Without dropout the null vector gets no gradient, which other workers must not wait for.
            condition.null.requires_grad_(False)
        self.average = copy.deepcopy(generator).eval().requires_grad_(False)
        sharding = config.sharding if isinstance(config, TrainConfig) else Sharding.none
        self._sharded = sharding == Sharding.fsdp and self.workers.count > 1
        if self.workers.count > 1:
            normalise_globally(generator)
        if self._sharded:
            for each in (self.generator, self.average):
                shard(each, device, self.workers.count, config.precision)
        else:
            for each in (self.generator, self.average):
                each.to(device)
        for module in self.average.modules():
            if isinstance(module, nn.RNNBase) and not self._sharded:
                # cuDNN needs these weights in one piece of memory, and a deep copy scatters them.
                module.flatten_parameters()
        self.gradients = Gradients(
            self.generator, config.precision, device, self._sharded, config.gradient_clip, objective
        )
        self.optimiser = build_optimiser(self.generator, config)
        # Going through all modules takes longer than starting the kernels that move the average.
        self._averaged = list(zip(self.average.parameters(), self.generator.parameters(), strict=True))
        self._copied = list(zip(self.average.buffers(), self.generator.buffers(), strict=True))
        self.changing: Callable[[Any], Computed] = self._change
        # FSDP frees and gathers tensors as it goes. Other objectives run code that a graph might not be able
        # to hold.
        if device.type == "cuda" and not self._sharded and objective is fitting_loss:
            # The compiler fuses the six passes over memory between two convolutions of the U-Net into one.
            # With several workers BatchNorm exchanges sums in between, where it could not.
            is_alone = self.workers.count == 1
            if isinstance(generator.denoiser, ConditionalUNet) and is_alone and has_gpu_compiler():
                generator.denoiser.compile()
            self.changing = CapturedStep(self._change, device, generator.zero_grad)
        self.step = 0

    def train_step(self, batch: Any) -> Computed:
        """Take one step on this worker's rows of a batch, which lies on its device.

        Returns:
            What was computed of the batch; on a GPU the next step overwrites it.
        """
        if not self.generator.training:
            self.generator.train()
        set_rate(self.optimiser, learning_rate(self.config, self.step))
        computed = self.changing(batch)
        if not can_be_captured(self.optimiser):
            step(self.optimiser)
        self.step += 1
        self._update_average()
        return computed

    def release(self) -> None:
        """Give back what steps have left behind; a later step makes it again. All workers must call this
        before their process group is destroyed."""
        if isinstance(self.changing, CapturedStep):
            self.changing.release()

    def whole_average(self) -> Generator | None:
        """The moving average, not sharded, on the first worker and None on others; all must call this."""
        if not self._sharded:
            return self.average if self.workers.rank == 0 else None
        state = whole_state(self.average)
        if self.workers.rank:
            return None
        with torch.random.fork_rng(devices=[]):
            generator = Generator(self.average.config, self.average.layout)
        generator.load_state_dict(state)
        return generator.eval().to(self.device)

    def save(self, directory: Path) -> None:
        """Write everything that resuming needs to `directory`/training_state.pt, as tensors and plain values.

        All workers must call this; the first one writes. Tensors are whole, so any number of workers can
        resume.

        Raises:
            RPGError: naming the file, if it cannot be written.
        """
        state = {
            "step": self.step,
            "generator": whole_state(self.generator),
            "average": whole_state(self.average),
            "optimiser": optimiser_state(self.generator, self.optimiser),
        }
        if self.workers.rank:
            return
        # The file is four times as large as the generator, and training would wait at every save until it is
        # on the disk. Callers that need this can sync the file themselves.
        with replacing_file(directory / STATE_FILE, synced=False) as temporary:
            try:
                torch.save(state, temporary)
            except RuntimeError as error:
                # PyTorch's zip writer reports a full disk as a RuntimeError.
                raise OSError(str(error).splitlines()[0]) from error

    def load(self, directory: Path) -> None:
        """Resume from what `save` wrote.

        Raises:
            RPGError: naming the file, if it is missing, damaged, or of another generator.
        """
        path = directory / STATE_FILE
        try:
            state: dict[str, Any] = torch.load(path, map_location="cpu", mmap=True, weights_only=True)
            load_optimiser_state(self.generator, self.optimiser, state["optimiser"])
            load_state(self.generator, state["generator"])
            load_state(self.average, state["average"])
            self.step = int(state["step"])
        except FileNotFoundError as error:
            raise RPGError(f"{path}: not found; expected a training state") from error
        except Exception as error:
            reason = one_line(error)[:200]
            raise RPGError(f"{path}: cannot be resumed from: {reason}") from error

    def _change(self, batch: Any) -> Computed:
        computed = self.gradients(batch)
        if can_be_captured(self.optimiser):
            step(self.optimiser)
        return computed

    @torch.no_grad()
    def _update_average(self) -> None:
        # The decay grows with the number of steps, so that early averages forget their random start.
        decay = min(self.config.ema_decay, (1 + self.step) / (10 + self.step))
        average, weights = ([local(each) for each in side] for side in zip(*self._averaged, strict=True))
        torch._foreach_lerp_(average, weights, 1 - decay)
        for target, source in self._copied:
            target.copy_(source)
