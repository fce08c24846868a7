"""Wrappers: the names that PyTorch's own wrappers give are those of the network again."""

from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from torch.optim.swa_utils import AveragedModel

from rpg.collection.collection import Collection
from rpg.collection.reading import Reading
from rpg.collection.register import BadCheckpointsError, register
from rpg.collection.wrappers import WRAPPERS, one_sided_prefix, unwrapped
from rpg.errors import RPGError


def network(seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(3, 4), nn.Sequential(nn.BatchNorm1d(4), nn.Linear(4, 2)))


def inner_wrapped(seed: int) -> nn.Module:
    wrapped = network(seed)
    wrapped[1] = torch.compile(checkpoint_wrapper(wrapped[1]))
    return wrapped


WRAPPED = {
    "DataParallel": lambda seed: nn.DataParallel(network(seed)),
    "compile": lambda seed: torch.compile(network(seed)),
    "AveragedModel": lambda seed: AveragedModel(network(seed)),
    "compiled DataParallel": lambda seed: torch.compile(nn.DataParallel(network(seed))),
    "averaged and compiled": lambda seed: AveragedModel(torch.compile(network(seed))),
    "DataParallel of DataParallel": lambda seed: nn.DataParallel(nn.DataParallel(network(seed))),
    "submodules": inner_wrapped,
}


@pytest.mark.parametrize("kind", WRAPPED)
def test_a_wrapped_networks_state_dict_loads_into_the_network(kind: str) -> None:
    wrapped = WRAPPED[kind](1).state_dict()
    assert set(wrapped) != set(network().state_dict())
    found, wrappers = unwrapped(wrapped, list(WRAPPERS))
    assert list(found) == list(network().state_dict())
    network().load_state_dict(found, strict=True)
    assert all(torch.equal(found[name], tensor) for name, tensor in network(1).state_dict().items())
    assert wrappers
    assert unwrapped(wrapped, sorted(wrappers))[0].keys() == found.keys()


@pytest.mark.parametrize("name", ["module.a", "modules.a", "a.module.b", "module", "n_averaged"])
def test_a_name_that_only_looks_wrapped_stays(name: str) -> None:
    tensors = {name: torch.ones(2), "other": torch.zeros(1)}
    assert unwrapped(tensors, list(WRAPPERS)) == (tensors, set())


def test_a_counter_that_is_none_stays() -> None:
    tensors = {"module.a": torch.ones(2), "n_averaged": torch.ones(3)}
    assert unwrapped(tensors, list(WRAPPERS)) == (tensors, set())


def test_two_tensors_of_one_name_are_refused() -> None:
    with pytest.raises(RPGError, match=r"tensors 'a\.w' and '_orig_mod\.a\.w' are both 'a\.w' without"):
        unwrapped({"a.w": torch.ones(1), "_orig_mod.a.w": torch.ones(1)}, list(WRAPPERS))


@given(
    st.lists(
        st.lists(st.sampled_from(["module", "_orig_mod", "a", "b", ""]), min_size=1, max_size=4).map(
            ".".join
        ),
        unique=True,
    )
)
def test_unwrapping_twice_is_unwrapping_once(names: list[str]) -> None:
    tensors = {name: torch.tensor(i) for i, name in enumerate(names)}
    try:
        once, found = unwrapped(tensors, list(WRAPPERS))
    except RPGError:
        return
    assert list(map(int, once.values())) == [int(tensors[name]) for name in names if name != "n_averaged"]
    assert unwrapped(once, list(WRAPPERS)) == (once, set())
    assert unwrapped(tensors, found)[0] == once


def test_a_prefix_that_one_side_has_is_found() -> None:
    plain = ["a.w", "a.b", "net.w"]
    assert one_sided_prefix([f"net.{name}" for name in plain], plain) == "net."
    assert one_sided_prefix([f"x.y.{name}" for name in plain], plain) == "x.y."
    assert one_sided_prefix(plain, plain) is None
    assert one_sided_prefix(plain, [f"net.{name}" for name in plain]) is None
    assert one_sided_prefix([], []) is None


class TestRegistering:
    def save(self, root: Path, **state_dicts: dict[str, Tensor]) -> None:
        for name, state_dict in state_dicts.items():
            torch.save(state_dict, root / f"{name}.pt")

    def test_what_was_unwrapped_is_said_and_holds_later(self, tmp_path: Path) -> None:
        self.save(
            tmp_path,
            **{name: WRAPPED["compiled DataParallel"](i).state_dict() for i, name in enumerate("abc")},
        )
        notes: list[str] = []
        register(tmp_path, note=notes.append)
        assert notes == [
            "names without '_orig_mod.', which torch.compile had added",
            "names without 'module.', which DataParallel, DistributedDataParallel or AveragedModel had added",
        ]
        collection = Collection.load(tmp_path)
        assert collection.reading == Reading(unwrap=("_orig_mod", "module"))
        network().load_state_dict(collection.read_checked(collection.entries[1]), strict=True)

    def test_one_wrapped_file_of_three_is_named(self, tmp_path: Path) -> None:
        self.save(
            tmp_path,
            a=network(0).state_dict(),
            b=WRAPPED["DataParallel"](1).state_dict(),
            c=network(2).state_dict(),
        )
        notes: list[str] = []
        register(tmp_path, note=notes.append)
        (line,) = notes
        assert line.startswith("names without 'module.'")
        assert line.endswith(", in b.pt only of 3")
        collection = Collection.load(tmp_path)
        for entry in collection.entries:
            network().load_state_dict(collection.read(entry), strict=True)

    @pytest.mark.parametrize("odd", ["a", "b"])
    def test_another_prefix_that_only_some_have_is_named(self, tmp_path: Path, odd: str) -> None:
        prefixed = {f"backbone.{name}": tensor for name, tensor in network(1).state_dict().items()}
        plain = {name: network(i).state_dict() for i, name in enumerate("abc")}
        self.save(tmp_path, **{**plain, odd: prefixed})
        with pytest.raises(BadCheckpointsError) as caught:
            register(tmp_path)
        says = "every name begins with 'backbone.'" if odd == "b" else "no name begins with 'backbone.'"
        assert all(f"{says}; expected" in line for line in caught.value.problems)
        assert len(caught.value.problems) == (1 if odd == "b" else 2)

    def test_an_older_collection_is_read_as_it_was_registered(self, tmp_path: Path) -> None:
        self.save(tmp_path, **{name: WRAPPED["DataParallel"](i).state_dict() for i, name in enumerate("ab")})
        collection, _ = register(tmp_path)
        older = Collection(tmp_path, {}, collection.entries)
        older.save()
        assert "reading" not in (tmp_path / "collection.json").read_text()
        loaded = Collection.load(tmp_path)
        assert set(loaded.read(loaded.entries[0])) == set(WRAPPED["DataParallel"](0).state_dict())
