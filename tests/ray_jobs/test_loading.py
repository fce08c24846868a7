"""A process reads a collection once, and again after it has changed; jobs import only what they need."""

import subprocess
import sys
from pathlib import Path

import pytest

from ray_jobs.loading import load_collection
from rpg.collection.collection import Collection, Entry
from rpg.errors import RPGError


def test_a_collection_is_read_again_only_after_it_has_changed(tmp_path: Path) -> None:
    with pytest.raises(RPGError, match=r"collection\.json: not found"):
        load_collection(tmp_path)
    Collection(tmp_path, {}, [Entry("a", "0" * 64)]).save()
    first = load_collection(tmp_path)
    assert load_collection(tmp_path) is first
    Collection(tmp_path, {}, [Entry("a", "0" * 64), Entry("b", "1" * 64)]).save()
    assert [entry.file for entry in load_collection(tmp_path).entries] == ["a", "b"]


def test_jobs_do_not_import_what_only_data_and_figures_need() -> None:
    code = (
        "import sys, ray_jobs.pipeline, ray_jobs.tune, rpg.evaluation.judge\n"
        "print([name for name in ('torchvision', 'sklearn', 'matplotlib') if name in sys.modules])"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert out == "[]\n"
