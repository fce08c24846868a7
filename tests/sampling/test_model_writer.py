"""A model written token by token is the file that the layout's decoder would have saved as a whole."""

import json
import os
import subprocess
import sys
import textwrap
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor, nn

from rpg.collection.layout import Encoded, Layout
from rpg.collection.statistics import LayoutStatistics
from rpg.config import Normalisation, TokenCut
from rpg.errors import RPGError
from rpg.sampling.model_writer import ModelWriter
from rpg.tasks.digits import DigitsNet

MakeLayout = Callable[..., Layout]


def mixed() -> dict[str, Tensor]:
    """Everything that a state_dict may hold; the tied tensors are one and the same."""
    tied = torch.zeros(5, 7)
    return {
        "half": torch.zeros(3, 5, dtype=torch.float16),
        "wörter.weight": tied,
        "steps": torch.tensor(12345),
        "empty": torch.zeros(0, 4),
        "flags": torch.tensor([True, False, True]),
        "scalar": torch.tensor(0.5),
        "bytes": torch.arange(7, dtype=torch.uint8),
        "brain": torch.zeros(33, dtype=torch.bfloat16),
        "double": torch.zeros(2, 3, dtype=torch.float64),
        "norm.running_var": torch.ones(9),
        "decoder.weight": tied,
        "empty int": torch.zeros(2, 0, dtype=torch.int16),
    }


@contextmanager
def written(
    path: Path, layout: Layout, metadata: dict[str, str] | None = None, dtype: torch.dtype | None = None
) -> Iterator[ModelWriter]:
    """A writer whose file is put in place if the block ends well."""
    file = ModelWriter(path, layout, metadata or {}, dtype).open()
    try:
        yield file
        file.commit()
    finally:
        file.discard()


def write(path: Path, layout: Layout, tokens: Tensor, metadata: dict[str, str] | None = None) -> None:
    with written(path, layout, metadata) as file:
        for index, values in enumerate(tokens):
            file.write_token(index, values)


def tied(checkpoints: list[dict[str, Tensor]]) -> list[dict[str, Tensor]]:
    return [{**c, "decoder.weight": c["wörter.weight"]} for c in checkpoints]


def mixed_layout(
    make_checkpoints: Callable[..., list[dict[str, Tensor]]],
    token_size: int,
    normalisation: Normalisation,
    cut: TokenCut,
) -> Layout:
    """Of checkpoints like `mixed`, whose tied tensors stay tied."""
    checkpoints = tied(make_checkpoints(4, template=mixed()))
    statistics = LayoutStatistics(checkpoints[0])
    for checkpoint in checkpoints:
        statistics.update(checkpoint)
    return statistics.layout(token_size, normalisation).with_token_size(token_size, cut)


def assert_is_decoded(path: Path, layout: Layout, tokens: Tensor) -> None:
    expected = layout.decode(Encoded(tokens, layout.constants))
    found = load_file(path)
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert (found[name].dtype, found[name].shape) == (tensor.dtype, tensor.shape)
        assert found[name].reshape(-1).view(torch.uint8).equal(tensor.reshape(-1).view(torch.uint8)), name


@settings(deadline=None, max_examples=25)
@given(
    token_size=st.integers(1, 40),
    normalisation=st.sampled_from(list(Normalisation)),
    cut=st.sampled_from(list(TokenCut)),
)
def test_reads_back_as_the_layout_decodes(
    tmp_path_factory: pytest.TempPathFactory,
    make_checkpoints: Callable[..., list[dict[str, Tensor]]],
    token_size: int,
    normalisation: Normalisation,
    cut: TokenCut,
) -> None:
    layout = mixed_layout(make_checkpoints, token_size, normalisation, cut)
    assert [spec.alias_of for spec in layout.specs if spec.alias_of] == ["wörter.weight"]
    tokens = torch.randn(layout.tokens, token_size, generator=torch.Generator().manual_seed(token_size))
    path = tmp_path_factory.mktemp("models") / "model.safetensors"
    write(path, layout, tokens)
    assert_is_decoded(path, layout, tokens)
    # Tokens may come in any order: each has its place.
    again = path.with_name("again.safetensors")
    with written(again, layout, {}) as file:
        for index in reversed(range(layout.tokens)):
            file.write_token(index, tokens[index])
    assert again.read_bytes() == path.read_bytes()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_another_dtype_is_that_of_module_to(
    tmp_path: Path, make_layout: MakeLayout, dtype: torch.dtype
) -> None:
    """Floating-point tensors alone, constants among them; the same rounding as PyTorch's."""
    layout = make_layout(8, template=mixed())
    assert any(value.is_floating_point() for value in layout.constants.values())
    tokens = torch.randn(layout.tokens, 8, generator=torch.Generator().manual_seed(0))
    path = tmp_path / "model.safetensors"
    with written(path, layout, {}, dtype) as file:
        for index, values in enumerate(tokens):
            file.write_token(index, values)
    assert path.stat().st_size == file.size
    found = load_file(path)
    for name, tensor in layout.decode(Encoded(tokens, layout.constants)).items():
        expected = tensor.to(dtype) if tensor.is_floating_point() else tensor
        assert found[name].dtype == expected.dtype
        assert found[name].equal(expected), name


