"""A collection read at another token size equals one that was written at that size."""

from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from rpg.collection.collection import Entry
from rpg.collection.layout import Layout
from rpg.collection.manifest import write_manifest
from rpg.collection.retokenised import Retokenised
from rpg.collection.shard_file import write_shard
from rpg.collection.shards import ShardedCollection
from rpg.collection.statistics import LayoutStatistics
from rpg.config import Normalisation, TokenCut, TokenDtype
from rpg.errors import RPGError

SHAPES = {"a.weight": (5, 7), "a.bias": (5,), "scalar": (), "b.weight": (3, 2, 11), "b.bias": (3,)}
VALUES = 35 + 5 + 1 + 66 + 3


def checkpoints(count: int) -> list[dict[str, Tensor]]:
    random = torch.Generator().manual_seed(1)
    return [
        {
            **{name: torch.randn(shape, generator=random) for name, shape in SHAPES.items()},
            "tracked": torch.tensor(3),
        }
        for _ in range(count)
    ]


def layout_at(token_size: int, state_dicts: list[dict[str, Tensor]], cut: TokenCut) -> Layout:
    statistics = LayoutStatistics(state_dicts[0])
    for state_dict in state_dicts:
        statistics.update(state_dict)
    return statistics.layout(token_size, Normalisation.residual).with_token_size(token_size, cut)


def sharded(
    directory: Path, token_size: int, dtype: TokenDtype, cut: TokenCut = TokenCut.by_tensor
) -> ShardedCollection:
    state_dicts = checkpoints(5)
    layout = layout_at(token_size, state_dicts, cut)
    named = [(f"{i}.pt", state_dict) for i, state_dict in enumerate(state_dicts)]
    shards = [
        write_shard(directory / f"{i}.arrow", layout, part, dtype)
        for i, part in enumerate((named[:3], named[3:]))
    ]
    entries = [Entry(name, name, [float(i)]) for i, (name, _) in enumerate(named)]
    write_manifest(directory, layout, shards, entries, dtype)
    return ShardedCollection.open(directory)


@settings(deadline=None, max_examples=25)
@given(
    old=st.integers(1, VALUES),
    new=st.integers(1, VALUES),
    dtype=st.sampled_from(list(TokenDtype)),
    how=st.sampled_from([TokenCut.by_tensor, TokenCut.flat]),
    data=st.data(),
)
def test_equals_a_collection_cut_at_that_size(
    tmp_path_factory: pytest.TempPathFactory,
    old: int,
    new: int,
    dtype: TokenDtype,
    how: TokenCut,
    data: st.DataObject,
) -> None:
    seen = Retokenised(sharded(tmp_path_factory.mktemp("old"), old, dtype, how), new)
    cut = sharded(tmp_path_factory.mktemp("new"), new, dtype, how)
    assert seen.layout.digest() == cut.layout.digest()
    assert seen.names == cut.names
    assert len(seen) == len(cut)
    chosen = data.draw(st.lists(st.integers(0, 4), min_size=1, max_size=4))
    count = data.draw(st.integers(1, 6))
    tokens = np.array(
        [[data.draw(st.integers(0, cut.layout.tokens - 1)) for _ in range(count)] for _ in chosen]
    )
    assert torch.equal(seen.read_batch(chosen, tokens), cut.read_batch(chosen, tokens))
    everything = range(cut.layout.tokens)
    assert torch.equal(seen.read(4, everything), cut.read(4, everything))


@pytest.mark.parametrize("token_size", [0, VALUES + 1])
def test_a_token_larger_than_the_network_is_refused(tmp_path: Path, token_size: int) -> None:
    with pytest.raises(RPGError, match=f"shard.token_size: expected 1 to {VALUES}"):
        Retokenised(sharded(tmp_path, 8, TokenDtype.float32), token_size)


def test_tokens_by_output_channel_are_read_as_they_are_alone(tmp_path: Path) -> None:
    shards = sharded(tmp_path, 8, TokenDtype.float32, TokenCut.by_output_channel)
    with pytest.raises(RPGError, match=r"shard\.token_size: cannot be changed"):
        Retokenised(shards, 9)


def test_unknown_tokens_are_refused(tmp_path: Path) -> None:
    seen = Retokenised(sharded(tmp_path, 8, TokenDtype.float32), 30)
    with pytest.raises(IndexError, match="tokens: expected 0 <= index < 8"):
        seen.read(0, [seen.layout.tokens])
