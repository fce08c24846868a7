"""GPU memory of processes that train: in segments that grow, unless the user says otherwise."""

import os
import subprocess
import sys

import pytest
import torch

from ray_jobs.training.fitting import allocator_settings


@pytest.mark.parametrize("variable", ["PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF"])
def test_settings_of_the_user_are_left_alone(monkeypatch: pytest.MonkeyPatch, variable: str) -> None:
    for other in ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF"):
        monkeypatch.delenv(other, raising=False)
    assert allocator_settings()
    monkeypatch.setenv(variable, "max_split_size_mb:512")
    assert allocator_settings() == {}


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_freed_block_becomes_part_of_a_larger_one() -> None:
    """No more is reserved than the largest block needs."""
    program = """
import torch
for size in (1, 2, 3):
    block = torch.empty(size * 2**28, dtype=torch.uint8, device="cuda")
    del block
print(torch.cuda.memory_reserved())
"""
    environment = os.environ | allocator_settings()
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True, env=environment
    )
    assert int(done.stdout) < 4 * 2**28
