"""A large tensor in stage `shard`: no process holds more of it than the largest embeddings allow."""

import subprocess
import sys
import time
from collections import defaultdict
from pathlib import Path

import pytest
import torch

from rpg.collection.checkpoint import write_checkpoint
from rpg.collection.collection import Collection, Entry
from rpg.storage.files import sha256

_EMBEDDING = 151_936 * 896
"""Values of the embedding of Qwen2.5-0.5B."""
_MOST_BYTES = 3.1e9
"""What a process may hold of an embedding of this size. Workers come to 2.9 to 3.05 GB, from run to run."""
_VALUES = _EMBEDDING // 4
_BASE_BYTES = 0.7e9
"""What a process of the stage holds without any checkpoint."""
_BLOCK_BYTES = 40e6
"""What the blocks take that a tensor is worked on in, which is the same for larger ones."""

_STAGE = """
import sys
from pathlib import Path
import ray
from ray_jobs import shard
from rpg.config import CollectConfig, Config, ShardConfig

if __name__ == "__main__":
    ray.init(address="local", num_cpus=1, include_dashboard=False, log_to_driver=False)
    for name in ("small", "large"):
        directory = Path(sys.argv[1]) / name
        collect = CollectConfig(directory=str(directory / "collection"))
        config = Config(output=str(directory / "run"), collect=collect, shard=ShardConfig(token_size=8192))
        shard.run(config)
        (directory / "done").touch()
    ray.shutdown()
"""


def make(directory: Path, values: int, dtype: torch.dtype) -> None:
    directory.mkdir(parents=True)
    entries = []
    for i in range(3):
        path = directory / f"{i}.safetensors"
        drawn = torch.empty(values, dtype=dtype).normal_(generator=torch.Generator().manual_seed(i))
        write_checkpoint(path, {"embed_tokens.weight": drawn}, {})
        entries.append(Entry(path.name, sha256(path)))
    Collection(directory, {}, entries).save()


def peak_resident(session: int) -> dict[str, int]:
    """Most bytes that were ever resident of the driver and of the largest worker, as the kernel counts them.

    What was resident at the moment of a reading would miss the peak where the CPUs have other work.
    """
    found: dict[str, int] = defaultdict(int)
    for process in Path("/proc").iterdir():
        if not process.name.isdigit():
            continue
        try:
            if int((process / "stat").read_text().rpartition(")")[2].split()[3]) != session:
                continue
            is_worker = (process / "cmdline").read_bytes().startswith(b"ray::")
            status = dict(line.split(":", 1) for line in (process / "status").read_text().splitlines())
            size = 1024 * int(status["VmHWM"].split()[0])
        except (OSError, KeyError):
            continue
        if is_worker or int(process.name) == session:
            who = "worker" if is_worker else "driver"
            found[who] = max(found[who], size)
    return found


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_what_a_large_tensor_adds_to_each_process_is_bounded(dtype: torch.dtype, tmp_path: Path) -> None:
    make(tmp_path / "small" / "collection", 10_000, dtype)
    make(tmp_path / "large" / "collection", _VALUES, dtype)
    stage = subprocess.Popen([sys.executable, "-c", _STAGE, str(tmp_path)], start_new_session=True)
    small: dict[str, int] = defaultdict(int)
    large: dict[str, int] = defaultdict(int)
    try:
        while stage.poll() is None:
            peaks = large if (tmp_path / "small" / "done").exists() else small
            for who, size in peak_resident(stage.pid).items():
                peaks[who] = max(peaks[who], size)
            time.sleep(0.02)
    finally:
        stage.kill()
        stage.wait()
    assert (tmp_path / "large" / "done").exists()
    assert not (tmp_path / "large" / "run" / "shards" / "pending").exists()
    for who in ("driver", "worker"):
        added = large[who] - small[who]
        at_full_size = _BASE_BYTES + _BLOCK_BYTES + (added - _BLOCK_BYTES) * _EMBEDDING / _VALUES
        assert at_full_size < _MOST_BYTES, f"{who}: {added / 1e6:.0f} MB"
        # Less would say that the tensor was never there as float64.
        assert added > 8 * _VALUES
