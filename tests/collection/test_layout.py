"""Any state_dict is turned into tokens and back; layouts are saved and loaded; bad input is named."""

import json
import pickle
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from rpg.collection.layout import CENTRE_FILE, LAYOUT_FILE, Encoded, Layout, placed
from rpg.collection.statistics import LayoutStatistics
from rpg.collection.tensor_spec import TensorKind, TensorSpec
from rpg.config import Normalisation, TokenCut
from rpg.errors import RPGError

FLOATS = (torch.float32, torch.float16, torch.bfloat16, torch.float64)
OTHERS = (torch.bool, torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64, torch.uint16)
EPSILON = 2.0**-23

StateDict = dict[str, Tensor]


@dataclass
class Case:
    checkpoints: list[StateDict]
    token_size: int
    normalisation: Normalisation
    cut: TokenCut = TokenCut.by_tensor

    def layout(self) -> Layout:
        statistics = LayoutStatistics(self.checkpoints[0])
        for state_dict in self.checkpoints:
            statistics.update(state_dict)
        layout = statistics.layout(self.token_size, self.normalisation)
        specs = placed(layout.specs, self.token_size, self.cut)
        return Layout(self.normalisation, self.token_size, specs, layout.centre, self.cut)


@st.composite
def tensors(draw: st.DrawFn) -> tuple[str, Callable[[torch.Generator], Tensor]]:
    """A name suffix, and how to draw one checkpoint's values."""
    form = draw(st.sampled_from(["weight", "running_var", "other", "frozen", "transposed", "tiny"]))
    shape = draw(st.sampled_from([(), (1,), (0,), (3,), (7,), (2, 3), (4, 0, 2), (5, 1, 3), (33,), (16, 9)]))
    dtype = draw(st.sampled_from(OTHERS if form == "other" else FLOATS))
    scale = draw(st.sampled_from([1e-3, 1.0, 30.0]))
    shift = draw(st.sampled_from([0.0, 1.0, -20.0]))
    seed = draw(st.integers(0, 1000))

    def values(generator: torch.Generator) -> Tensor:
        if form == "other":
            return torch.randint(0, 2, shape, generator=generator).to(dtype)
        if form == "running_var":
            # Some variances are 0, as dead channels have them.
            drawn = torch.randn(shape, generator=generator, dtype=torch.float64) * scale
            return drawn.clamp(min=0).to(dtype)
        if form == "frozen":
            generator = torch.Generator().manual_seed(seed)
        drawn = torch.randn(shape, generator=generator, dtype=torch.float64)
        if form == "tiny":
            return (drawn * 1e-42).to(dtype)
        drawn = (drawn * scale + shift).to(dtype)
        axes = tuple(reversed(range(len(shape))))
        return drawn.reshape(shape[::-1]).permute(axes) if form == "transposed" else drawn

    return ("running_var" if form == "running_var" else "weight"), values


@st.composite
def cases(draw: st.DrawFn, cuts: Sequence[TokenCut] = tuple(TokenCut)) -> Case:
    drawn = draw(st.lists(tensors(), min_size=1, max_size=6))
    tied = draw(st.lists(st.integers(0, len(drawn) - 1), max_size=2))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    checkpoints = []
    for _ in range(draw(st.integers(2, 4))):
        state_dict = {f"{i}.{suffix}": values(generator) for i, (suffix, values) in enumerate(drawn)}
        names = list(state_dict)
        for i, target in enumerate(tied):
            state_dict[f"tied{i}.weight"] = state_dict[names[target]]
        checkpoints.append(state_dict)
    token_size = draw(st.sampled_from([1, 2, 3, 5, 8, 64, 1000]))
    normalisation = draw(st.sampled_from(list(Normalisation)))
    return Case(checkpoints, token_size, normalisation, draw(st.sampled_from(cuts)))


def bits(tensor: Tensor) -> bytes:
    return (
        tensor.detach().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()
        if tensor.numel()
        else b""
    )


def tolerance(spec: TensorSpec, values: Tensor, layout: Layout) -> Tensor:
    """Rounding of a few float32 operations on numbers as large as these, and of the tensor's own dtype."""
    own = torch.finfo(spec.dtype)
    largest = values.abs().max() + abs(spec.mean) + layout.centre[spec.name].double().abs().max()
    if spec.kind == TensorKind.running_var:
        largest = 20 * (values + spec.pre_mean)
    return 4 * EPSILON * largest + 2 * own.eps * values.abs() + 2 * own.tiny * own.eps


