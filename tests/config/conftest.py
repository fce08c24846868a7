"""A small preset, and how a config is refused."""

from collections.abc import Callable
from pathlib import Path

import pytest

from rpg.config import load_config
from rpg.errors import RPGError


@pytest.fixture
def preset(tmp_path: Path) -> Path:
    path = tmp_path / "preset.yaml"
    path.write_text("name: test\ntrain:\n  steps: 7\ngenerator:\n  recurrent: {kind: lstm}\n")
    return path


@pytest.fixture
def refusal() -> Callable[..., str]:
    """`refusal(path, *overrides)`: the one line that the config is refused with."""

    def refuse(path: Path, *overrides: str) -> str:
        with pytest.raises(RPGError) as caught:
            load_config(path, overrides)
        message = str(caught.value)
        assert "\n" not in message
        return message

    return refuse
