"""One, two and four workers, whole or sharded, with moments in 32 or in 8 bits: the same training.

Real processes and gloo; what each of them runs is `train_together.py`.
"""

import json
import os
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from rpg.collection.shards import ShardedCollection
from rpg.generator.generator import Generator
from rpg.training.trainer import STATE_FILE
from rpg.training.workers import Workers

pytestmark = pytest.mark.slow

SCRIPT = Path(__file__).with_name("train_together.py")
LAST = 12


def dequantised(moment: Tensor | dict[str, Tensor]) -> Tensor:
    """The values of a moment; an 8-bit one is a level for each value times a scale for each block of 256."""
    if isinstance(moment, Tensor):
        return moment
    codes, blocks = moment["codes"].flatten().tolist(), moment["scale"].repeat_interleave(256)
    return (moment["levels"][codes] * blocks).view(moment["codes"].shape)


Run = tuple[str, int, str, list[str]]
"""Its name, number of workers, the run to go on from, and scenarios."""


class Together:
    """Runs scenarios with some number of workers; keeps what they wrote."""

    def __init__(self, root: Path, shards: Path, *device: str) -> None:
        self._root = root
        self._shards = shards
        self._device = device

    def run(self, runs: Sequence[Run]) -> None:
        environment = {**os.environ, "PYTHONPATH": str(SCRIPT.parents[2]), "OMP_NUM_THREADS": "1"}
        for name, *_ in runs:
            (self._root / name).mkdir()
        # Importing PyTorch takes longer than any of the runs: each worker takes part in all of them.
        text = json.dumps(runs)
        processes = [
            subprocess.Popen(
                [sys.executable, SCRIPT, self._shards, self._root, str(rank), text, *self._device],
                env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
            )
            for rank in range(max(workers for _, workers, *_ in runs))
        ]  # fmt: skip
        try:
            for process in processes:
                printed, _ = process.communicate(timeout=500)
                assert process.returncode == 0, printed
        finally:
            for process in processes:
                process.kill()

    def history(self, run: str) -> list[dict[str, Any]]:
        rows: list[dict[str, Any]] = json.loads((self._root / run / "history.json").read_text())
        return rows

    def state(self, run: str) -> dict[str, Tensor]:
        state = torch.load(self._root / run / f"step_{LAST}" / STATE_FILE, weights_only=True)
        assert state["step"] == LAST
        flat = {f"{part}.{k}": v for part in ("generator", "average") for k, v in state[part].items()}
        for name, values in state["optimiser"].items():
            flat |= {f"optimiser.{name}.{key}": dequantised(value) for key, value in values.items()}
        return flat

    def generator(self, run: str) -> Generator:
        return Generator.from_pretrained(self._root / run / "generator")


@pytest.fixture(scope="module")
def together(
    tmp_path_factory: pytest.TempPathFactory, make_collection: Callable[..., ShardedCollection]
) -> Together:
    root = tmp_path_factory.mktemp("together")
    make_collection(root / "shards", token_size=64)
    runs = Together(root, root / "shards")
    sharded = ["fast_sharded", "unet_sharded", "transformer_sharded"]
    runs.run(
        [
            ("1", 1, "", ["fast", "unet", "transformer", "half", "wide", "eight_bits"]),
            ("2", 2, "", ["fast", "unet", "transformer", *sharded, "half", "half_sharded", "eight_bits"]),
            ("4", 4, "", ["fast", "unet", "fast_sharded", "half"]),
            ("1 after 2", 1, "2", ["fast_sharded"]),
            ("2 after 4", 2, "4", ["fast_sharded"]),
            ("1 after 1", 1, "1", ["eight_bits"]),
        ]
    )
    return runs


def assert_same_curve(one: list[dict[str, Any]], other: list[dict[str, Any]], tolerance: float) -> None:
    for row, expected in zip(one, other, strict=True):
        for key in ("step", "loss", "gradient_norm", "learning_rate"):
            assert row[key] == pytest.approx(expected[key], rel=tolerance), key
        assert row["loss_by_noise"] == pytest.approx(expected["loss_by_noise"], rel=10 * tolerance)


def lost_in_batch_norm(name: str) -> bool:
    """BatchNorm takes the biases before it away again: their gradients are mere rounding errors."""
    return "coder_list" in name and name.endswith((".0.bias", "running_mean"))


@pytest.mark.parametrize(
    "run",
    [
        *("2/fast", "2/unet", "2/transformer", "4/fast", "4/unet"),
        *("2/fast_sharded", "2/unet_sharded", "2/transformer_sharded", "4/fast_sharded"),
    ],
)
def test_workers_train_like_a_single_one(together: Together, run: str) -> None:
    alone = "1/" + run.split("/")[1].removesuffix("_sharded")
    assert_same_curve(together.history(run), together.history(alone), 2e-4 if "unet" in run else 2e-5)
    found, expected = together.state(run), together.state(alone)
    assert found.keys() == expected.keys()
    # Adam scales rounding errors up where gradients are next to nothing.
    tolerance = 5e-4 if "unet" in run else 1e-5
    for name, tensor in expected.items():
        if not lost_in_batch_norm(name):
            torch.testing.assert_close(found[name], tensor, rtol=1e-4, atol=tolerance)
    assert any(tensor.abs().max() > 0 for name, tensor in expected.items() if name.startswith("optimiser"))


