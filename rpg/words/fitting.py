"""Fitting of encoder and head to written descriptions, one after the other.

The weights of the encoder's upper layers are changed by LoRA (arXiv 2106.09685), so that what is learnt is
small; a head is trained with it and thrown away. Then the head is trained on the embeddings of other
descriptions, which takes seconds. Descriptions come from the training properties and facts, and among them
are texts that describe none of the classes.
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
from rpg.words.descriptions import REQUESTS, DescriptionWriter, asked, kinds_of_classes, listed
from rpg.words.embedding import embeddings
from rpg.words.facts import facts
from rpg.words.head import ClassHead, Memory
from rpg.words.layers import embed_states, lower_outputs, number_of_layers, upper_layers
from rpg.words.properties import CLASSES, OTHER_THINGS, Bits, Part, class_names, out_of_scope, properties
from rpg.words.sentences import adapted_encoder
from rpg.words.typos import mistyped

BASE_MODEL = "sentence-transformers/all-MiniLM-L6-v2"
"""What the adapter's configuration names as its base."""
_FIRST_HIDDEN = 256
_FIRST_DROPOUT = 0.2
"""Of the head that is trained with the encoder."""
_HEAD_DROPOUT = 0.5
_HEAD_BATCH = 256
_NONSENSE = "nonsense"
_OTHER_THINGS_SHARE = 0.5
"""Of the texts that describe none of the classes."""
_MISTYPED_SHARE = 0.04
"""Of all texts."""


@dataclass(frozen=True)
class FitSettings:
    """How encoder and head are fitted.

    Attributes:
        steps: batches of the encoder.
        pool: descriptions about the classes that batches are drawn from.
        descriptions: about the classes, in a batch.
        others: texts that are not about them, in a batch.
        first_layer: the lowest layer of the encoder that is changed.
        rank: of LoRA's factors.
        adapter_rate: largest learning rate of the factors.
        head_rate: largest learning rate of the head.
        hidden: width of the head's hidden layer.
        scope_weight: of the loss of telling texts about the classes from others.
        head_descriptions: whose embeddings the head is trained on.
        head_epochs: over them.
    """

    steps: int = 3000
    pool: int = 26_000
    descriptions: int = 48
    others: int = 12
    first_layer: int = 3
    rank: int = 16
    adapter_rate: float = 1e-3
    head_rate: float = 1e-3
    hidden: int = 512
    scope_weight: float = 0.2
    head_descriptions: int = 7000
    head_epochs: int = 15


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
    rows = _descriptions(settings.head_descriptions, derived_seed(seed, "head", 0))
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
    head.memory = Memory.of(inputs[scope > 0], bits[scope > 0])
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
    pool = _pool(encoder, seed, settings)
    upper = upper_layers(encoder, settings.first_layer)
    lora = LoraConfig(
        r=settings.rank,
        lora_alpha=2 * settings.rank,
        target_modules=["query", "key", "value", "dense"],
        exclude_modules=["pooler.dense"],
        layers_to_transform=list(range(settings.first_layer, number_of_layers(upper))),
        layers_pattern="layer",
    )
    upper.network = get_peft_model(upper.network, lora)
    # The directory of this machine would be written otherwise.
    lora.base_model_name_or_path = BASE_MODEL
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    upper.network.to(device)
    head = ClassHead(upper.size, _FIRST_HIDDEN, _FIRST_DROPOUT).to(device)
    rates = (settings.adapter_rate, settings.head_rate)
    groups = [[each for each in upper.network.parameters() if each.requires_grad], [*head.parameters()]]
    optimiser = torch.optim.AdamW([{"params": group} for group in groups], weight_decay=0.01)
    running = 0.0
    upper.network.train()
    with one_thread():
        for step, (states, bits, scope) in enumerate(pool.batches(settings), 1):
            factor = min(1.0, step / 50) * (0.5 + 0.5 * math.cos(math.pi * step / settings.steps))
            for group, rate in zip(optimiser.param_groups, rates, strict=True):
                group["lr"] = rate * factor
            with torch.autocast(device.type, torch.bfloat16):
                embedded = embed_states(upper, states, device)
            loss = _loss(head, embedded.float(), bits.to(device), scope.to(device), settings)
            optimiser.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_([each for group in groups for each in group], 1.0)
            optimiser.step()
            running = loss.item() if step == 1 else 0.98 * running + 0.02 * loss.item()
            progress(step, running)
    # Half precision halves the file; the factors are float32 again when they are merged.
    for each in groups[0]:
        each.data = each.data.half()
    # PEFT asks Hugging Face for the base's vocabulary unless it is told that the embeddings are not changed.
    upper.network.save_pretrained(str(out), save_embedding_layers=False)