def assert_comes_back(state_dict: StateDict, decoded: StateDict, layout: Layout) -> None:
    assert list(decoded) == [spec.name for spec in layout.specs]
    for spec in layout.specs:
        given, found = state_dict[spec.name], decoded[spec.name]
        assert (found.shape, found.dtype) == (given.shape, given.dtype), spec.name
        assert found.is_contiguous()
        if spec.kind == TensorKind.constant:
            assert bits(found) == bits(given), spec.name
            continue
        expected = given.double()
        if spec.kind == TensorKind.running_var:
            expected = expected.clamp(min=spec.floor * spec.pre_mean)
        error = (found.double() - expected).abs()
        assert bool((error <= tolerance(spec, expected, layout)).all()), (spec, error.max())
        if spec.alias_of is not None:
            assert found is decoded[spec.alias_of]


@given(cases())
@settings(max_examples=60, deadline=None)
def test_every_checkpoint_of_the_collection_comes_back(case: Case) -> None:
    layout = case.layout()
    for state_dict in case.checkpoints:
        encoded = layout.encode(state_dict)
        assert encoded.tokens.dtype == torch.float32
        assert encoded.tokens.shape == (layout.tokens, layout.token_size)
        assert_comes_back(state_dict, layout.decode(encoded), layout)


@given(cases([TokenCut.by_tensor]))
@settings(max_examples=50, deadline=None)
def test_positions_lengths_and_mask_describe_the_tokens(case: Case) -> None:
    layout = case.layout()
    expected: list[tuple[int, int]] = []
    mask: list[list[bool]] = []
    tensor = 0
    for name, value in case.checkpoints[0].items():
        spec = next(spec for spec in layout.specs if spec.name == name)
        if spec.kind == TensorKind.constant or spec.alias_of is not None:
            assert spec.tokens == 0
            continue
        assert spec.first_token == len(expected)
        left = value.numel()
        index = 0
        while left > 0:
            expected.append((tensor, index))
            mask.append([i < left for i in range(layout.token_size)])
            left -= layout.token_size
            index += 1
        tensor += 1
    assert layout.tokens == len(expected)
    assert layout.positions().tolist() == [list(pair) for pair in expected]
    assert layout.positions().dtype == layout.lengths().dtype == torch.int64
    assert layout.mask().dtype == torch.bool
    assert layout.mask().tolist() == mask
    assert layout.lengths().tolist() == [sum(row) for row in mask]
    tokens = layout.encode(case.checkpoints[-1]).tokens
    assert bool((tokens[~layout.mask()] == 0).all())


@given(cases())
@settings(max_examples=50, deadline=None)
def test_one_token_decodes_bit_for_bit_as_the_whole_checkpoint(case: Case) -> None:
    layout = case.layout()
    tokens = torch.randn(layout.tokens, layout.token_size, generator=torch.Generator().manual_seed(0))
    whole = layout.decode(Encoded(tokens, layout.constants))
    pieces: dict[str, dict[int, Tensor]] = {}
    for index in range(layout.tokens):
        parts = layout.decode_token(index, tokens[index])
        assert parts[0][0] is layout.spec_of(index)
        assert sum(len(values) for _, _, values in parts) == layout.lengths()[index]
        for spec, start, values in parts:
            assert values.dtype == spec.dtype
            pieces.setdefault(spec.name, {})[start] = values
    assert pieces.keys() == {spec.name for spec in layout.specs if spec.tokens}
    for name, found in pieces.items():
        assert bits(torch.cat([found[start] for start in sorted(found)])) == bits(whole[name])


def test_long_running_variance_decodes_bit_for_bit_by_token() -> None:
    generator = torch.Generator().manual_seed(1)
    checkpoints = [{"bn.running_var": torch.rand(10_007, generator=generator) + 0.1} for _ in range(3)]
    layout = Case(checkpoints, 77, Normalisation.residual).layout()
    tokens = torch.randn(layout.tokens, 77, generator=generator)
    pieces = [layout.decode_token(i, tokens[i])[0][2] for i in range(layout.tokens)]
    assert bits(torch.cat(pieces)) == bits(layout.decode(Encoded(tokens, {}))["bn.running_var"])


def split_by_output(values: Tensor, size: int) -> list[list[float]]:
    """The published code's tokens by output channel, without their padding."""
    if values.numel() <= size:
        return [values.flatten().tolist()]
    channels, each = len(values), values[0].numel()
    if each > size:
        return [token for channel in values for token in split_by_output(channel, size)]
    count = int(channels / (size / each))
    while channels % count or channels // count * each > size:
        count += 1
    return values.reshape(count, -1).tolist()


