"""The sampling loop on an NVIDIA GPU: half-precision products and fused kernels, recorded as one CUDA graph.

The graph holds every step, so the host only copies a batch's rows in and its values out, and waits for
nothing. Values and the solver's arithmetic stay float32.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from rpg.config import Prediction
from rpg.generator.denoiser.adaln_mlp import AdaLNMLP
from rpg.generator.denoiser.unet import ConditionalUNet
from rpg.generator.generator import Generator
from rpg.sampling.gpu.adaln_mlp import AdaLNMLPOnGPU
from rpg.sampling.gpu.kernels.gaussian import write_gaussian
from rpg.sampling.gpu.kernels.solver_update import Update, apply_update
from rpg.sampling.gpu.unet import UNetOnGPU
from rpg.sampling.rows import Rows
from rpg.sampling.solvers import SolverStep

_WARM_UPS = 2
"""Runs before recording: kernels are compiled, cuBLAS makes its workspace."""


class GPULoop:
    """Denoises batches of a fixed number of rows."""

    def __init__(
        self,
        generator: Generator,
        steps: Sequence[SolverStep],
        guidance: float,
        temperature: float,
        size: int,
        clip: float = 0.0,
        dtype: torch.dtype = torch.bfloat16,
        float8: bool = False,
        graph: bool = True,
    ) -> None:
        """Sample batches of `size` rows from `generator`, on its GPU.

        Args:
            generator: its denoiser's weights are copied in `dtype`.
            steps: the solver's table.
            guidance: scale of classifier-free guidance; 1 is none.
            temperature: scale of the first noise.
            size: rows of every batch.
            clip: largest magnitude of an estimate; 0 is any.
            dtype: of the matrix products, or of their results where these are of 8 bits.
            float8: whether an AdaLN MLP multiplies 8-bit floats (`precision.samples_in_float8`).
            graph: whether to record the loop; without, it runs step by step.
        """
        device = generator.positions.device
        token_size = generator.layout.token_size
        timesteps = [step.t for step in steps]
        self._updates = [Update.of(steps, i, generator.diffusion, clip) for i in range(len(steps))]
        self._guidance, self._temperature = guidance, temperature
        self._denoiser: AdaLNMLPOnGPU | UNetOnGPU
        if isinstance(generator.denoiser, AdaLNMLP):
            self._denoiser = AdaLNMLPOnGPU(generator.denoiser, timesteps, dtype, float8)
        else:
            assert isinstance(generator.denoiser, ConditionalUNet)
            self._denoiser = UNetOnGPU(generator.denoiser, timesteps, dtype)
        width = generator.config.recurrent.prototype_width
        self._seeds, self._models, self._tokens = torch.zeros(3, size, dtype=torch.int64, device=device)
        self._prototypes, self._without = torch.zeros(2, size, width, device=device)
        self._x = torch.empty(size, token_size, device=device)
        # What is predicted may be x̂ itself: then the step before's answer is kept, and nothing copied.
        self._answers_x0 = generator.diffusion.prediction == Prediction.x0 and guidance == 1 and not clip
        self._estimate = None if self._answers_x0 else torch.empty_like(self._x)
        self._rounded = torch.empty(size, token_size, device=device, dtype=dtype)
        self._graph = self._recorded() if graph else None

    def __call__(self, rows: Rows) -> Tensor:
        """Sample the tokens of `rows`, as many as the loop was built for: float32 [N, token_size]."""
        self._seeds.copy_(rows.seeds, non_blocking=True)
        self._models.copy_(rows.models, non_blocking=True)
        self._tokens.copy_(rows.tokens, non_blocking=True)
        self._prototypes.copy_(rows.prototypes)
        if self._guidance != 1:
            self._without.copy_(rows.unconditional)
        if self._graph is None:
            self._run()
        else:
            self._graph.replay()
        return self._x.clone()

    def _recorded(self) -> torch.cuda.CUDAGraph:
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(_WARM_UPS):
                self._run()
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        # Other threads may use the GPU meanwhile.
        with torch.cuda.graph(graph, capture_error_mode="thread_local"):
            self._run()
        return graph

    def _run(self) -> None:
        rows = self._seeds, self._models, self._tokens
        prepared = self._denoiser.prepare(self._prototypes)
        null = None if self._guidance == 1 else self._denoiser.prepare(self._without)
        write_gaussian(*rows, self._temperature, self._x, self._rounded)
        estimate = self._x if self._estimate is None else self._estimate
        for i, update in enumerate(self._updates):
            prediction = self._denoiser.denoise(self._rounded, i, prepared)
            unconditional = None if null is None else self._denoiser.denoise(self._rounded, i, null)
            apply_update(
                update, self._guidance, *rows, prediction, unconditional,
                self._x, estimate, self._rounded, keeps=self._estimate is not None,
            )  # fmt: skip
            if self._estimate is None:
                estimate = prediction
