"""`rpg inspect`: every kind of path is recognised, and the counts are right."""

import io
import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from rich.console import Console
from torch import Tensor, nn

from rpg.collection.checkpoint import checkpoint_sha256, write_checkpoint
from rpg.collection.collection import Collection, Entry
from rpg.collection.manifest import write_manifest
from rpg.collection.shard_file import write_shard
from rpg.collection.statistics import LayoutStatistics
from rpg.commands.inspection import Inspection, inspect
from rpg.config import GeneratorConfig, Normalisation, TokenCut, TokenDtype, save_config
from rpg.errors import RPGError


def state_dict(seed: int = 0) -> dict[str, Tensor]:
    torch.manual_seed(seed)
    network = nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.Linear(4, 10, bias=False))
    tensors = dict(network.state_dict())
    for name, tensor in tensors.items():
        if tensor.is_floating_point():
            tensors[name] = tensor + 0.1 * torch.rand_like(tensor)
    tensors["tied"] = tensors["2.weight"]
    return tensors


@pytest.fixture
def collection(tmp_path: Path) -> Collection:
    root = tmp_path / "collection"
    entries = []
    for i in range(3):
        write_checkpoint(root / f"{i}.safetensors", state_dict(i), {})
        sha256 = checkpoint_sha256(root / f"{i}.safetensors")
        entries.append(Entry(f"{i}.safetensors", sha256, [float(i), 1.0], split="train" if i else "heldout"))
    collection = Collection(root, {"factory": "example"}, entries)
    collection.save()
    return collection


@pytest.fixture
def shards(tmp_path: Path, collection: Collection) -> Path:
    return cut(collection, tmp_path / "shards")


def cut(collection: Collection, directory: Path) -> Path:
    """Shards of it in `directory`."""
    directory.mkdir()
    statistics = LayoutStatistics(state_dict(0))
    checkpoints = [(entry.file, state_dict(i)) for i, entry in enumerate(collection.entries)]
    for _, tensors in checkpoints:
        statistics.update(tensors)
    layout = statistics.layout(16, Normalisation.residual)
    info = write_shard(directory / "0.arrow", layout, checkpoints, TokenDtype.float16)
    write_manifest(directory, layout, [info], collection.entries, TokenDtype.float16)
    return directory


def text_of(report: Inspection, show_all: bool = False) -> str:
    console = Console(file=io.StringIO(), width=120)
    console.print(report.to_rich(show_all))
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue()


def test_counts_of_a_checkpoint(tmp_path: Path) -> None:
    torch.save(state_dict(), tmp_path / "x.pt")
    report = inspect(tmp_path / "x.pt", token_size=16)
    rows = {row.name: row for row in report.tensors}
    assert list(rows) == list(state_dict())
    kinds = {name: row.kind for name, row in rows.items()}
    assert kinds["1.running_var"] == "running_var"
    assert kinds["1.num_batches_tracked"] == "constant"
    assert {kinds[name] for name in ("0.weight", "0.bias", "1.weight", "1.running_mean")} == {"weight"}
    # 36 values: three tokens of 16, the last one with 12 places of padding.
    assert (rows["0.weight"].tokens, rows["0.weight"].padding) == (3, 12)
    assert (rows["0.bias"].tokens, rows["0.bias"].padding) == (1, 12)
    assert (rows["1.num_batches_tracked"].tokens, rows["1.num_batches_tracked"].padding) == (0, 0)
    assert (rows["tied"].alias_of, rows["tied"].tokens, rows["tied"].parameters) == ("2.weight", 0, 0)
    values = 36 + 4 + 4 * 4 + 1 + 40
    tokens = 3 + 1 + 4 + 3
    padding = 12 + 12 + 4 * 12 + 8
    assert report.totals == {
        "tensors": 9,
        "parameters": values,
        "bytes": 4 * (values - 1) + 8,
        "tokens": tokens,
        "padding_share": padding / (16 * tokens),
    }
    assert report.facts["file_bytes"] == (tmp_path / "x.pt").stat().st_size


