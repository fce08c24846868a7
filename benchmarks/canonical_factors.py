"""What canonical factors do for a generator of LoRA adapters: python -m benchmarks.canonical_factors DIR

PEFT adapters of rank 4 are trained for the 15 sets of four components, four adapters a set; three sets are
held out. A small generator is fitted to the adapters as they are and in canonical factors, and its products
B A for the held-out sets are compared with those that were to be learned.
"""

import sys
import time
from itertools import product
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn

from rpg.collection.adapter import factor_pairs, product_distances
from rpg.collection.checkpoint import read_checkpoint
from rpg.collection.manifest import write_manifest
from rpg.collection.register import register
from rpg.collection.shard_file import write_shard
from rpg.collection.shards import ShardedCollection
from rpg.collection.statistics import LayoutStatistics
from rpg.config import (
    ConditionConfig,
    ConditionKind,
    DenoiserConfig,
    GeneratorConfig,
    Normalisation,
    Precision,
    RecurrentConfig,
    SamplingConfig,
    TokenDtype,
    TrainConfig,
)
from rpg.sampling.generate import generate_models
from rpg.training.fit import fit, new_trainer

WIDTH, RANK, COPIES = 16, 4, 4
HELD_OUT = [(1, 0, 1, 0), (0, 1, 1, 1), (1, 1, 0, 1)]
CONDITIONS = [c for c in product((0, 1), repeat=RANK) if any(c)]


def target(condition: tuple[int, ...], layer: int) -> Tensor:
    """The product that a layer's adapter is to learn: a sum of the components in the set."""
    generator = torch.Generator().manual_seed(100 + layer)
    u, v = torch.randn(2, RANK, WIDTH, generator=generator) / WIDTH**0.5
    size = torch.tensor(condition) * torch.tensor([3.0, 2.5, 2.0, 1.5])
    return torch.einsum("k,ki,kj->ij", size, u, v)


def train_adapter(path: Path, condition: tuple[int, ...], initialisation: int, order: int) -> None:
    """Train an adapter with PEFT until its products are the targets but for the noise of training."""
    torch.manual_seed(0)
    base = nn.ModuleDict({f"layer{i}": nn.Linear(WIDTH, WIDTH, bias=False) for i in range(2)})
    torch.manual_seed(initialisation)
    config = LoraConfig(r=RANK, lora_alpha=RANK, target_modules=["layer0", "layer1"])
    adapted = get_peft_model(base, config)
    optimiser = torch.optim.Adam([p for p in adapted.parameters() if p.requires_grad], 2e-2)
    generator = torch.Generator().manual_seed(order)
    for _ in range(250):
        x = torch.randn(32, WIDTH, generator=generator)
        loss = torch.zeros(())
        for i in range(2):
            layer = adapted.base_model.model[f"layer{i}"]
            wanted = x @ (layer.base_layer.weight + target(condition, i)).T
            loss = loss + (layer(x) - wanted).square().mean()
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
    adapted.save_pretrained(path)


def product_error(state_dict: dict[str, Tensor], condition: tuple[int, ...]) -> float:
    """Distance of an adapter's products from the targets, relative to these."""
    pairs = factor_pairs(state_dict)
    wanted = [target(condition, i) for i in range(2)]
    found = [state_dict[b] @ state_dict[a] for a, b in pairs]
    square = sum(float((f - w).square().sum()) for f, w in zip(found, wanted, strict=True))
    return float((square / sum(float(w.square().sum()) for w in wanted)) ** 0.5)


def measure(root: Path, canonical: bool, steps: int) -> None:
    """Register, fit, generate, and print a line."""
    pattern = "c{c:digits}_{copy}"
    held = [f"heldout=c{''.join(map(str, c))}_*" for c in HELD_OUT]
    collection, _ = register(root, pattern=pattern, splits=held, canonical_factors=canonical)
    entries = collection.splits["train"]
    state_dicts = [(entry.file, collection.read(entry)) for entry in entries]
    statistics = LayoutStatistics(state_dicts[0][1])
    for _, state_dict in state_dicts:
        statistics.update(state_dict)
    layout = statistics.layout(RANK * WIDTH, Normalisation.residual)
    spread = sum(spec.scale**2 * spec.numel for spec in layout.specs) ** 0.5
    size = sum(float(t.square().sum()) for _, s in state_dicts for t in s.values()) / len(state_dicts)
    apart = [
        product_distances(state_dicts[i][1], state_dicts[i + 1][1])
        for i in range(0, len(state_dicts), COPIES)
    ]
    products, factors = (sum(column) / len(apart) for column in zip(*apart, strict=True))
    with TemporaryDirectory() as temporary:
        shards = Path(temporary) / "shards"
        info = write_shard(shards / "shard-0.arrow", layout, state_dicts, TokenDtype.float32)
        write_manifest(shards, layout, [info], entries, TokenDtype.float32)
        generator = GeneratorConfig(
            recurrent=RecurrentConfig(width=64, depth=1, state_size=16, head_size=16),
            denoiser=DenoiserConfig(width=128, depth=3),
            condition=ConditionConfig(kind=ConditionKind.vector, size=RANK, width=32),
        )
        train = TrainConfig(
            steps=steps, checkpoints_per_step=32, tokens_per_checkpoint=layout.tokens, save_every=steps,
            precision=Precision.float32, ema_decay=0.99,
        )  # fmt: skip
        began = time.perf_counter()
        trainer = new_trainer(ShardedCollection.open(shards), generator, train, 0, torch.device("cpu"))
        fit(trainer, ShardedCollection.open(shards), 0, lambda _: None, lambda *_: None)
        seconds = time.perf_counter() - began
        seen = [c for c in CONDITIONS if c not in HELD_OUT]
        asked = HELD_OUT + seen
        conditions = [list(map(float, c)) for c in asked]
        fitted = trainer.whole_average()
        assert fitted is not None
        files = generate_models(fitted, conditions, 4, 0, Path(temporary) / "out", SamplingConfig())
        errors = [product_error(read_checkpoint(file), asked[i // 4]) for i, file in enumerate(files)]
    unseen = errors[: 4 * len(HELD_OUT)]
    known = errors[4 * len(HELD_OUT) :]
    own = [
        product_error(state_dict, tuple(map(int, entry.condition or [])))
        for entry, (_, state_dict) in zip(entries, state_dicts, strict=True)
    ]
    centre = [product_error(layout.centre, c) for c in HELD_OUT]
    print(
        f"canonical={canonical}: distance to centre {spread / size**0.5:.2f}; two of a task apart in factors "
        f"{factors:.2f}, in products {products:.2f}; product error: trained {sum(own) / len(own):.3f}, "
        f"generated, trained tasks {sum(known) / len(known):.3f}, "
        f"held out {sum(unseen) / len(unseen):.3f}, centre {sum(centre) / len(centre):.3f}; {seconds:.0f} s",
        flush=True,
    )


if __name__ == "__main__":
    directory, steps = Path(sys.argv[1]), int(sys.argv[2]) if len(sys.argv) > 2 else 1500
    for name, initialisations in (("one initialisation", 1), ("an initialisation each", 10**6)):
        root = directory / name.replace(" ", "_")
        for number, condition in enumerate(CONDITIONS):
            for copy in range(COPIES):
                index = number * COPIES + copy
                path = root / f"c{''.join(map(str, condition))}_{copy}"
                if not path.exists():
                    train_adapter(path, condition, index % initialisations, index)
        print(name)
        for canonical in (False, True):
            measure(root, canonical, steps)
