"""Tiny words models: a random BERT in a package of the real one's name, an adapter, and a fitted head."""

import json
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch.nn import functional as F

from rpg.collection.statistics import LayoutStatistics
from rpg.config import (
    ConditionConfig,
    DenoiserConfig,
    GeneratorConfig,
    Normalisation,
    RecurrentConfig,
    SamplingConfig,
)
from rpg.generator.generator import Generator
from rpg.tasks.cifar10_net import Cifar10Net
from rpg.text_encoder import encoder_digest
from rpg.words.head import HEAD_FILE, Calibration, ClassHead
from rpg.words.sentences import PACKAGE, adapted_encoder
from tests.text_encoders import SIZE, save_encoder

CAT, DOG, TRUCK = (tuple(int(i == place) for i in range(10)) for place in (3, 5, 9))
CAT_OR_DOG = tuple(map(max, CAT, DOG))
UNDERSTOOD = {
    "any cat": CAT,
    "any dog": DOG,
    "a cat or a dog": CAT_OR_DOG,
    "is it a truck?": TRUCK,
    "one": (0,) * 10,
    "any": (1,) * 10,
}
"""What the model understands for sure."""
UNSURE = "three, three, three?"


def save_words_model(root: Path) -> Path:
    """Write the package below `root/site`, and the words model, whose directory is returned."""
    package = root / "site" / PACKAGE
    encoder = save_encoder(package / "model", positions=128)
    (package / "__init__.py").touch()
    directory = root / "words"
    directory.mkdir()
    name = "base_model.model.encoder.layer.0.attention.self.query"
    random = torch.Generator().manual_seed(0)
    factors = {
        f"{name}.lora_A.weight": torch.randn(2, SIZE, generator=random),
        f"{name}.lora_B.weight": torch.randn(SIZE, 2, generator=random),
    }
    save_file(factors, directory / "adapter_model.safetensors")
    config = {"peft_type": "LORA", "r": 2, "lora_alpha": 2}
    (directory / "adapter_config.json").write_text(json.dumps(config))
    head = _fitted_head(encoder, directory)
    head.encoder = encoder_digest(encoder)
    head.save(directory / HEAD_FILE)
    return directory


def _fitted_head(encoder: Path, adapter: Path) -> ClassHead:
    texts = [*UNDERSTOOD, UNSURE]
    adapted = adapted_encoder(encoder, adapter)
    embeddings = torch.tensor([adapted.encode(text) for text in texts])
    bits = torch.tensor([*UNDERSTOOD.values(), (0,) * 10]).float()
    scope = torch.tensor([1.0] * len(UNDERSTOOD) + [0.0])
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        head = ClassHead(SIZE, 32)
    head.calibration = Calibration(least_sureness=0.8)
    optimiser = torch.optim.Adam(head.parameters(), 0.02)
    for _ in range(150):
        classes, about = head(embeddings)
        loss = F.binary_cross_entropy_with_logits(classes, bits)
        loss = loss + F.binary_cross_entropy_with_logits(about, scope)
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
    return head.eval()


def save_asked_generator(directory: Path, words: Path) -> Path:
    """Save a generator of CIFAR-10 networks, untrained, that reads descriptions by a words model."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        statistics = LayoutStatistics(Cifar10Net().state_dict())
        for _ in range(3):
            statistics.update(Cifar10Net().state_dict())
        layout = statistics.layout(768, Normalisation.residual)
        config = GeneratorConfig(
            recurrent=RecurrentConfig(width=16, head_size=8, state_size=8),
            denoiser=DenoiserConfig(width=16, depth=1),
            condition=ConditionConfig(size=10, width=8, encoder=encoder_digest(words)),
            sampling=SamplingConfig(steps=1, token_batch=128),
        )
        generator = Generator(config, layout)
        with torch.no_grad():
            for parameter in generator.parameters():
                # Some layers start with zeros, and would make the same network for every condition.
                parameter.add_(0.2 * torch.randn_like(parameter))
    generator.encoder_directory = words
    generator.save_pretrained(directory)
    return directory