@dataclass(frozen=True)
class _Pool:
    """Texts as the trained layers read them, and what they mean.

    Attributes:
        described: states [tokens, size] of each description.
        bits: of each description [descriptions, 10].
        others: states of texts that describe none of the classes.
    """

    described: list[Tensor]
    bits: Tensor
    others: list[Tensor]

    def batches(self, settings: FitSettings) -> Iterator[tuple[list[Tensor], Tensor, Tensor]]:
        """`settings.steps` batches, in which every description comes up once before any comes up again.

        Each is states, bits [descriptions, 10] of the first ones, and 1 for each of these, else 0.
        """
        scope = torch.tensor([1.0] * settings.descriptions + [0.0] * settings.others)
        described, others = _endless(len(self.described)), _endless(len(self.others))
        for _ in range(settings.steps):
            rows = list(islice(described, settings.descriptions))
            states = [self.described[i] for i in rows]
            states += [self.others[i] for i in islice(others, settings.others)]
            yield states, self.bits[rows], scope


def _endless(number: int) -> Iterator[int]:
    while True:
        yield from torch.randperm(number).tolist()


def _pool(encoder: Path, seed: int, settings: FitSettings) -> _Pool:
    rows = _descriptions(settings.pool, seed)
    others = list(islice(_others(seed), settings.pool * settings.others // settings.descriptions))
    states = lower_outputs(encoder, settings.first_layer, [text for text, _ in rows] + others)
    bits = torch.tensor([bits for _, bits in rows], dtype=torch.float32)
    return _Pool(states[: len(rows)], bits, states[len(rows) :])


def _descriptions(number: int, seed: int) -> list[tuple[str, Bits]]:
    """Descriptions of the classes with their bits, some of them mistyped."""
    known = [*properties(Part.training), *kinds_of_classes(class_names())]
    chance = random.Random(derived_seed(seed, "typos", 0))
    rows = DescriptionWriter(class_names(), known, facts()).sample(number, seed)
    return [(_typed(text, chance), bits) for text, bits in rows]


def _others(seed: int) -> Iterator[str]:
    """Endless texts that describe none of the classes."""
    chance = random.Random(seed)
    kinds = dict(out_of_scope(Part.training))
    things = kinds.pop(OTHER_THINGS)
    letters = "abcdefghijklmnopqrstuvwxyz"
    while True:
        if chance.random() < _OTHER_THINGS_SHARE:
            names = chance.sample(things, chance.choice((1, 1, 1, 2, 2, 3)))
            yield _typed(asked(listed(names, chance), chance), chance)
            continue
        kind = chance.choice(list(kinds))
        text = chance.choice(kinds[kind])
        if chance.random() < 0.15:
            text = chance.choice(REQUESTS).format(text)
        elif kind == _NONSENSE and chance.random() < 0.5:
            words = [chance.choices(letters, k=chance.randint(2, 9)) for _ in range(chance.randint(1, 8))]
            text = " ".join("".join(word) for word in words)
        yield text[0].upper() + text[1:] if chance.random() < 0.5 else text


def _typed(text: str, chance: random.Random) -> str:
    return mistyped(text, chance) if chance.random() < _MISTYPED_SHARE else text
