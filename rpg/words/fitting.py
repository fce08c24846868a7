"""Fitting of encoder and head to written descriptions, one after the other.

The encoder's weights are changed by LoRA (arXiv 2106.09685), so that what is learnt is small; a head is
trained with it and thrown away. Then the head is trained on the embeddings of a fixed set of descriptions,
which takes seconds. Descriptions come from the training properties, and among them are texts that describe
none of the classes.
"""

import math
import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from rpg.errors import RPGError
from rpg.seeds import derived_seed
from rpg.text_encoder import TextEncoder, encoder_digest
from rpg.threads import one_thread
from rpg.words.descriptions import REQUESTS, DescriptionWriter, kinds_of_classes
from rpg.words.embedding import embeddings, padded
from rpg.words.head import ClassHead
from rpg.words.properties import CLASSES, Bits, Part, class_names, out_of_scope, properties
from rpg.words.sentences import adapted_encoder

BASE_MODEL = "sentence-transformers/all-MiniLM-L6-v2"
"""What the adapter's configuration names as its base."""
_FIRST_HIDDEN = 256
_FIRST_DROPOUT = 0.2
"""Of the head that is trained with the encoder."""
_HEAD_DROPOUT = 0.5
_HEAD_BATCH = 256
_OTHER_THINGS = "other_things"
_NONSENSE = "nonsense"


@dataclass(frozen=True)
class FitSettings:
    """How encoder and head are fitted.

    Attributes:
        steps: batches of the encoder.
        descriptions: about the classes, in a batch.
        others: texts that are not about them, in a batch.
        rank: of LoRA's factors.
        adapter_rate: largest learning rate of the factors.
        head_rate: largest learning rate of the head.
        hidden: width of the head's hidden layer.
        scope_weight: of the loss of telling texts about the classes from others.
        head_descriptions: whose embeddings the head is trained on.
        head_epochs: over them.
    """

    steps: int = 320
    descriptions: int = 48
    others: int = 8
    rank: int = 8
    adapter_rate: float = 2e-3
    head_rate: float = 1e-3
    hidden: int = 512
    scope_weight: float = 0.2
    head_descriptions: int = 7000
    head_epochs: int = 40


Progress = Callable[[int, float], None]
"""Is told the number of finished steps and the running loss."""


def fit(
    encoder: Path, out: Path, seed: int, settings: FitSettings, progress: Progress
) -> tuple[TextEncoder, ClassHead]:
    """Fit to the training properties, and write the adapter to the directory `out`.

    Returns:
        The encoder with the adapter merged into it, and the head, which is not calibrated yet.

    Raises:
        RPGError: naming the file of the encoder that is missing or wrong, or if PEFT is not installed.
    """
    fit_adapter(encoder, out, seed, settings, progress)
    adapted = adapted_encoder(encoder, out)
    head = fit_head(adapted, seed, settings)
    head.encoder = encoder_digest(encoder)
    return adapted, head


def fit_head(encoder: TextEncoder, seed: int, settings: FitSettings) -> ClassHead:
    """A head for the embeddings of an encoder, in evaluation mode, on the CPU."""
    torch.manual_seed(seed)
    # Other descriptions than those that the encoder was fitted to.
    rows = _writer().sample(settings.head_descriptions, derived_seed(seed, "head", 0))
    share = settings.others / settings.descriptions
    others = list(islice(_others(derived_seed(seed, "head", 1)), round(share * len(rows))))
    inputs = embeddings(encoder, [text for text, _ in rows] + others)
    bits = torch.tensor([bits for _, bits in rows] + [(0,) * len(CLASSES)] * len(others)).float()
    scope = torch.tensor([1.0] * len(rows) + [0.0] * len(others))
    head = ClassHead(encoder.size, settings.hidden, _HEAD_DROPOUT)
    optimiser = torch.optim.AdamW(head.parameters(), settings.head_rate, weight_decay=0.1)
    batches = math.ceil(len(inputs) / _HEAD_BATCH)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimiser, settings.head_epochs * batches)
    with one_thread():
        for _ in range(settings.head_epochs):
            for rows_of in torch.randperm(len(inputs)).split(_HEAD_BATCH):
                about = scope[rows_of] > 0
                order = torch.cat([rows_of[about], rows_of[~about]])
                loss = _loss(head, inputs[order], bits[rows_of[about]], scope[order], settings)
                optimiser.zero_grad()
                loss.backward()
                optimiser.step()
                schedule.step()
    return head.eval()


