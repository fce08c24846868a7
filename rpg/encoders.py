"""Opens an encoder of descriptions, whichever kind its directory holds: a text encoder, or a words model."""

from pathlib import Path
from typing import TypeAlias

from rpg.storage.locations import AnyPath, fetched
from rpg.text_encoder import TextEncoder, check_encoder, is_words_model
from rpg.words.sentences import SentenceUnderstanding

Encoder: TypeAlias = TextEncoder | SentenceUnderstanding
"""What makes conditions of descriptions: `encode` gives one of `size` values."""


def open_encoder(directory: Path) -> Encoder:
    """Load the encoder in `directory`.

    Raises:
        RPGError: naming the file that is missing or wrong; if what it needs is not installed.
    """
    return SentenceUnderstanding.load(directory) if is_words_model(directory) else TextEncoder(directory)


def load_encoder(directory: AnyPath, digest: str) -> Encoder:
    """Load the encoder in `directory` after checking that its digest is `digest`.

    Raises:
        RPGError: naming the directory, if it holds another encoder; or naming the file that is missing or
            wrong.
    """
    with fetched(directory) as local:
        check_encoder(local, digest)
        return open_encoder(local)
