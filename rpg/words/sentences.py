"""From words to classes by a sentence encoder that was fine-tuned on descriptions, and a head on it.

A directory holds both: `adapter_config.json` and `adapter_model.safetensors`, which change the encoder's
weights (LoRA, as PEFT saves it), and `head.safetensors`. The encoder itself lies elsewhere. `rpg export
DIRECTORY OUT --base ENCODER` writes the fine-tuned encoder for `rpg register --encoder`.
"""

from pathlib import Path

import torch
from safetensors.torch import load_file

from rpg.collection.adapter_merge import AdapterMerge
from rpg.errors import RPGError, one_line
from rpg.text_encoder import TextEncoder, check_encoder
from rpg.words.head import HEAD_FILE, ClassHead
from rpg.words.understood import Understood

ADAPTER_CONFIG = "adapter_config.json"
ADAPTER_WEIGHTS = "adapter_model.safetensors"


class SentenceUnderstanding:
    """Understands descriptions by their embeddings; equal descriptions are understood equally."""

    def __init__(self, encoder: TextEncoder, head: ClassHead) -> None:
        """Put a head on the encoder that it was trained with."""
        self.encoder = encoder
        self.head = head

    @classmethod
    def load(cls, directory: Path, encoder: Path) -> "SentenceUnderstanding":
        """Load the encoder, change its weights by the adapter, and put the head on it.

        Args:
            directory: with the adapter and the head.
            encoder: the directory of the encoder that the adapter was trained on.

        Raises:
            RPGError: naming the file that is missing or wrong, or the encoder if it is another one.
        """
        head = ClassHead.load(directory / HEAD_FILE)
        check_encoder(encoder, head.encoder)
        return cls(adapted_encoder(encoder, directory), head)

    def understand(self, description: str) -> Understood:
        """Which classes a description means.

        Raises:
            RPGError: if the description is empty, too long or not text.
        """
        embedding = torch.tensor([self.encoder.encode(description)])
        classes, scope = (values[0] for values in self.head.probabilities(embedding))
        sureness = float(sureness_of(classes, scope))
        return Understood(tuple(classes.tolist()), sureness, sureness >= self.head.calibration.least_sureness)


def sureness_of(classes: torch.Tensor, scope: torch.Tensor) -> torch.Tensor:
    """The share of answers [...] that is expected to be right.

    Args:
        classes: probabilities of the classes [..., 10].
        scope: probability that a description is about the classes [...]; if it is not, answers are guesses.
    """
    certainty = torch.maximum(classes, 1 - classes).mean(-1)
    return scope * certainty + (1 - scope) / 2


def adapted_encoder(encoder: Path, adapter: Path) -> TextEncoder:
    """An encoder with an adapter merged into its weights, in memory.

    Raises:
        RPGError: naming the file or tensor that is missing or does not fit.
    """
    loaded = TextEncoder(encoder)
    path = adapter / ADAPTER_WEIGHTS
    try:
        factors = load_file(path)
    except Exception as error:
        raise RPGError(f"{path}: cannot be read as an adapter's weights: {one_line(error)[:300]}") from error
    merged = AdapterMerge(loaded.network.state_dict(), factors, adapter / ADAPTER_CONFIG, str(encoder))
    loaded.network.load_state_dict(dict(merged))
    return loaded
