"""`rpg align`: networks compute the same, what is known of them is kept, and what is refused."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from rpg.collection.alignment import permuted
from rpg.collection.checkpoint import write_checkpoint
from rpg.collection.collection import Collection
from rpg.collection.permutation_groups import permutation_groups
from rpg.collection.register import register
from rpg.commands.main import main
from rpg.tasks.digits import DigitsNet


@pytest.fixture
def collection(tmp_path: Path) -> Path:
    """A network, and two copies of it with their units in other orders, one of them for held-out data."""
    torch.manual_seed(0)
    network = DigitsNet().eval()
    groups = permutation_groups(network, lambda each: each(torch.randn(2, 1, 8, 8)))
    state = network.state_dict()
    for name in ("a", "b", "c"):
        write_checkpoint(tmp_path / "in" / f"{name}.safetensors", state, {"format": "pt"})
        state = permuted(state, groups, [torch.randperm(group.size) for group in groups])
    conditions = tmp_path / "conditions.csv"
    conditions.write_text("file,x\na.safetensors,1\nb.safetensors,2\nc.safetensors,3\n")
    register(tmp_path / "in", conditions=conditions, splits=["heldout=c*"])
    return tmp_path / "in"


def test_units_come_into_one_order(
    collection: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["align", str(collection), str(tmp_path / "out"), "--tasks", "digits"]) == 0
    printed = capsys.readouterr().out
    assert "3 checkpoints; 36 units in 2 groups; mean distance to a.safetensors 0, before " in printed
    first = load_file(collection / "a.safetensors")
    assert not load_file(collection / "b.safetensors")["conv1.weight"].equal(first["conv1.weight"])
    for name in ("a", "b", "c"):
        found = load_file(tmp_path / "out" / f"{name}.safetensors")
        assert all(found[tensor].equal(first[tensor]) for tensor in first)
    before, after = Collection.load(collection), Collection.load(tmp_path / "out")
    assert [(e.file, e.condition, e.split) for e in after.entries] == [
        (e.file, e.condition, e.split) for e in before.entries
    ]
    for entry in after.entries:
        after.read_checked(entry)


@pytest.mark.parametrize(
    ("tasks", "message"),
    [("", "does not say which task family its networks belong to"),
     ("no_such_family", "got 'no_such_family'")],
)  # fmt: skip
def test_a_family_is_needed(
    collection: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], tasks: str, message: str
) -> None:
    assert main(["align", str(collection), str(tmp_path / "out"), "--tasks", tasks]) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_a_checkpoint_of_another_network_is_named(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], write_other: Callable[[Path], None]
) -> None:
    write_other(tmp_path / "in")
    assert main(["align", str(tmp_path / "in"), str(tmp_path / "out"), "--tasks", "digits"]) == 2
    assert "a.safetensors: tensor 'conv1.weight': not the one of the network" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


@pytest.fixture
def write_other() -> Callable[[Path], None]:
    def write(directory: Path) -> None:
        for name in ("a", "b"):
            write_checkpoint(directory / f"{name}.safetensors", {"w": torch.randn(3)}, {})
        register(directory)

    return write
