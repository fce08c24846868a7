"""Checkpoint files: every form is read unchanged, and all other files are refused in one line."""

import json
import os
import pickle
import resource
import stat
import struct
import subprocess
import sys
import zipfile
from collections import OrderedDict
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from rpg.collection.checkpoint import check_finite, checkpoint_sha256, read_checkpoint, write_checkpoint
from rpg.errors import RPGError
from rpg.storage.files import sha256


def example() -> dict[str, Tensor]:
    """Names out of alphabetical order; mixed dtypes, 0-d, empty, bool, non-contiguous, tied."""
    torch.manual_seed(0)
    tied = torch.randn(4, 3)
    return {
        "z.10.weight": torch.randn(5, 7),
        "z.2.weight": torch.randn(3, dtype=torch.float64).to(torch.bfloat16),
        "a.half": torch.randn(3).half(),
        "a.count": torch.tensor(7),
        "a.flag": torch.tensor([True, False]),
        "a.empty": torch.zeros(0, 3),
        "a.turned": torch.randn(6, 2).t(),
        "embedding": tied,
        "head": tied,
    }


def assert_same(found: dict[str, Tensor], expected: dict[str, Tensor], order: bool = True) -> None:
    assert (list(found) == list(expected)) if order else (set(found) == set(expected))
    for name, tensor in expected.items():
        assert found[name].dtype == tensor.dtype, name
        assert found[name].shape == tensor.shape, name
        assert torch.equal(found[name], tensor), name


def assert_refused(path: Path, *words: str) -> str:
    with pytest.raises(RPGError) as caught:
        read_checkpoint(path)
    message = str(caught.value)
    assert "\n" not in message
    assert path.name in message
    for word in words:
        assert word in message
    return message


class TestReading:
    @pytest.mark.parametrize("zipped", [True, False], ids=["zip", "legacy"])
    @pytest.mark.parametrize("suffix", [".pt", ".pth", ".PTH"])
    def test_torch_files_keep_order_values_and_ties(self, tmp_path: Path, zipped: bool, suffix: str) -> None:
        path = tmp_path / f"x{suffix}"
        torch.save(example(), path, _use_new_zipfile_serialization=zipped)
        found = read_checkpoint(path)
        assert_same(found, example())
        assert found["embedding"].data_ptr() == found["head"].data_ptr()

    @pytest.mark.parametrize("key", ["state_dict", "model", "model_state_dict"])
    def test_training_checkpoints_hold_the_state_dict_inside(self, tmp_path: Path, key: str) -> None:
        path = tmp_path / "x.pt"
        torch.save({"epoch": 3, key: OrderedDict(example()), "optimizer": {"lr": [0.1]}}, path)
        assert_same(read_checkpoint(path), example())

    def test_a_tensor_may_be_named_like_a_training_checkpoints_key(self, tmp_path: Path) -> None:
        torch.save({"model": torch.ones(2), "b": torch.zeros(1)}, tmp_path / "x.pt")
        assert list(read_checkpoint(tmp_path / "x.pt")) == ["model", "b"]

    def test_parameters_come_without_gradients(self, tmp_path: Path) -> None:
        torch.save(dict(nn.Linear(2, 3).named_parameters()), tmp_path / "x.pt")
        assert not any(tensor.requires_grad for tensor in read_checkpoint(tmp_path / "x.pt").values())

    def test_foreign_safetensors_come_in_natural_order(self, tmp_path: Path) -> None:
        names = ["layers.10.w", "layers.2.w", "head", "layers.2.b"]
        save_file({name: torch.ones(1) for name in names}, tmp_path / "x.safetensors")
        found = list(read_checkpoint(tmp_path / "x.safetensors"))
        assert found == ["head", "layers.2.b", "layers.2.w", "layers.10.w"]

    @pytest.mark.parametrize("order", ["no JSON", '["other"]', "3", '["a", "a"]', "[1, null]"])
    def test_a_foreign_tensor_order_is_ignored(self, tmp_path: Path, order: str) -> None:
        tensors = {"b": torch.ones(1), "a": torch.zeros(1)}
        save_file(tensors, tmp_path / "x.safetensors", metadata={"tensor_order": order})
        assert list(read_checkpoint(tmp_path / "x.safetensors")) == ["a", "b"]

    @pytest.mark.parametrize("form", ["safetensors", "bin"])
    def test_adapter_directories_are_read(self, tmp_path: Path, form: str) -> None:
        weights = {"q.lora_A.weight": torch.randn(2, 4), "q.lora_B.weight": torch.randn(4, 2)}
        (tmp_path / "adapter_config.json").write_text("{}")
        if form == "bin":
            torch.save(weights, tmp_path / "adapter_model.bin")
        else:
            save_file(weights, tmp_path / "adapter_model.safetensors")
        assert_same(read_checkpoint(tmp_path), weights)

    def test_an_adapters_digest_covers_its_configuration(self, tmp_path: Path) -> None:
        (tmp_path / "adapter_config.json").write_text('{"r": 2}')
        save_file({"a": torch.ones(2)}, tmp_path / "adapter_model.safetensors")
        before = checkpoint_sha256(tmp_path)
        (tmp_path / "adapter_config.json").write_text('{"r": 4}')
        assert checkpoint_sha256(tmp_path) != before

    @pytest.mark.slow
    @pytest.mark.parametrize("dora", [False, True])
    def test_adapters_that_peft_saved_are_read(self, tmp_path: Path, dora: bool) -> None:
        peft = pytest.importorskip("peft")
        network = nn.Sequential(OrderedDict(a=nn.Linear(6, 5), b=nn.Linear(5, 4)))
        adapted = peft.get_peft_model(network, peft.LoraConfig(r=2, target_modules=["a", "b"], use_dora=dora))
        adapted.save_pretrained(tmp_path)
        expected = peft.get_peft_model_state_dict(adapted)
        assert_same(read_checkpoint(tmp_path), dict(expected), order=False)