@pytest.mark.parametrize(("largest", "expected"), [(50, 50), (10_000, 8192)])
def test_the_default_token_size(tmp_path: Path, largest: int, expected: int) -> None:
    tensors = {"a": torch.zeros(largest), "b": torch.zeros(3), "n": torch.zeros(20_000, dtype=torch.int64)}
    torch.save(tensors, tmp_path / "x.pt")
    assert inspect(tmp_path / "x.pt").token_size == expected


def test_a_token_larger_than_everything(tmp_path: Path) -> None:
    torch.save({"a": torch.zeros(10)}, tmp_path / "x.pt")
    report = inspect(tmp_path / "x.pt", token_size=1000)
    assert (report.totals["tokens"], report.totals["padding_share"]) == (1, 0.99)


def test_a_checkpoint_without_floats(tmp_path: Path) -> None:
    torch.save({"n": torch.tensor([1, 2])}, tmp_path / "x.pt")
    report = inspect(tmp_path / "x.pt")
    assert (report.totals["tokens"], report.totals["padding_share"]) == (0, 0.0)
    assert "0 tokens" in text_of(report)


def test_an_adapter(tmp_path: Path) -> None:
    (tmp_path / "adapter_config.json").write_text("{}")
    torch.save({"lora_A": torch.zeros(4, 2)}, tmp_path / "adapter_model.bin")
    report = inspect(tmp_path)
    assert report.what == "PEFT adapter"
    assert report.totals["parameters"] == 8


def test_a_collection(collection: Collection) -> None:
    report = inspect(collection.root, token_size=16)
    assert report.what == "collection"
    assert report.facts["checkpoints"] == 3
    assert report.facts["splits"] == {"train": 2, "validation": 0, "heldout": 1}
    assert report.facts["condition_width"] == 2
    assert report.tensors == inspect(collection.root / "0.safetensors", token_size=16).tensors
    assert inspect(collection.root / "collection.json", token_size=16).tensors == report.tensors


def test_permutation_states_are_counted(collection: Collection, tmp_path: Path) -> None:
    assert "permutation_states" not in inspect(collection.root).facts
    assert "permutation_states" not in inspect(cut(collection, tmp_path / "without")).facts
    collection.entries = [replace(entry, state=5 * (i % 2)) for i, entry in enumerate(collection.entries)]
    collection.save()
    assert inspect(collection.root).facts["permutation_states"] == 2
    assert "permutation states: 2" in text_of(inspect(cut(collection, tmp_path / "with")))


def test_a_collection_is_verified(collection: Collection) -> None:
    seen: list[tuple[int, int]] = []
    report = inspect(collection.root, verify=True, progress=lambda done, total: seen.append((done, total)))
    assert report.facts["verified"] is True
    assert seen == [(1, 3), (2, 3), (3, 3)]
    write_checkpoint(collection.root / "2.safetensors", state_dict(7), {})
    inspect(collection.root)
    with pytest.raises(RPGError, match=r"2\.safetensors: changed"):
        inspect(collection.root, verify=True)


def test_shards(shards: Path) -> None:
    report = inspect(shards, verify=True)
    assert report.what == "shards"
    assert report.token_size == 16
    assert report.facts["checkpoints"] == 3
    assert report.facts["condition_width"] == 2
    assert report.facts["dtype"] == "float16"
    assert report.facts["verified"] is True
    expected = {row.name: row for row in inspect_checkpoint(shards).tensors}
    for row in report.tensors:
        assert row == expected[row.name]


@pytest.mark.parametrize("cut", list(TokenCut))
def test_tokens_of_every_cut_are_counted_once(tmp_path: Path, cut: TokenCut) -> None:
    statistics = LayoutStatistics(state_dict(0))
    for seed in (0, 1):
        statistics.update(state_dict(seed))
    layout = statistics.layout(6, Normalisation.residual).with_token_size(6, cut)
    generator = tmp_path / "generator"
    layout.save(generator)
    save_config(GeneratorConfig(), generator / "config.yaml")
    write_checkpoint(generator / "generator.safetensors", {"w": torch.zeros(3)}, {})
    totals = inspect(generator).totals
    assert totals["tokens"] == layout.tokens
    assert totals["padding_share"] == pytest.approx(1 - layout.mask().float().mean().item(), abs=1e-6)


