"""The merged pass against direct float64 computations with NumPy."""

import pickle
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file
from torch import Tensor

from rpg.collection.layout import Layout
from rpg.collection.statistics import LayoutStatistics
from rpg.collection.tensor_spec import TensorKind, TensorSpec
from rpg.config import Normalisation
from rpg.errors import RPGError

Values = npt.NDArray[np.float64]
StateDict = dict[str, Tensor]


def checkpoints(count: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> list[StateDict]:
    generator = torch.Generator().manual_seed(seed)
    frozen = torch.randn(4, generator=generator)
    return [
        {
            "conv.weight": (torch.randn(6, 5, generator=generator) * 0.1 + 3).to(dtype),
            "bn.running_mean": torch.randn(7, generator=generator).to(dtype),
            "bn.running_var": (torch.randn(7, generator=generator).square() * 4).to(dtype),
            "bn.num_batches_tracked": torch.tensor(i),
            "frozen": frozen.clone(),
            "scalar": torch.randn((), generator=generator),
        }
        for i in range(count)
    ]


def statistics_of(state_dicts: list[StateDict], reference: StateDict | None = None) -> LayoutStatistics:
    statistics = LayoutStatistics(state_dicts[0] if reference is None else reference)
    for state_dict in state_dicts:
        statistics.update(state_dict)
    return statistics


def spec_of(layout: Layout, name: str) -> TensorSpec:
    return next(spec for spec in layout.specs if spec.name == name)


def stacked(state_dicts: list[StateDict], name: str) -> Values:
    return np.stack([s[name].to(torch.float64).numpy() for s in state_dicts])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_residual_scale_is_the_deviation_about_the_stored_centre(dtype: torch.dtype) -> None:
    collection = checkpoints(5, dtype=dtype)
    layout = statistics_of(collection).layout(8, Normalisation.residual)
    for name in ("conv.weight", "bn.running_mean"):
        values, centre = stacked(collection, name), layout.centre[name]
        # In float64 the last bit depends on the order of the sum.
        torch.testing.assert_close(centre, torch.from_numpy(values.mean(0)).to(dtype), rtol=1e-14, atol=1e-14)
        expected = np.sqrt(np.mean((values - centre.double().numpy()) ** 2))
        assert spec_of(layout, name).scale == pytest.approx(expected, rel=1e-12)
        assert spec_of(layout, name).kind == TensorKind.weight
    values = stacked(collection, "bn.running_var")
    pre_mean = 0.95 * values[0].mean()
    spec = spec_of(layout, "bn.running_var")
    assert spec.kind == TensorKind.running_var
    assert spec.pre_mean == pytest.approx(pre_mean, rel=1e-12)
    assert spec.floor == pytest.approx((values / pre_mean).min(), rel=1e-12)
    transformed = np.log(values / pre_mean + 0.05)
    stored = layout.centre["bn.running_var"].double().numpy()
    expected_centre = (np.exp(transformed.mean(0)) - 0.05) * pre_mean
    np.testing.assert_allclose(stored, expected_centre, rtol=1e-2 if dtype == torch.bfloat16 else 1e-6)
    expected = np.sqrt(np.mean((transformed - np.log(stored / pre_mean + 0.05)) ** 2))
    assert spec.scale == pytest.approx(expected, rel=1e-10)


def test_residual_tokens_have_mean_zero_and_deviation_one() -> None:
    collection = checkpoints(40)
    layout = statistics_of(collection).layout(1, Normalisation.residual)
    tokens = torch.stack([layout.encode(s).tokens for s in collection])
    for spec in layout.specs:
        if spec.tokens:
            mine = tokens[:, spec.first_token : spec.first_token + spec.tokens]
            assert float(mine.square().mean()) == pytest.approx(1, rel=1e-4), spec.name
            assert float(mine.mean(0).abs().max()) < 1e-3, spec.name


def test_zscore_is_the_published_formula() -> None:
    """Written out from the released code: averages over checkpoints of torch.mean and torch.std."""
    collection = checkpoints(5)
    layout = statistics_of(collection).layout(8, Normalisation.zscore)
    for name in ("conv.weight", "bn.running_mean", "frozen"):
        values = stacked(collection, name).reshape(5, -1)
        spec = spec_of(layout, name)
        assert spec.kind == TensorKind.weight
        assert spec.mean == pytest.approx(values.mean(1).mean(), rel=1e-12)
        assert spec.scale == pytest.approx(values.std(1, ddof=1).mean(), rel=1e-12)
        mean, scale = np.float32(spec.mean), np.float32(spec.scale)
        expected = (collection[2][name].numpy().reshape(-1) - mean) / scale
        rows = layout.encode(collection[2]).tokens[spec.first_token : spec.first_token + spec.tokens]
        np.testing.assert_allclose(rows.reshape(-1)[: len(expected)], expected, rtol=1e-5)
    values = stacked(collection, "bn.running_var")
    pre_means = 0.95 * values.mean(1)
    logs = np.log(values / pre_means[:, None] + 0.05)
    spec = spec_of(layout, "bn.running_var")
    assert spec.kind == TensorKind.running_var
    assert spec.pre_mean == pytest.approx(pre_means.mean(), rel=1e-12)
    assert spec.mean == pytest.approx(logs.mean(1).mean(), rel=1e-12)
    assert spec.scale == pytest.approx(logs.std(1, ddof=1).mean(), rel=1e-12)
    assert spec.floor == 0.001
    np.testing.assert_allclose(
        layout.centre["conv.weight"], stacked(collection, "conv.weight").mean(0), rtol=1e-6
    )
    assert spec_of(layout, "scalar").kind == TensorKind.constant
    assert torch.equal(layout.constants["scalar"], collection[0]["scalar"])


def test_unchanging_tensors_are_constant_in_residual_mode_only() -> None:
    collection = checkpoints(3)
    layout = statistics_of(collection).layout(8, Normalisation.residual)
    assert spec_of(layout, "frozen").kind == TensorKind.constant
    assert spec_of(layout, "scalar").kind == TensorKind.weight
    assert spec_of(layout, "bn.num_batches_tracked").kind == TensorKind.constant
    assert int(layout.constants["bn.num_batches_tracked"]) == 0
    encoded = layout.encode(collection[2])
    assert int(encoded.constants["bn.num_batches_tracked"]) == 2
    assert int(layout.decode(encoded)["bn.num_batches_tracked"]) == 2


def test_equal_checkpoints_leave_no_tokens() -> None:
    layout = statistics_of(checkpoints(1) * 3).layout(8, Normalisation.residual)
    assert layout.tokens == 0
    decoded = layout.decode(layout.encode(checkpoints(1)[0]))
    assert torch.equal(decoded["conv.weight"], checkpoints(1)[0]["conv.weight"])


@given(
    owners=st.lists(st.integers(0, 3), min_size=2, max_size=9),
    normalisation=st.sampled_from(list(Normalisation)),
    repeated=st.integers(1, 4),
)
@settings(max_examples=60, deadline=None)
def test_any_split_merges_to_the_same_layout(
    owners: list[int], normalisation: Normalisation, repeated: int
) -> None:
    # The first checkpoint occurs several times, so that some parts contain only the reference.
    collection = checkpoints(1) * repeated + checkpoints(len(owners))[repeated:]
    collection = collection[: len(owners)]
    whole = statistics_of(collection).layout(8, normalisation)
    merged = LayoutStatistics(collection[0])
    for owner in range(4):
        mine = [s for s, o in zip(collection, owners, strict=True) if o == owner]
        part = pickle.loads(pickle.dumps(statistics_of(mine, reference=collection[0]).part()))
        merged.merge(part)
    assert merged.count == len(owners)
    found = merged.layout(8, normalisation)
    for spec, expected in zip(found.specs, whole.specs, strict=True):
        assert (spec.name, spec.kind, spec.tokens) == (expected.name, expected.kind, expected.tokens)
        for attribute in ("mean", "scale", "pre_mean", "floor"):
            # The scale is about the stored float32 centre, whose last bit may differ.
            assert getattr(spec, attribute) == pytest.approx(getattr(expected, attribute), rel=1e-6), (
                attribute
            )
    for name in whole.centre:
        torch.testing.assert_close(found.centre[name], whole.centre[name], rtol=1e-6, atol=1e-6)


def test_large_tensors_are_worked_on_in_blocks() -> None:
    generator = torch.Generator().manual_seed(0)
    collection = [{"w": torch.randn(700_001, generator=generator) * 0.01 + 5} for _ in range(3)]
    values = stacked(collection, "w")
    statistics = statistics_of(collection)
    spec = statistics.layout(8192, Normalisation.zscore).specs[0]
    assert spec.mean == pytest.approx(values.mean(1).mean(), rel=1e-12)
    assert spec.scale == pytest.approx(values.std(1, ddof=1).mean(), rel=1e-10)
    layout = statistics.layout(8192, Normalisation.residual)
    expected = np.sqrt(np.mean((values - layout.centre["w"].double().numpy()) ** 2))
    assert layout.specs[0].scale == pytest.approx(expected, rel=1e-10)


def test_a_mean_far_above_the_spread_keeps_the_scale() -> None:
    base = torch.full((64,), 1e6, dtype=torch.float64)
    generator = torch.Generator().manual_seed(0)
    noise = [torch.randn(64, generator=generator, dtype=torch.float64) * 1e-6 for _ in range(50)]
    layout = statistics_of([{"w": base + n} for n in noise]).layout(8, Normalisation.residual)
    assert layout.specs[0].scale == pytest.approx(1e-6, rel=0.05)


def test_running_variances_that_cannot_be_divided_by_their_mean_are_weights() -> None:
    negative = [{"running_var": torch.tensor([1.0, -0.5]) + i} for i in range(2)]
    zero = [{"running_var": torch.zeros(2) + i} for i in range(2)]
    for collection in (negative, zero):
        layout = statistics_of(collection).layout(2, Normalisation.residual)
        assert layout.specs[0].kind == TensorKind.weight


def test_a_part_holds_the_means_that_changed_and_nothing_else() -> None:
    collection = [{"frozen": torch.ones(5000), "w": torch.randn(1000)} for _ in range(3)]
    part = statistics_of(collection).part()
    assert [mean.nbytes for mean in part.means] == [8000]
    assert len(pickle.dumps(part)) < 9000


@pytest.mark.parametrize("normalisation", list(Normalisation))
def test_means_that_travel_through_a_file_are_merged_to_the_same_bits(
    normalisation: Normalisation, tmp_path: Path
) -> None:
    # More than a block, beside tensors of which one never changes and one only in the second part.
    collection = [
        {
            "w": torch.randn(600_001, generator=torch.Generator().manual_seed(i)),
            "frozen": torch.ones(5),
            "late": torch.full((7,), float(max(i, 2))),
            "bn.running_var": torch.rand(30, generator=torch.Generator().manual_seed(i)) + 0.1,
        }
        for i in range(5)
    ]
    in_memory, through_files = LayoutStatistics(collection[0]), LayoutStatistics(collection[0])
    for i, checkpoints in enumerate((collection[:3], collection[3:])):
        part = statistics_of(checkpoints, reference=collection[0]).part()
        in_memory.merge(part)
        part.write_means(tmp_path / str(i))
        through_files.merge(replace(part, means=tmp_path / str(i)))
    through_files.release_reference()
    expected, found = (each.layout(64, normalisation) for each in (in_memory, through_files))
    assert found.digest() == expected.digest()


def test_a_file_of_means_that_is_cut_short_is_refused(tmp_path: Path) -> None:
    collection = checkpoints(3)
    part = statistics_of(collection).part()
    part.write_means(tmp_path / "means")
    with (tmp_path / "means").open("r+b") as file:
        file.truncate(100)
    merged = LayoutStatistics(collection[0])
    refused("means: truncated", lambda: merged.merge(replace(part, means=tmp_path / "means")))
    (tmp_path / "means").unlink()
    refused(
        "means: cannot be read: No such file", lambda: merged.merge(replace(part, means=tmp_path / "means"))
    )


def test_reference_is_a_copy_of_its_own_size() -> None:
    models = torch.randn(1000, 100)
    collection = [{"w": models[i]} for i in range(3)]
    statistics = statistics_of(collection)
    assert len(pickle.dumps(statistics)) < 10_000
    first = models[0].clone()
    models.zero_()
    assert torch.equal(statistics.reference["w"], first)


def refused(message: str, action: Any) -> None:
    with pytest.raises(RPGError, match=message) as caught:
        action()
    assert "\n" not in str(caught.value)


def test_bad_checkpoints_are_named() -> None:
    collection = checkpoints(3)
    statistics = statistics_of(collection[:1])
    residual = Normalisation.residual
    refused("needs at least 2 checkpoints, got 1", lambda: statistics.layout(8, residual))
    refused("token_size: expected at least 1, got 0", lambda: statistics.layout(0, residual))
    refused("the state_dict is empty", lambda: LayoutStatistics({}))
    refused("'x': expected a tensor, found OrderedDict", lambda: LayoutStatistics({"x": _ordered()}))
    refused("'conv.weight' is missing", lambda: statistics.update({"w": torch.zeros(2)}))
    negative = {**collection[1], "bn.running_var": -collection[1]["bn.running_var"]}
    refused("'bn.running_var': expected no negative", lambda: statistics.update(negative))
    assert statistics.count == 1
    for other in (collection[1:], [{"w": torch.zeros(2)}]):
        part = statistics_of(other).part()
        refused("expected the same reference", lambda part=part: statistics.merge(part))
    statistics.update({**collection[1], "conv.weight": torch.full((6, 5), torch.nan)})
    for normalisation in Normalisation:
        refused("'conv.weight': expected finite values", lambda n=normalisation: statistics.layout(8, n))


def test_tied_tensors_must_stay_equal() -> None:
    weight = torch.randn(3, 2)
    statistics = LayoutStatistics({"embed": weight, "head": weight, "transposed": weight.T})
    assert statistics.ties == {"head": "embed"}
    statistics.update({"embed": weight, "head": weight.clone(), "transposed": weight.T})
    other = {"embed": weight, "head": weight + 1, "transposed": weight.T}
    refused("'head': expected the values of 'embed', to which it is tied", lambda: statistics.update(other))


def _ordered() -> Any:
    from collections import OrderedDict

    return OrderedDict()


@pytest.mark.slow
def test_the_embedding_of_a_language_model_takes_less_than_3_gb(tmp_path: Path) -> None:
    """151,936 × 896 values in float32, 545 MB: Qwen2.5-0.5B's, read as stage `shard` does."""
    values = torch.arange(151_936 * 896, dtype=torch.int32).remainder_(1009).float().view(151_936, 896)
    for i in range(2):
        save_file({"embed_tokens.weight": values.mul_(1.5)}, tmp_path / f"{i}.safetensors")
    code = (
        "import resource, sys, torch\n"
        "from pathlib import Path\n"
        "from rpg.collection.checkpoint import check_finite, read_checkpoint\n"
        "from rpg.collection.statistics import LayoutStatistics\n"
        "from rpg.config import Normalisation\n"
        "torch.set_num_threads(1)\n"
        "paths = sorted(Path(sys.argv[1]).glob('*.safetensors'))\n"
        "statistics = LayoutStatistics(read_checkpoint(paths[0]))\n"
        "for path in paths:\n"
        "    state_dict = read_checkpoint(path)\n"
        "    check_finite(state_dict, path)\n"
        "    statistics.update(state_dict)\n"
        "    del state_dict\n"
        "layout = statistics.layout(8192, Normalisation.residual)\n"
        "print(layout.specs[0].scale, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path)], capture_output=True, text=True, check=True
    )
    scale, peak = map(float, done.stdout.split())
    # The two are 1.5 v and 2.25 v, so each is 0.375 v from their mean.
    expected = 0.375 * float(values.div_(2.25).double().square().mean()) ** 0.5
    assert scale == pytest.approx(expected, rel=1e-6)
    assert peak < 3e9