SHAPES = [(33,), (16, 9), (6, 2, 3), (7, 5), (2, 50), (3, 4, 5, 2), (1, 30), (97,)]


@given(
    shapes=st.lists(st.sampled_from(SHAPES), min_size=1, max_size=4), token_size=st.integers(1, 40),
    seed=st.integers(0, 99),
)  # fmt: skip
@settings(max_examples=80, deadline=None)
def test_tokens_by_output_channel_and_flat_ones_are_the_published_ones(
    shapes: list[tuple[int, ...]], token_size: int, seed: int
) -> None:
    random = torch.Generator().manual_seed(seed)
    checkpoints = [
        {f"{i}.weight": torch.randn(shape, generator=random) for i, shape in enumerate(shapes)}
        for _ in range(3)
    ]
    by_tensor = Case(checkpoints, token_size, Normalisation.zscore).layout()
    normalised = []
    for spec in by_tensor.specs:
        rows = by_tensor.encode(checkpoints[0]).tokens[spec.first_token : spec.first_token + spec.tokens]
        normalised.append(rows.flatten()[: spec.numel].reshape(spec.shape))

    channels = Case(checkpoints, token_size, Normalisation.zscore, TokenCut.by_output_channel).layout()
    split = [split_by_output(values, token_size) for values in normalised]
    expected = [token for tokens in split for token in tokens]
    tokens, lengths = channels.encode(checkpoints[0]).tokens, channels.lengths().tolist()
    assert lengths == [len(token) for token in expected]
    assert [row[:length].tolist() for row, length in zip(tokens, lengths, strict=True)] == expected
    assert (tokens[~channels.mask()] == 0).all()
    places = [[i, k] for i, tokens in enumerate(split) for k in range(len(tokens))]
    assert channels.positions().tolist() == places

    flat = Case(checkpoints, token_size, Normalisation.zscore, TokenCut.flat).layout()
    in_a_row = torch.cat([values.flatten() for values in normalised])
    rows = flat.encode(checkpoints[0]).tokens
    assert len(rows) == flat.tokens == -(-len(in_a_row) // token_size)
    assert torch.equal(rows.flatten()[: len(in_a_row)], in_a_row)
    assert (rows[~flat.mask()] == 0).all()
    assert flat.mask().sum() == len(in_a_row)
    assert flat.positions().tolist() == [[0, k] for k in range(flat.tokens)]


@given(cases())
@settings(max_examples=60, deadline=None)
def test_saved_layout_is_the_same(tmp_path_factory: pytest.TempPathFactory, case: Case) -> None:
    directory = tmp_path_factory.mktemp("layout")
    layout = case.layout()
    layout.save(directory)
    loaded = Layout.load(directory)
    assert loaded.specs == layout.specs
    assert (loaded.normalisation, loaded.token_size) == (layout.normalisation, layout.token_size)
    assert (loaded.cut, loaded.tokens) == (layout.cut, layout.tokens)
    assert loaded.digest() == layout.digest()
    assert list(loaded.centre) == list(layout.centre)
    for name, tensor in layout.centre.items():
        assert (loaded.centre[name].shape, loaded.centre[name].dtype) == (tensor.shape, tensor.dtype)
        assert bits(loaded.centre[name]) == bits(tensor)
    encoded = layout.encode(case.checkpoints[1])
    assert torch.equal(loaded.encode(case.checkpoints[1]).tokens, encoded.tokens)
    decoded, expected = loaded.decode(encoded), layout.decode(encoded)
    assert all(bits(decoded[name]) == bits(expected[name]) for name in expected)


@given(cases())
@settings(max_examples=60, deadline=None)
def test_centre_is_a_usable_checkpoint_whose_residual_is_zero(case: Case) -> None:
    layout = case.layout()
    for spec in layout.specs:
        assert layout.centre[spec.name].shape == spec.shape
        assert layout.centre[spec.name].dtype == spec.dtype
        if spec.alias_of is not None:
            assert layout.centre[spec.name] is layout.centre[spec.alias_of]
    encoded = layout.encode(layout.centre)
    if case.normalisation == Normalisation.residual:
        assert bool((encoded.tokens == 0).all())


def test_order_of_the_given_state_dict_does_not_matter() -> None:
    layout, checkpoints = small()
    encoded = layout.encode(dict(reversed(checkpoints[0].items())))
    assert torch.equal(encoded.tokens, layout.encode(checkpoints[0]).tokens)


def test_a_token_may_be_larger_than_the_network() -> None:
    layout, checkpoints = small(token_size=10_000)
    assert layout.tokens == 2
    assert_comes_back(checkpoints[1], layout.decode(layout.encode(checkpoints[1])), layout)


def test_half_precision_tokens_decode() -> None:
    layout, checkpoints = small()
    encoded = layout.encode(checkpoints[1])
    decoded = layout.decode(encoded._replace(tokens=encoded.tokens.bfloat16()))
    assert decoded["a.weight"].dtype == torch.float32
    torch.testing.assert_close(decoded["a.weight"], checkpoints[1]["a.weight"], rtol=0, atol=0.05)


def test_parameters_that_require_gradients_are_taken() -> None:
    layout, checkpoints = small()
    parameters = {
        name: torch.nn.Parameter(tensor, requires_grad=tensor.is_floating_point())
        for name, tensor in checkpoints[0].items()
    }
    encoded = layout.encode(parameters)
    assert not encoded.tokens.requires_grad
    assert torch.equal(encoded.tokens, layout.encode(checkpoints[0]).tokens)


def test_decoded_tensors_share_no_memory_with_the_layout() -> None:
    layout, checkpoints = small()
    encoded = Encoded(layout.encode(checkpoints[0]).tokens, layout.constants)
    layout.decode(encoded)["n"].add_(5)
    assert int(layout.constants["n"]) == 3


def small(token_size: int = 4) -> tuple[Layout, list[StateDict]]:
    generator = torch.Generator().manual_seed(0)
    checkpoints = [
        {
            "a.weight": torch.randn(3, 5, generator=generator),
            "n": torch.tensor(3),
            "b.running_var": torch.rand(3, generator=generator) + 0.5,
        }
        for _ in range(3)
    ]
    for state_dict in checkpoints:
        state_dict["tied"] = state_dict["a.weight"]
    return Case(checkpoints, token_size, Normalisation.residual).layout(), checkpoints


def without(state_dict: StateDict, name: str) -> StateDict:
    return {key: value for key, value in state_dict.items() if key != name}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda s: without(s, "n"), r"'n' is missing; expected int64 \[\]"),
        (lambda s: {**s, "new": torch.zeros(2)}, "'new' is unexpected"),
        (
            lambda s: {**s, "a.weight": torch.zeros(5, 3)},
            r"'a.weight': expected float32 \[3, 5\], found float32 \[5, 3\]",
        ),
        (lambda s: {**s, "n": torch.tensor(3.0)}, r"'n': expected int64 \[\], found float32 \[\]"),
        (lambda s: {**s, "tied": s["tied"] + 1}, "'tied': expected the values of 'a.weight'"),
        (lambda s: {**s, "b.running_var": -s["b.running_var"]}, "'b.running_var': expected no negative"),
        (lambda s: {**s, "n": 3}, "'n': expected a tensor, found int"),
        (
            lambda s: {**s, "n": torch.zeros(2, dtype=torch.complex64)},
            "'n': dtype complex64 is not supported",
        ),
        (lambda s: {**s, "n": torch.eye(2).to_sparse()}, "'n': expected a dense tensor, found a sparse one"),
        (lambda s: {**s, "n": torch.zeros(2, device="meta")}, "'n': expected values, found a meta tensor"),
        (lambda s: {}, "'a.weight' is missing"),
    ],
)
def test_encoding_a_different_checkpoint_is_refused(change: Callable[[StateDict], Any], message: str) -> None:
    layout, checkpoints = small()
    with pytest.raises(RPGError, match=message) as caught:
        layout.encode(change(checkpoints[0]))
    assert "\n" not in str(caught.value)