def inspect_checkpoint(shards: Path) -> Inspection:
    path = shards.parent / "x.pt"
    torch.save(state_dict(), path)
    return inspect(path, token_size=16)


def test_shards_that_are_damaged(shards: Path) -> None:
    shard = shards / "0.arrow"
    content = bytearray(shard.read_bytes())
    content[len(content) // 2] ^= 1
    shard.write_bytes(content)
    with pytest.raises(RPGError, match=r"0\.arrow"):
        inspect(shards, verify=True)
    shard.write_bytes(content[:-100])
    with pytest.raises(RPGError, match=r"0\.arrow"):
        inspect(shards)


def test_a_generator(tmp_path: Path, shards: Path) -> None:
    """Made by hand: `inspect` reads files, and builds none of the generator's networks."""
    directory = tmp_path / "generator"
    directory.mkdir()
    for name in ("layout.json", "centre.safetensors"):
        (directory / name).write_bytes((shards / name).read_bytes())
    save_config(GeneratorConfig(), directory / "config.yaml")
    write_checkpoint(directory / "generator.safetensors", {"w": torch.zeros(3, 5)}, {})
    report = inspect(directory)
    assert report.what == "generator"
    assert report.facts["generator_parameters"] == 15
    assert report.facts["config"]["recurrent"]["kind"] == "mamba2"
    assert report.tensors == inspect(shards).tensors
    (directory / "layout.json").unlink()
    with pytest.raises(RPGError, match=r"layout\.json: not found"):
        inspect(directory)


@pytest.mark.parametrize("what", ["checkpoint", "collection", "shards"])
def test_json_is_plain(collection: Collection, shards: Path, what: str) -> None:
    paths = {"checkpoint": collection.root / "0.safetensors", "collection": collection.root, "shards": shards}
    content = inspect(paths[what]).to_json()
    assert json.loads(json.dumps(content, allow_nan=False)) == content
    assert content["what"] == what
    assert {row["name"] for row in content["tensors"]} == set(state_dict())


def test_long_layouts_are_cut_in_the_middle(tmp_path: Path) -> None:
    write_checkpoint(tmp_path / "x.safetensors", {f"t{i:03d}": torch.zeros(2) for i in range(100)}, {})
    report = inspect(tmp_path / "x.safetensors")
    short, full = text_of(report), text_of(report, show_all=True)
    assert short.count("float32") == 24
    assert "76 more (--all shows them)" in short
    assert "t011" in short
    assert "t012" not in short
    assert "t088" in short
    assert full.count("float32") == 100
    assert "100 tensors, 200 values, 800 bytes; 100 tokens of 2, 0.0 % padding" in short


def test_names_are_not_markup(tmp_path: Path) -> None:
    torch.save({"[red]a[/red]": torch.zeros(2), "[/nothing]": torch.zeros(2)}, tmp_path / "x.pt")
    text = text_of(inspect(tmp_path / "x.pt"))
    assert "[red]a[/red]" in text
    assert "[/nothing]" in text


def test_a_path_that_is_none_of_these_is_refused(tmp_path: Path, shards: Path) -> None:
    empty = tmp_path / "empty"
    empty.mkdir()
    plain = tmp_path / "plain"
    plain.mkdir()
    torch.save(state_dict(), plain / "x.pt")
    for path, token_size, words in [
        (tmp_path / "nowhere", None, "not found"),
        (empty, None, "not a collection, shards, a generator or a PEFT adapter"),
        (plain, None, "`rpg register` makes a collection of it"),
        (plain / "x.pt", 0, "--token-size: expected at least 1, got 0"),
        (shards, 16, "has a layout of its own"),
    ]:
        with pytest.raises(RPGError) as caught:
            inspect(path, token_size)
        assert words in str(caught.value)
