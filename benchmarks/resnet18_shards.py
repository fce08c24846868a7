"""Shards of networks of ResNet-18's size, and the `fast` generator for them, which other benchmarks train."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from torchvision.models import resnet18

from rpg.collection.collection import Entry
from rpg.collection.manifest import write_manifest
from rpg.collection.shard_file import write_shard
from rpg.collection.statistics import LayoutStatistics
from rpg.config import (
    ConditionConfig,
    DenoiserConfig,
    GeneratorConfig,
    Normalisation,
    RecurrentConfig,
    TokenDtype,
)

CONDITION_WIDTH = 16


@dataclass(frozen=True)
class Size:
    """A collection, and the generator that is trained on it."""

    checkpoints: int
    token_size: int
    generator: GeneratorConfig


FULL = Size(
    checkpoints=32,
    token_size=8192,
    generator=GeneratorConfig(
        recurrent=RecurrentConfig(width=1024, depth=1, expand=1, state_size=64),
        denoiser=DenoiserConfig(width=4096, depth=4),
        condition=ConditionConfig(width=1024),
    ),
)
TINY = Size(
    checkpoints=4,
    token_size=8192,
    generator=GeneratorConfig(
        recurrent=RecurrentConfig(width=16, head_size=8, state_size=8),
        denoiser=DenoiserConfig(width=32, depth=1),
        condition=ConditionConfig(width=16),
    ),
)


def noised(template: Mapping[str, Tensor], random: torch.Generator) -> dict[str, Tensor]:
    """A network like `template` with noise on its weights."""
    return {
        name: value + 0.01 * torch.rand(value.shape, generator=random) if value.is_floating_point() else value
        for name, value in template.items()
    }


def write_collection(directory: Path, size: Size) -> None:
    """Shards of ResNet-18s with noise on their weights."""
    template = resnet18(weights=None).state_dict()
    random = torch.Generator().manual_seed(0)

    found = LayoutStatistics(template)
    for _ in range(2):
        found.update(noised(template, random))
    layout = found.layout(size.token_size, Normalisation.residual)
    entries = [
        Entry(f"{i:04d}", "", torch.rand(CONDITION_WIDTH, generator=random).tolist())
        for i in range(size.checkpoints)
    ]
    shards = [
        write_shard(
            directory / f"{i:05d}.arrow", layout, [(entry.file, noised(template, random))], TokenDtype.float32
        )
        for i, entry in enumerate(entries)
    ]
    write_manifest(directory, layout, shards, entries, TokenDtype.float32)