def _loss(head: ClassHead, embeddings: Tensor, bits: Tensor, scope: Tensor, settings: FitSettings) -> Tensor:
    """The loss of texts, of which the first `len(bits)` are about the classes."""
    classes, about = head(embeddings)
    of_classes = F.binary_cross_entropy_with_logits(classes[: len(bits)], bits)
    return of_classes + settings.scope_weight * F.binary_cross_entropy_with_logits(about, scope)


def fit_adapter(encoder: Path, out: Path, seed: int, settings: FitSettings, progress: Progress) -> None:
    """Fit LoRA's factors, on a GPU if there is one, and write them to the directory `out`.

    Raises:
        RPGError: naming the file of the encoder that is missing or wrong, or if PEFT is not installed.
    """
    try:
        from peft import LoraConfig, get_peft_model
    except ImportError as error:
        raise RPGError("fitting needs the package peft: pip install 'rpg[dev]'") from error

    torch.manual_seed(seed)
    loaded = TextEncoder(encoder)
    lora = LoraConfig(
        r=settings.rank,
        lora_alpha=2 * settings.rank,
        target_modules=["query", "key", "value", "dense"],
        exclude_modules=["pooler.dense"],
    )
    loaded.network = get_peft_model(loaded.network, lora)
    # The directory of this machine would be written otherwise.
    lora.base_model_name_or_path = BASE_MODEL
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    loaded.network.to(device)
    head = ClassHead(loaded.size, _FIRST_HIDDEN, _FIRST_DROPOUT).to(device)
    rates = (settings.adapter_rate, settings.head_rate)
    groups = [[each for each in loaded.network.parameters() if each.requires_grad], [*head.parameters()]]
    optimiser = torch.optim.AdamW([{"params": group} for group in groups], weight_decay=0.01)
    batches = _batches(seed, settings)
    running = 0.0
    loaded.network.train()
    with one_thread():
        for step in range(1, settings.steps + 1):
            factor = min(1.0, step / 30) * (0.5 + 0.5 * math.cos(math.pi * step / settings.steps))
            for group, rate in zip(optimiser.param_groups, rates, strict=True):
                group["lr"] = rate * factor
            texts, bits, scope = next(batches)
            with torch.autocast(device.type, torch.bfloat16):
                embedded = loaded.embed(*(each.to(device) for each in padded(loaded, texts)))
            loss = _loss(head, embedded.float(), bits.to(device), scope.to(device), settings)
            optimiser.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_([each for group in groups for each in group], 1.0)
            optimiser.step()
            running = loss.item() if step == 1 else 0.98 * running + 0.02 * loss.item()
            progress(step, running)
    # PEFT asks Hugging Face for the base's vocabulary unless it is told that the embeddings are not changed.
    loaded.network.save_pretrained(str(out), save_embedding_layers=False)


def _writer() -> DescriptionWriter:
    return DescriptionWriter(class_names(), [*properties(Part.training), *kinds_of_classes(class_names())])


def _batches(seed: int, settings: FitSettings) -> Iterator[tuple[list[str], Tensor, Tensor]]:
    """Endless batches: texts, bits [descriptions, 10] of the first ones, and 1 for each of these, else 0."""
    writer = DescriptionWriter(class_names(), [*properties(Part.training), *kinds_of_classes(class_names())])
    described, others = writer.stream(seed), _others(seed)
    scope = torch.tensor([1.0] * settings.descriptions + [0.0] * settings.others)
    while True:
        rows: list[tuple[str, Bits]] = [next(described) for _ in range(settings.descriptions)]
        texts = [text for text, _ in rows] + [next(others) for _ in range(settings.others)]
        yield texts, torch.tensor([bits for _, bits in rows], dtype=torch.float32), scope


def _others(seed: int) -> Iterator[str]:
    """Endless texts that describe none of the classes."""
    chance = random.Random(seed)
    kinds = out_of_scope(Part.training)
    letters = "abcdefghijklmnopqrstuvwxyz"
    while True:
        kind = chance.choice(list(kinds))
        text = chance.choice(kinds[kind])
        if kind == _OTHER_THINGS or chance.random() < 0.15:
            text = chance.choice(REQUESTS).format(text)
        elif kind == _NONSENSE and chance.random() < 0.5:
            words = [chance.choices(letters, k=chance.randint(2, 9)) for _ in range(chance.randint(1, 8))]
            text = " ".join("".join(word) for word in words)
        yield text[0].upper() + text[1:] if chance.random() < 0.5 else text