class Touch:
    """Unpickled, it creates a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return (Path.touch, (self.path,))


class TestPicklesAreNeverExecuted:
    @pytest.mark.parametrize("form", ["zip", "legacy", "plain pickle", "inside a state_dict", "adapter"])
    def test_a_malicious_pickle_does_nothing(self, tmp_path: Path, form: str) -> None:
        path, harm = tmp_path / "x.pt", tmp_path / "harm"
        evil: Any = Touch(harm)
        if form == "plain pickle":
            path.write_bytes(pickle.dumps(evil))
        elif form == "adapter":
            path = tmp_path / "adapter_model.bin"
            (tmp_path / "adapter_config.json").write_text("{}")
            torch.save(evil, path)
        else:
            evil = {"a": torch.ones(1), "b": evil} if form == "inside a state_dict" else evil
            torch.save(evil, path, _use_new_zipfile_serialization=form != "legacy")
        assert_refused(path, "never executes a pickle", ".safetensors")
        if form == "adapter":
            with pytest.raises(RPGError, match="never executes a pickle"):
                read_checkpoint(tmp_path)
        assert not harm.exists()

    def test_the_pickle_would_have_done_harm(self, tmp_path: Path) -> None:
        pickle.loads(pickle.dumps(Touch(tmp_path / "harm")))
        assert (tmp_path / "harm").exists()

    @pytest.mark.parametrize("zipped", [True, False])
    def test_pickled_modules_are_refused(self, tmp_path: Path, zipped: bool) -> None:
        torch.save(nn.Linear(2, 2), tmp_path / "x.pt", _use_new_zipfile_serialization=zipped)
        assert_refused(tmp_path / "x.pt", "torch.nn.modules.linear.Linear", "never executes a pickle")

    @pytest.mark.filterwarnings("ignore::DeprecationWarning")
    def test_torchscript_archives_are_refused(self, tmp_path: Path) -> None:
        torch.jit.save(torch.jit.script(nn.Linear(2, 2)), tmp_path / "x.pt")
        assert_refused(tmp_path / "x.pt", "is a TorchScript archive")


class TestBadFiles:
    @pytest.mark.parametrize("name", ["x.safetensors", "x.pt", "x.pth"])
    def test_missing_empty_and_unreadable_files_are_refused(self, tmp_path: Path, name: str) -> None:
        path = tmp_path / name
        assert_refused(path, "not found")
        path.write_bytes(b"")
        assert_refused(path, "empty")
        for junk in (b"\0", b"hello, this is no checkpoint " * 20, b"\x80", b"PK\x03\x04", b"\xff" * 4000):
            path.write_bytes(junk)
            assert_refused(path)

    @pytest.mark.parametrize("form", ["zip", "legacy", "safetensors"])
    def test_files_truncated_anywhere_are_refused(self, tmp_path: Path, form: str) -> None:
        path = tmp_path / ("x.safetensors" if form == "safetensors" else "x.pt")
        if form == "safetensors":
            save_file({"a": torch.randn(200)}, path)
        else:
            torch.save({"a": torch.randn(200)}, path, _use_new_zipfile_serialization=form == "zip")
        whole = path.read_bytes()
        for length in [*range(1, len(whole), 97), len(whole) - 1]:
            path.write_bytes(whole[:length])
            assert_refused(path)

    def test_a_false_safetensors_header_is_refused(self, tmp_path: Path) -> None:
        header = json.dumps(
            {"a": {"dtype": "F32", "shape": [1 << 40], "data_offsets": [0, 4 << 40]}}
        ).encode()
        path = tmp_path / "x.safetensors"
        path.write_bytes(struct.pack("<Q", len(header)) + header + b"\0" * 64)
        assert_refused(path)

    @pytest.mark.parametrize(
        ("content", "words"),
        [
            ([torch.ones(1)], "list"),
            (torch.ones(1), "Tensor"),
            ({}, "empty"),
            ({"state_dict": {}}, "empty"),
            ({"epoch": 3, "loss": 0.5}, "no tensors by their names, but 'epoch', 'loss'"),
            ({"a": torch.ones(1), "b": [torch.ones(1)]}, "'b': expected a tensor, found a list"),
            ({3: torch.ones(1)}, "key 3"),
            ({"model": {"a": torch.ones(1)}, "state_dict": {"a": torch.ones(1)}}, "'model' (1 "),
            ({"a": torch.ones(2, 2).to_sparse()}, "sparse"),
            ({"a": torch.ones(1, dtype=torch.complex64)}, "'a'"),
        ],
    )
    def test_content_other_than_a_state_dict_is_refused(
        self, tmp_path: Path, content: Any, words: str
    ) -> None:
        torch.save(content, tmp_path / "x.pt")
        assert_refused(tmp_path / "x.pt", words)

    def test_other_zip_files_are_refused(self, tmp_path: Path) -> None:
        with zipfile.ZipFile(tmp_path / "x.pt", "w") as archive:
            archive.writestr("a.txt", "x")
        assert_refused(tmp_path / "x.pt", "corrupt")

    @pytest.mark.parametrize("name", ["x.safetensors", "x.pt"])
    def test_a_directory_instead_of_a_file_is_refused(self, tmp_path: Path, name: str) -> None:
        (tmp_path / name).mkdir()
        assert_refused(tmp_path / name, "directory")

    def test_an_adapter_without_weights_is_refused(self, tmp_path: Path) -> None:
        (tmp_path / "adapter_config.json").write_text("{}")
        assert_refused(tmp_path, "adapter_model.safetensors", "adapter_model.bin")

    @pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
    def test_permission_denied(self, tmp_path: Path) -> None:
        write_checkpoint(tmp_path / "x.safetensors", {"a": torch.ones(1)}, {})
        (tmp_path / "x.safetensors").chmod(0)
        assert_refused(tmp_path / "x.safetensors", "Permission denied")


class TestFinite:
    @pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
    @pytest.mark.parametrize(("value", "words"), [("nan", "1 NaN and 0 Inf"), ("-inf", "0 NaN and 1 Inf")])
    def test_nan_and_inf_are_named(self, dtype: torch.dtype, value: str, words: str) -> None:
        bad = torch.zeros(3, 4, dtype=dtype)
        bad[2, 3] = float(value)
        with pytest.raises(RPGError, match=rf"x\.pt: tensor 'b' holds {words}"):
            check_finite({"a": torch.ones(2), "n": torch.ones(2, dtype=torch.int64), "b": bad}, Path("x.pt"))

    def test_finite_values_and_integers_pass(self) -> None:
        check_finite(example(), Path("x.pt"))


class TestWriting:
    def test_written_and_read_back(self, tmp_path: Path) -> None:
        path = tmp_path / "new" / "x.safetensors"
        write_checkpoint(path, example(), {"job": "7", "text": 'quote " and ünïcode\n'})
        assert_same(read_checkpoint(path), example())
        assert_same(load_file(path), example(), order=False)
        with safe_open(path, "pt") as file:
            assert file.metadata()["job"] == "7"
            assert file.metadata()["text"] == 'quote " and ünïcode\n'
        assert [child.name for child in path.parent.iterdir()] == ["x.safetensors"]

    def test_a_network_with_tied_weights_loads_strictly(self, tmp_path: Path) -> None:
        network = nn.Sequential(nn.Embedding(5, 3), nn.Linear(3, 5, bias=False))
        network[1].weight = network[0].weight
        write_checkpoint(tmp_path / "x.safetensors", network.state_dict(), {})
        network.load_state_dict(load_file(tmp_path / "x.safetensors"), strict=True)

    def test_overlapping_views_keep_their_values(self, tmp_path: Path) -> None:
        values = torch.arange(10.0)
        state_dict = {"a": values[:6], "b": values[4:], "c": values.expand(3, 10), "d": values[::2]}
        write_checkpoint(tmp_path / "x.safetensors", state_dict, {})
        assert_same(read_checkpoint(tmp_path / "x.safetensors"), state_dict)

    def test_equal_arguments_give_equal_bytes(self, tmp_path: Path) -> None:
        metadata = {f"key{i}": str(i) for i in range(12)}
        digests = set()
        for _ in range(5):
            write_checkpoint(tmp_path / "x.safetensors", example(), metadata)
            digests.add(sha256(tmp_path / "x.safetensors"))
        assert len(digests) == 1

    @pytest.mark.parametrize(
        "state_dict", [{}, {"a": torch.ones(1, device="meta")}, {"a": torch.eye(2).to_sparse()}]
    )
    def test_tensors_that_cannot_be_written_are_refused(
        self, tmp_path: Path, state_dict: dict[str, Tensor]
    ) -> None:
        with pytest.raises(RPGError, match=r"x\.safetensors: "):
            write_checkpoint(tmp_path / "x.safetensors", state_dict, {})
        assert list(tmp_path.iterdir()) == []

    def test_readable_by_others(self, tmp_path: Path) -> None:
        old = os.umask(0o022)
        try:
            write_checkpoint(tmp_path / "x.safetensors", {"a": torch.ones(1)}, {})
        finally:
            os.umask(old)
        assert stat.S_IMODE((tmp_path / "x.safetensors").stat().st_mode) == 0o644

    def test_a_full_disk_leaves_the_earlier_file(self, tmp_path: Path) -> None:
        path = tmp_path / "x.safetensors"
        write_checkpoint(path, {"a": torch.ones(5)}, {})
        before = path.read_bytes()
        code = (
            "import sys, torch\n"
            "from pathlib import Path\n"
            "from rpg.collection.checkpoint import write_checkpoint\n"
            "from rpg.commands.exit_status import run_command\n"
            f"path = Path({str(path)!r})\n"
            "sys.exit(run_command(lambda: write_checkpoint(path, {'a': torch.ones(100000)}, {}), 'rpg'))\n"
        )
        result = subprocess.run(
            [sys.executable, "-c", code],
            capture_output=True,
            text=True,
            check=False,
            # Python ignores SIGXFSZ, so that a write beyond the limit fails like one to a full disk.
            preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (65536, 65536)),
        )
        assert result.returncode == 2
        assert result.stderr.count("\n") == 1
        assert f"rpg: error: {path}: cannot be written: " in result.stderr
        assert "File too large" in result.stderr
        assert path.read_bytes() == before
        assert [child.name for child in tmp_path.iterdir()] == ["x.safetensors"]


class TestHostileArchives:
    def test_a_corrupt_zip_directory_is_refused(self, tmp_path: Path) -> None:
        path = tmp_path / "a.pt"
        torch.save({"weight": torch.zeros(3)}, path)
        content = bytearray(path.read_bytes())
        # The first name in the archive's directory, which is marked as UTF-8 or not.
        at = content.index(b"PK\x01\x02")
        content[at + 9] |= 0x08
        content[at + 46] = 0xFF
        path.write_bytes(content)
        with pytest.raises(RPGError, match=r"a\.pt: "):
            read_checkpoint(path)

    def test_a_small_file_that_would_fill_the_memory_is_refused(self, tmp_path: Path) -> None:
        path = tmp_path / "a.pt"
        torch.save({"weight": torch.zeros(1).expand(10**13)}, path)
        with pytest.raises(
            RPGError, match=r"a\.pt: tensor 'weight' of shape \[10000000000000\] repeats 4 stored"
        ):
            read_checkpoint(path)

    def test_a_mask_that_repeats_its_rows_is_read(self, tmp_path: Path) -> None:
        path = tmp_path / "a.pt"
        torch.save({"mask": torch.arange(8.0).expand(4, 8)}, path)
        assert read_checkpoint(path)["mask"].equal(torch.arange(8.0).expand(4, 8))