def test_what_a_dtype_cannot_hold_is_refused(tmp_path: Path, make_layout: MakeLayout) -> None:
    layout = make_layout(16)
    path = tmp_path / "model.safetensors"
    with (
        pytest.raises(RPGError, match=r"tensor 'conv.weight': NaN or infinite"),
        written(path, layout, {}, torch.float16) as file,
    ):
        file.write_token(0, torch.full((16,), 1e6))
    assert not path.exists()


def test_values_are_aligned_to_their_size(tmp_path: Path, make_layout: MakeLayout) -> None:
    layout = make_layout(8, template=mixed())
    path = tmp_path / "model.safetensors"
    write(path, layout, torch.zeros(layout.tokens, 8))
    content = path.read_bytes()
    length = int.from_bytes(content[:8], "little")
    header = json.loads(content[8 : 8 + length])
    for spec in layout.specs:
        assert (8 + length + header[spec.name]["data_offsets"][0]) % spec.dtype.itemsize == 0


def test_metadata_say_where_the_model_is_from(tmp_path: Path, make_layout: MakeLayout) -> None:
    layout = make_layout(16)
    metadata = {"rpg.seed": "7", "who": 'Zoë "Z"\n'}
    write(tmp_path / "model.safetensors", layout, torch.zeros(layout.tokens, 16), metadata)
    with safe_open(tmp_path / "model.safetensors", framework="pt") as file:
        assert file.metadata() == metadata


def test_a_strict_load_into_the_plain_network(
    tmp_path: Path, make_layout: MakeLayout, small_net: Callable[[], nn.Module]
) -> None:
    for network in (small_net(), DigitsNet(), DigitsNet(outputs=10)):
        state_dict = network.state_dict()
        layout = make_layout(24, template=state_dict)
        tokens = 0.1 * torch.randn(layout.tokens, 24)
        path = tmp_path / "model.safetensors"
        write(path, layout, tokens)
        network.load_state_dict(load_file(path), strict=True)
        size = 4 if "norm.weight" in state_dict else 8
        assert network.eval()(torch.randn(2, 1, size, size)).isfinite().all()
        assert_is_decoded(path, layout, tokens)


def test_a_layout_of_constants_alone_needs_no_token(tmp_path: Path) -> None:
    same = {"weight": torch.randn(3), "steps": torch.tensor(4)}
    statistics = LayoutStatistics(same)
    statistics.update(same)
    statistics.update(same)
    layout = statistics.layout(8, Normalisation.residual)
    assert layout.tokens == 0
    write(tmp_path / "model.safetensors", layout, torch.zeros(0, 8))
    found = load_file(tmp_path / "model.safetensors")
    assert found.keys() == same.keys()
    assert all(torch.equal(found[name], same[name]) for name in same)


@pytest.mark.parametrize("error", [KeyboardInterrupt, ValueError])
def test_what_is_interrupted_leaves_no_file(
    tmp_path: Path, make_layout: MakeLayout, error: type[BaseException]
) -> None:
    layout = make_layout(16)
    path = tmp_path / "model.safetensors"

    with pytest.raises(error):
        interrupted(path, layout, error)
    assert list(tmp_path.iterdir()) == []
    write(path, layout, torch.zeros(layout.tokens, 16))
    before = path.read_bytes()
    with pytest.raises(error):
        interrupted(path, layout, error)
    assert path.read_bytes() == before
    assert list(tmp_path.iterdir()) == [path]


def interrupted(path: Path, layout: Layout, error: type[BaseException]) -> None:
    with written(path, layout, {}) as file:
        file.write_token(0, torch.ones(16))
        raise error


def test_a_directory_that_is_a_file_is_refused(tmp_path: Path, make_layout: MakeLayout) -> None:
    (tmp_path / "file").write_text("")
    with (
        pytest.raises(RPGError, match=r"model: cannot be written: (Not a directory|File exists)"),
        written(tmp_path / "file" / "model", make_layout(16), {}),
    ):
        pass


@pytest.mark.parametrize("limit", [100, 4000, 600_000])
def test_a_full_disk_is_one_line_and_leaves_nothing(
    tmp_path: Path, make_layout: MakeLayout, limit: int
) -> None:
    """A file size limit stands for the full disk; it is met at the header, at its size, or never."""
    layout = make_layout(512, template={"weight": torch.zeros(1000, 100)})
    layout.save(tmp_path / "layout")
    script = """
        import resource, sys, torch
        from pathlib import Path
        from rpg.collection.layout import Layout
        from rpg.errors import RPGError
        from rpg.sampling.model_writer import ModelWriter
        directory, limit = Path(sys.argv[1]), int(sys.argv[2])
        layout = Layout.load(directory / "layout")
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
        try:
            file = ModelWriter(directory / "out" / "model.safetensors", layout, {"long": "x" * 300}).open()
            try:
                for token in range(layout.tokens):
                    file.write_token(token, torch.zeros(512))
                file.commit()
            finally:
                file.discard()
        except RPGError as error:
            assert not list((directory / "out").iterdir()), "left behind"
            print(error)
            sys.exit(2)
    """
    result = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(script), str(tmp_path), str(limit)],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])},
    )
    path = tmp_path / "out" / "model.safetensors"
    if limit == 600_000:
        assert result.returncode == 0, result.stderr
        assert path.exists()
        return
    assert result.returncode == 2, result.stderr
    assert result.stdout == f"{path}: cannot be written: File too large\n"
    assert result.stderr == ""