def test_decoding_something_else_is_refused() -> None:
    layout, checkpoints = small()
    encoded = layout.encode(checkpoints[0])
    with pytest.raises(RPGError, match=r"tokens: expected shape \[5, 4\], found \[5, 3\]"):
        layout.decode(encoded._replace(tokens=encoded.tokens[:, :3]))
    with pytest.raises(RPGError, match="'n' is missing"):
        layout.decode(encoded._replace(constants={}))
    with pytest.raises(IndexError, match="token 5: the layout has 5 tokens"):
        layout.decode_token(5, encoded.tokens[0])


@pytest.mark.parametrize("missing", [LAYOUT_FILE, CENTRE_FILE])
def test_loading_without_a_file_names_it(tmp_path: Path, missing: str) -> None:
    small()[0].save(tmp_path)
    (tmp_path / missing).unlink()
    with pytest.raises(RPGError, match=f"{missing}: not found"):
        Layout.load(tmp_path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda c: c.update(version=2), "version: expected 1, got 2"),
        (lambda c: c.pop("version"), "version: expected 1, got None"),
        (lambda c: c.pop("token_size"), "key 'token_size' is missing"),
        (lambda c: c.update(extra=1), "unknown key 'extra'"),
        (lambda c: c.update(token_size=0), "token_size: expected an integer of at least 1, got 0"),
        (lambda c: c.update(token_size=5), "first_token"),
        (lambda c: c.update(normalisation="none"), "normalisation: expected one of residual, zscore"),
        (lambda c: c.update(tokens=9), "tokens: expected 5, the sum over tensors, got 9"),
        (lambda c: c.update(tensors=[]), "tensors: expected a list of at least one"),
        (lambda c: c["tensors"].append(c["tensors"][0]), "'a.weight' is listed twice"),
        (lambda c: c["tensors"][0].pop("scale"), "tensor 'a.weight' has no 'scale'"),
        (lambda c: c["tensors"][0].update(scale=0), "tensor 'a.weight': 'scale' is not valid: 0"),
        (lambda c: c["tensors"][0].update(mean=10**400), "tensor 'a.weight': 'mean' is not valid: 1000"),
        (lambda c: c["tensors"][0].update(dtype="float3"), "tensor 'a.weight': 'dtype' is not valid"),
        (lambda c: c["tensors"][0].update(odd=1), "tensor 'a.weight' has an unknown key 'odd'"),
        (lambda c: c["tensors"][1].update(kind="weight"), "tensor 'n': kind: expected constant"),
        (lambda c: c["tensors"][3].update(alias_of="n"), "tensor 'tied': alias_of: expected an earlier"),
    ],
)
def test_loading_an_inconsistent_layout_is_refused(
    tmp_path: Path, change: Callable[[Any], Any], message: str
) -> None:
    small()[0].save(tmp_path)
    path = tmp_path / LAYOUT_FILE
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))
    with pytest.raises(RPGError, match=message) as caught:
        Layout.load(tmp_path)
    assert str(path) in str(caught.value)