@pytest.mark.parametrize("run", ["2/half", "4/half", "2/half_sharded"])
def test_workers_train_in_half_precision(together: Together, run: str) -> None:
    """Products and the exchange of gradients are rounded to bfloat16, which depends on how the batch is
    shared; what is learned does not."""
    alone = together.history("1/half")
    assert_same_curve(together.history(run), alone, 1e-2)
    assert [row["loss"] for row in alone] != [row["loss"] for row in together.history("1/fast")]


def test_gradients_were_clipped_in_some_steps(together: Together) -> None:
    norms = [row["gradient_norm"] for row in together.history("1/fast")]
    assert min(norms) < 0.7 < max(norms)


@pytest.mark.parametrize("run", ["2/fast", "2/fast_sharded", "2/unet_sharded"])
def test_the_saved_generator_is_the_average(together: Together, run: str) -> None:
    state = together.state(run)
    weights = together.generator(run).state_dict()
    assert weights.keys() == {n.removeprefix("average.") for n in state if n.startswith("average.")}
    for name, tensor in weights.items():
        assert torch.equal(tensor, state[f"average.{name}"])


@pytest.mark.parametrize(("resumed", "whole"), [("1 after 2", "2"), ("2 after 4", "4")])
def test_any_number_of_workers_can_resume(together: Together, resumed: str, whole: str) -> None:
    run = "fast_sharded"
    assert_same_curve(together.history(f"{resumed}/{run}"), together.history(f"{whole}/{run}")[5:], 2e-5)
    found, expected = together.state(f"{resumed}/{run}"), together.state(f"{whole}/{run}")
    for name, tensor in expected.items():
        torch.testing.assert_close(found[name], tensor, rtol=1e-4, atol=1e-5)


def test_moments_of_eight_bits_train_like_those_of_thirty_two(together: Together) -> None:
    assert_same_curve(together.history("1/eight_bits"), together.history("1/wide"), 2e-3)
    moments, exact = together.state("1/eight_bits"), together.state("1/wide")
    name = "optimiser.denoiser.blocks.0.0.weight.exp_avg"
    blocks = moments[name].view(-1, 256)
    # With 8 bits, a block has at most 256 different multiples of its largest value.
    assert max(len(row.unique()) for row in blocks / blocks.abs().amax(1, keepdim=True)) <= 256
    assert not torch.equal(moments[name], exact[name])
    assert torch.nn.functional.cosine_similarity(moments[name].flatten(), exact[name].flatten(), 0) > 0.99


def test_moments_of_eight_bits_can_be_sharded(together: Together) -> None:
    """Each worker quantises its own share. Rounding errors seldom change a level, but then visibly."""
    assert_same_curve(together.history("2/eight_bits"), together.history("1/eight_bits"), 1e-4)
    found, expected, exact = (together.state(run) for run in ("2/eight_bits", "1/eight_bits", "1/wide"))
    for name, tensor in expected.items():
        if name.startswith("generator.") and tensor.numel() >= 8192:
            apart = (found[name] - tensor).abs()
            assert (apart > 1e-5).float().mean() < 0.05, name
            assert apart.mean() < 0.05 * (tensor - exact[name]).abs().mean(), name


def test_moments_of_eight_bits_resume_bit_for_bit(together: Together) -> None:
    found, expected = together.state("1 after 1/eight_bits"), together.state("1/eight_bits")
    for name, tensor in expected.items():
        assert torch.equal(found[name], tensor), name


@pytest.mark.gpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices")
def test_two_gpus_train_like_one(tmp_path: Path, make_collection: Callable[..., ShardedCollection]) -> None:
    """A step is a CUDA graph on one as on two, in which the second one exchanges gradients."""
    make_collection(tmp_path / "shards", token_size=64)
    runs = Together(tmp_path, tmp_path / "shards", "cuda")
    scenarios = ["fast", "unet", "half"]
    runs.run([("1", 1, "", scenarios), ("2", 2, "", [*scenarios, "fast_sharded", "half_sharded"])])
    for run, alone, tolerance in (
        ("2/fast", "1/fast", 1e-3),
        ("2/fast_sharded", "1/fast", 1e-3),
        ("2/unet", "1/unet", 1e-2),
        ("2/half", "1/half", 1e-2),
        ("2/half_sharded", "1/half", 1e-2),
    ):
        assert_same_curve(runs.history(run), runs.history(alone), tolerance)


def test_rows_are_shared_without_gaps() -> None:
    for total in (4, 7, 32):
        shares = [Workers(rank, 4).rows(total) for rank in range(4)]
        assert [row for share in shares for row in share] == list(range(total))
