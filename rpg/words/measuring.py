"""How much of descriptions is understood: the share of right bits, calibration, and what is not sure."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from rpg.text_encoder import TextEncoder
from rpg.threads import one_thread
from rpg.words.closeness import cosines
from rpg.words.embedding import embeddings
from rpg.words.facts import as_properties, facts
from rpg.words.head import Calibration, ClassHead
from rpg.words.properties import OTHER_THINGS, Bits, Part, out_of_scope, properties
from rpg.words.sentences import sureness_of

_REQUESTS = ("select all {}", "{}", "find {}", "identify all {}", "I need a classifier for {}")
"""The phrases of a property are asked for in these ways in turn."""
_BOUNDS = torch.linspace(0.5, 1, 101)


@dataclass(frozen=True)
class Measured:
    """Descriptions, their bits, and what a head says of them.

    Attributes:
        texts: the descriptions.
        weights: of each description [texts]; those of one property add up to 1.
        bits: [texts, 10].
        classes: probabilities of the classes [texts, 10].
        sureness: [texts].
    """

    texts: tuple[str, ...]
    weights: Tensor
    bits: Tensor
    classes: Tensor
    sureness: Tensor

    @property
    def right(self) -> Tensor:
        """The share of right bits of every description [texts]."""
        return ((self.classes > 0.5) == (self.bits > 0.5)).float().mean(1)

    def share_right(self, chosen: Tensor | None = None) -> float:
        """The share of right bits over properties, or over those descriptions that are `chosen` [texts]."""
        weights = self.weights if chosen is None else self.weights * chosen
        return float((self.right * weights).sum() / weights.sum())


def described(part: Part) -> tuple[list[str], Tensor, Tensor]:
    """Descriptions of a part's properties, one a phrase, with bits [texts, 10] and weights [texts]."""
    texts: list[str] = []
    bits: list[Bits] = []
    weights: list[float] = []
    for each in properties(part):
        for i, phrase in enumerate(each.phrases):
            text = _REQUESTS[(len(texts) + i) % len(_REQUESTS)].format(phrase)
            texts.append(text[0].upper() + text[1:])
            bits.append(each.bits)
            weights.append(1 / len(each.phrases))
    return texts, torch.tensor(bits, dtype=torch.float32), torch.tensor(weights)


def measure(
    encoder: TextEncoder, head: ClassHead, texts: Sequence[str], bits: Tensor, weights: Tensor | None = None
) -> Measured:
    """What encoder and head understand of descriptions; without weights all count the same."""
    classes, scope = head.probabilities(embeddings(encoder, texts))
    given = torch.ones(len(texts)) if weights is None else weights
    return Measured(tuple(texts), given, bits, classes, sureness_of(classes, scope))


def calibrated(encoder: TextEncoder, head: ClassHead) -> Calibration:
    """Temperatures and the bound of sureness that suit the validation descriptions best.

    Temperatures minimise the negative log likelihood. The bound maximises the mean of two shares: of the
    understood descriptions (at most one bit is wrong) that are sure, and of what should not be acted on and
    is not sure, where misunderstood descriptions (three or more are wrong) and other texts count the same.
    Of the other texts, half of the weight is that of other things.
    """
    texts, bits, _ = described(Part.validation)
    kinds_of_others = out_of_scope(Part.validation)
    others = [text for kind in kinds_of_others.values() for text in kind]
    # Names of other things are what is asked for by mistake, so they count as much as all other kinds.
    is_thing = torch.tensor([kind == OTHER_THINGS for kind, of in kinds_of_others.items() for _ in of])
    of_others = torch.where(is_thing, 0.5 / is_thing.sum(), 0.5 / (~is_thing).sum())
    with torch.no_grad():
        classes, about = head(embeddings(encoder, texts))
        other_classes, other_about = head(embeddings(encoder, others))
    # Both kinds of texts count the same, however many there are of each.
    kinds = torch.cat([torch.full((len(texts),), 1 / len(texts)), of_others])
    is_about = torch.tensor([1.0] * len(texts) + [0.0] * len(others))
    values = torch.zeros(3, requires_grad=True)
    optimiser = torch.optim.LBFGS([values], lr=0.5, max_iter=200, line_search_fn="strong_wolfe")

    def loss() -> Tensor:
        optimiser.zero_grad()
        scope = (torch.cat([about, other_about]) + values[2]) / values[1].exp()
        total = F.binary_cross_entropy_with_logits(classes / values[0].exp(), bits)
        total = total + F.binary_cross_entropy_with_logits(scope, is_about, kinds, reduction="sum")
        total.backward()
        return total

    with one_thread():
        optimiser.step(loss)
    of_classes, of_scope, shift = values.detach()
    found = Calibration(float(of_classes.exp()), float(of_scope.exp()), float(shift))

    def sureness(logits: Tensor, scopes: Tensor) -> Tensor:
        scope = torch.sigmoid((scopes + found.scope_shift) / found.scope_temperature)
        return sureness_of(torch.sigmoid(logits / found.class_temperature), scope)

    sure = (sureness(classes, about)[:, None] >= _BOUNDS).float()
    unsure = of_others @ (sureness(other_classes, other_about)[:, None] < _BOUNDS).float()
    wrong = ((classes > 0) != (bits > 0.5)).sum(1)
    gained = _mean_of(sure, wrong <= 1) + (unsure + _mean_of(1 - sure, wrong >= 3)) / 2
    bound = float(_BOUNDS[gained.argmax()])
    return Calibration(found.class_temperature, found.scope_temperature, found.scope_shift, bound)


def _mean_of(values: Tensor, chosen: Tensor) -> Tensor:
    """The mean over the chosen rows, 0 if there are none."""
    return values[chosen].sum(0) / chosen.sum().clamp(min=1)


def nearest_training(texts: Sequence[str], encoder: TextEncoder) -> Tensor:
    """The cosine similarity [texts] of each description to the nearest phrase that is learnt from."""
    learnt = [*properties(Part.training), *as_properties(facts())]
    phrases = [phrase for each in learnt for phrase in each.phrases]
    return cosines(texts, phrases, encoder).max(1).values