def test_loading_with_another_centre_is_refused(tmp_path: Path) -> None:
    layout, checkpoints = small()
    layout.save(tmp_path)
    other = Case(checkpoints[:2], 4, Normalisation.residual).layout()
    other.save(tmp_path / "other")
    (tmp_path / "other" / CENTRE_FILE).rename(tmp_path / CENTRE_FILE)
    with pytest.raises(
        RPGError, match=f"{CENTRE_FILE}: expected the centre that {LAYOUT_FILE} was written with"
    ):
        Layout.load(tmp_path)


def test_digest_changes_with_anything_that_changes() -> None:
    layout, checkpoints = small()
    again, _ = small()
    assert again.digest() == layout.digest()
    digests = {
        layout.digest(),
        small(token_size=5)[0].digest(),
        Case(checkpoints[:2], 4, Normalisation.residual).layout().digest(),
        Case(checkpoints, 4, Normalisation.zscore).layout().digest(),
    }
    assert len(digests) == 4


@given(cases(), st.integers(1, 40))
@settings(max_examples=60, deadline=None)
def test_tensors_are_encoded_in_pieces_to_the_same_bits(case: Case, values: int) -> None:
    layout = case.layout()
    whole = layout.encode(case.checkpoints[-1]).tokens
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("rpg.collection.layout._ENCODED_AT_ONCE", values)
        assert bits(layout.encode(case.checkpoints[-1]).tokens) == bits(whole)


@given(cases())
@settings(max_examples=60, deadline=None)
def test_a_layout_that_is_pickled_comes_back_with_its_ties(case: Case) -> None:
    layout = case.layout()
    buffers: list[pickle.PickleBuffer] = []
    pickled = pickle.dumps(layout, 5, buffer_callback=buffers.append)
    # As Ray gives them: in memory that must not be written to.
    found = pickle.loads(pickled, buffers=[buffer.raw().toreadonly() for buffer in buffers])
    assert list(found.centre) == list(layout.centre)
    for spec in layout.specs:
        assert found.centre[spec.name].shape == layout.centre[spec.name].shape
        assert bits(found.centre[spec.name]) == bits(layout.centre[spec.name])
        assert spec.alias_of is None or found.centre[spec.name] is found.centre[spec.alias_of]
    assert found.digest() == layout.digest()
