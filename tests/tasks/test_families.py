"""Families are found by name, by file and by module, and what is wrong with one is told in a line."""

import sys
import textwrap
from pathlib import Path

import pytest
import torch

from rpg.collection.collection import FAMILY, Collection, Entry
from rpg.errors import RPGError
from rpg.tasks.families import (
    ENTRY_POINTS,
    can_collect,
    can_evaluate,
    can_predict,
    family_of,
    installed_families,
    load_family,
    uses_gpu,
)

MINE = Path(__file__).parent / "my_tasks.py"


@pytest.mark.parametrize("name", ["cifar10", "digits"])
def test_families_of_this_project_are_found_as_any_installed_one(name: str) -> None:
    family = load_family(name)
    head = family.build_network().state_dict()["head.weight"]
    assert head.shape[0] == 1
    assert head.dtype == torch.float32
    assert can_collect(family)
    assert can_predict(family)
    assert [point.group for point in installed_families()[name]] == [ENTRY_POINTS]


def test_a_family_in_a_file_or_a_module_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    family = load_family(f"{MINE}:Minimal")
    assert can_evaluate(family)
    assert not can_predict(family)
    assert not can_collect(family)
    assert load_family(f"{MINE}:Sines").__class__.__module__ == "my_tasks"
    (tmp_path / "package_of_mine.py").write_text(MINE.read_text())
    monkeypatch.syspath_prepend(tmp_path)
    assert can_predict(load_family("package_of_mine:Sines"))
    assert not uses_gpu("package_of_mine:Sines")
    assert uses_gpu("cifar10")


def test_a_file_that_has_changed_is_read_again(tmp_path: Path) -> None:
    path = tmp_path / "changing_tasks.py"
    for value in (1.0, 2.0):
        path.write_text(f"from my_tasks import Minimal\nclass Mine(Minimal):\n    value = {value}\n")
        load_family(f"{MINE}:Minimal")
        assert load_family(f"{path}:Mine").value == value
        path.touch()


def test_a_constructor_is_given_what_it_names(tmp_path: Path) -> None:
    path = tmp_path / "tasks_with_images.py"
    path.write_text(
        textwrap.dedent(
            """
            from my_tasks import Minimal
            class Mine(Minimal):
                def __init__(self, device, images):
                    self.given = (str(device), images)
            """
        )
    )
    load_family(f"{MINE}:Minimal")
    assert load_family(f"{path}:Mine", "pictures", torch.device("meta")).given == ("meta", "pictures")


@pytest.mark.parametrize(
    ("name", "parts"),
    [
        ("digit", [", digits, a network as torchvision:NAME", ", or a class of your own", "got 'digit'"]),
        ("nowhere.py:Mine", ["nowhere.py", "No such file"]),
        (f"{MINE}:Nobody", ["has no class Nobody"]),
        ("no_such_module:Mine", ["ModuleNotFoundError"]),
        (f"{MINE}:NoNetwork", ["has no method build_network"]),
        (f"{MINE}:NoTest", ["neither a method evaluate, nor methods predict and labels"]),
        (f"{MINE}:BadConstructor", ["constructor", "room"]),
    ],
)
def test_a_family_that_cannot_be_had_is_told_in_one_line(name: str, parts: list[str]) -> None:
    with pytest.raises(RPGError) as caught:
        load_family(name)
    message = str(caught.value)
    assert "\n" not in message
    assert all(part in message for part in ["tasks: ", *parts]), message


def test_an_import_that_fails_names_file_and_line(tmp_path: Path) -> None:
    path = tmp_path / "broken_tasks.py"
    path.write_text("x = 1\nimport nothing_of_this_name\n")
    with pytest.raises(RPGError, match=r"import: ModuleNotFoundError: .*\(broken_tasks\.py, line 2\)"):
        load_family(f"{path}:Mine")
    path.write_text("x = (\n")
    with pytest.raises(RPGError, match=r"import: SyntaxError"):
        load_family(f"{path}:Mine")
    assert "broken_tasks" not in sys.modules


def test_two_installed_families_of_one_name_are_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for package in ("first", "second"):
        information = tmp_path / f"{package}-1.0.dist-info"
        information.mkdir()
        (information / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {package}\nVersion: 1.0\n")
        (information / "entry_points.txt").write_text(f"[{ENTRY_POINTS}]\nshared = {package}:Mine\n")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(RPGError, match=r"'shared' is the name of several .*: first:Mine, second:Mine"):
        load_family("shared")


def test_a_collection_may_name_what_is_installed_and_no_code(tmp_path: Path) -> None:
    entry = Entry("a", "0" * 64)
    assert family_of(Collection(tmp_path, {FAMILY: "digits"}, [entry])) == "digits"
    with pytest.raises(RPGError, match=r"which is code; to run it: tasks=evil\.py:Evil"):
        family_of(Collection(tmp_path, {FAMILY: "evil.py:Evil"}, [entry]))
    with pytest.raises(RPGError, match=r"does not say which task family"):
        family_of(Collection(tmp_path, {}, [entry]))
