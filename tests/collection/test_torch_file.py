"""PyTorch's files: weights are found wherever they lie, and nothing in a file is ever executed."""

import argparse
import copy
import io
import os
import pickle
import pickletools
import subprocess
import sys
import zipfile
from collections import Counter, OrderedDict, defaultdict
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from rpg.collection.checkpoint import examine_checkpoint, read_checkpoint
from rpg.collection.reading import AS_STORED, Reading
from rpg.collection.torch_file import OtherContentError, Placeholder, read_torch_file
from rpg.errors import RPGError


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(OrderedDict(a=nn.Linear(3, 4), norm=nn.BatchNorm1d(4), b=nn.Linear(4, 2)))


def optimiser_state(steps: int = 1) -> dict[str, Any]:
    model = network()
    optimiser = torch.optim.Adam(model.parameters())
    for _ in range(steps):
        model(torch.randn(5, 3)).sum().backward()
        optimiser.step()
    return optimiser.state_dict()


def assert_read(path: Path, expected: dict[str, Tensor], key: str | None = None) -> None:
    found = read_checkpoint(path, Reading(key=key))
    assert list(found) == list(expected)
    for name, tensor in expected.items():
        assert torch.equal(found[name], tensor), name


def assert_no_placeholder_is_left() -> None:
    known = torch.serialization.get_safe_globals()
    assert not [each for each in known if Placeholder in getattr(each, "__mro__", ())]


def refusal(path: Path, key: str | None = None) -> str:
    with pytest.raises(RPGError) as caught:
        read_checkpoint(path, Reading(key=key))
    message = str(caught.value)
    assert "\n" not in message
    assert path.name in message
    return message


class EasyDict(dict[str, Any]):
    """As several libraries keep settings in: a dict whose values are attributes too."""

    def __init__(self, **values: Any) -> None:
        super().__init__(**values)
        self.__dict__.update(values)


class Names(list[str]):
    pass


class Recipe:
    def __init__(self) -> None:
        self.rate, self.path = 0.1, Path("x")


class Trainer:
    def __init__(self) -> None:
        self.model = network()


class Call:
    """Unpickled, it calls a function."""

    def __init__(self, function: Any, *arguments: Any) -> None:
        self.function, self.arguments = function, arguments

    def __reduce__(self) -> tuple[Any, ...]:
        return self.function, self.arguments


class Shadowed:
    """Unpickled, it is an OrderedDict with attributes in the place of its methods."""

    def __init__(self, items: dict[str, Any], attributes: dict[str, Any]) -> None:
        self.items, self.attributes = items, attributes

    def __reduce__(self) -> tuple[Any, ...]:
        return OrderedDict, (), self.attributes, None, iter(self.items.items())


class TestWhereTheWeightsAre:
    @pytest.mark.parametrize("zipped", [True, False], ids=["zip", "legacy"])
    @pytest.mark.parametrize(
        "wrap",
        [
            lambda w: {"net": w},
            lambda w: {"model": {"state_dict": w}, "epoch": 3},
            lambda w: {"module": w, "optimizer": optimiser_state(), "lr_scheduler": {"last_epoch": 2}},
            lambda w: {"step": torch.tensor(3), "loss": torch.tensor(0.5), "generator": w},
            lambda w: {"model": w, "rng": {"cpu": torch.get_rng_state(), "cuda": [torch.get_rng_state()]}},
            lambda w: {"state_dict": w, "again": w},
        ],
    )
    def test_the_only_mapping_of_tensors_is_taken(self, tmp_path: Path, wrap: Any, zipped: bool) -> None:
        weights = network().state_dict()
        torch.save(wrap(weights), tmp_path / "x.pt", _use_new_zipfile_serialization=zipped)
        assert_read(tmp_path / "x.pt", weights)

    def test_a_checkpoint_as_lightning_writes_it(self, tmp_path: Path) -> None:
        weights = network().state_dict()
        checkpoint = {
            "epoch": 3,
            "global_step": 12,
            "pytorch-lightning_version": "2.4.0",
            "state_dict": weights,
            "loops": {"fit_loop": {"state_dict": {}, "epoch_progress": {"current": {"ready": 4}}}},
            "callbacks": {"ModelCheckpoint{}": {"best_model_score": torch.tensor(0.25), "path": Path("a")}},
            "optimizer_states": [optimiser_state()],
            "lr_schedulers": [{"last_epoch": 3}],
            "hparams_name": "kwargs",
            "hyper_parameters": EasyDict(lr=0.1, args=argparse.Namespace(seed=1)),
        }
        torch.save(checkpoint, tmp_path / "x.ckpt")
        assert_read(tmp_path / "x.ckpt", weights)

    def test_of_several_mappings_the_key_decides(self, tmp_path: Path) -> None:
        weights = network().state_dict()
        average = {name: tensor * 0 for name, tensor in weights.items()}
        both = {"state_dict": weights, "state_dict_ema": average, "extra": {"ema": {"w": average["a.bias"]}}}
        torch.save(both, tmp_path / "x.pth.tar")
        message = refusal(tmp_path / "x.pth.tar")
        for choice in ("'state_dict' (9 entries)", "'state_dict_ema' (9 entries)", "'extra.ema' (1 entries)"):
            assert choice in message
        assert "--key NAME" in message
        assert_read(tmp_path / "x.pth.tar", weights, "state_dict")
        assert_read(tmp_path / "x.pth.tar", average, "state_dict_ema")
        assert_read(tmp_path / "x.pth.tar", {"w": average["a.bias"]}, "extra.ema")
        message = refusal(tmp_path / "x.pth.tar", "model")
        assert "'state_dict' and 'state_dict_ema'" in message
        assert "expected 'model'" in message

    def test_tensors_beside_a_mapping_of_tensors_are_not_overlooked(self, tmp_path: Path) -> None:
        torch.save({"w": torch.ones(2), "inner": {"v": torch.ones(3)}}, tmp_path / "x.pt")
        assert "2 entries by themselves, 'inner' (1 entries)" in refusal(tmp_path / "x.pt")

    @pytest.mark.parametrize("nested", [[torch.ones(1)], (torch.ones(1), 2), Trainer()])
    def test_tensors_inside_of_an_entry_are_not_lost(self, tmp_path: Path, nested: Any) -> None:
        torch.save({"w": torch.ones(2), "odd": nested}, tmp_path / "x.pt")
        assert "'odd': expected a tensor" in refusal(tmp_path / "x.pt")


class TestBesideTheWeights:
    @pytest.mark.parametrize("zipped", [True, False], ids=["zip", "legacy"])
    @pytest.mark.parametrize(
        "beside",
        [
            np.float64(0.5),
            np.arange(4),
            np.dtype("float32"),
            argparse.Namespace(lr=0.1, path=Path("x"), device=torch.device("cpu")),
            EasyDict(a=1, b=[2]),
            defaultdict(list, {"loss": [1.0]}),
            Names(["a", "b"]),
            Recipe(),
            Counter("aab"),
            {1, 2},
            io.BytesIO(b"state"),
            None,
            "text",
            [EasyDict(c=Names(["d"])), defaultdict(Recipe)],
        ],
        ids=lambda value: type(value).__name__,
    )
    def test_settings_of_any_class_do_not_keep_weights_from_being_read(
        self, tmp_path: Path, beside: Any, zipped: bool
    ) -> None:
        weights = network().state_dict()
        for content in ({"model": weights, "x": beside}, {**weights, "x": beside}):
            torch.save(content, tmp_path / "x.pt", _use_new_zipfile_serialization=zipped)
            assert_read(tmp_path / "x.pt", weights)
            assert_no_placeholder_is_left()

    def test_what_lies_among_the_tensors_is_named(self, tmp_path: Path) -> None:
        content = {"w": torch.ones(2), "a._extra_state": io.BytesIO(b"1"), "epoch": 3}
        torch.save(content, tmp_path / "x.pt")
        examined = examine_checkpoint(tmp_path / "x.pt", AS_STORED)
        assert list(examined.state_dict) == ["w"]
        assert examined.left_out == ["a._extra_state", "epoch"]

    def test_extra_state_that_is_a_tensor_stays(self, tmp_path: Path) -> None:
        weights = {"w": torch.ones(2), "w._extra_state": torch.tensor([1, 2], dtype=torch.uint8)}
        torch.save(weights, tmp_path / "x.pt")
        assert_read(tmp_path / "x.pt", weights)

    @pytest.mark.parametrize(
        "content", [Trainer(), {"model": network(), "epoch": 3}, {"a": {"b": Trainer()}}]
    )
    def test_weights_in_objects_are_refused_by_their_class(self, tmp_path: Path, content: Any) -> None:
        torch.save(content, tmp_path / "x.pt")
        message = refusal(tmp_path / "x.pt")
        name = (
            f"{Trainer.__module__}.Trainer" if "model" not in str(content) else "torch.nn.modules.container.S"
        )
        if isinstance(content, dict) and "a" in content:
            assert "no tensors by their names" in message
        else:
            assert name in message
            assert "never executes a pickle" in message

    def test_attributes_that_a_file_sets_change_nothing(self, tmp_path: Path) -> None:
        parameter = Call(
            torch._utils._rebuild_parameter_with_state,
            torch.ones(3), True, OrderedDict(), {"detach": 3, "dim": 4, "is_floating_point": 5, "numel": 6},
        )  # fmt: skip
        mapping = Shadowed(
            {"w": torch.ones(2), "v": parameter}, {"items": 3, "values": 4, "keys": 5, "get": 6}
        )
        torch.save(mapping, tmp_path / "x.pt")
        found = read_checkpoint(tmp_path / "x.pt")
        assert list(found) == ["w", "v"]
        assert all(type(tensor) is Tensor and not tensor.requires_grad for tensor in found.values())


class TestOtherContent:
    @pytest.mark.parametrize(
        ("content", "words"),
        [
            (optimiser_state, "an optimiser's state"),
            (lambda: {"epoch": 3, "optimizer": optimiser_state(0)}, "an optimiser's state"),
            (
                lambda: torch.optim.lr_scheduler.StepLR(torch.optim.SGD([torch.ones(1)]), 3).state_dict(),
                "sch",
            ),
            (lambda: torch.amp.GradScaler("cpu").state_dict(), "gradient scaler"),
            (torch.get_rng_state, "random number"),
            (lambda: {"python": 1, "numpy": np.random.get_state(), "cpu": torch.get_rng_state()}, "random"),
            (lambda: argparse.Namespace(lr=0.1), "settings of training (argparse.Namespace)"),
        ],
    )
    def test_what_training_keeps_is_recognised(self, tmp_path: Path, content: Any, words: str) -> None:
        torch.save(content(), tmp_path / "x.pt")
        with pytest.raises(OtherContentError) as caught:
            read_checkpoint(tmp_path / "x.pt")
        assert words in str(caught.value)

    def test_training_arguments_of_transformers_are_recognised(self, tmp_path: Path) -> None:
        transformers = pytest.importorskip("transformers")
        torch.save(
            transformers.TrainingArguments(str(tmp_path), use_cpu=True), tmp_path / "training_args.bin"
        )
        with pytest.raises(
            OtherContentError, match=r"settings of training \(transformers\..*TrainingArguments"
        ):
            read_checkpoint(tmp_path / "training_args.bin")


class TestRefusedByName:
    def test_weights_that_torchao_quantised(self, tmp_path: Path) -> None:
        quantization = pytest.importorskip("torchao.quantization")
        model = nn.Sequential(nn.Linear(64, 64))
        quantization.quantize_(model, quantization.Int8WeightOnlyConfig())
        torch.save(model.state_dict(), tmp_path / "x.pt")
        message = refusal(tmp_path / "x.pt")
        assert "torchao" in message
        assert "dequantise" in message
        # The same in a process that has not imported torchao, and does not know its classes.
        code = (
            "import sys; from pathlib import Path; from rpg.collection.checkpoint import read_checkpoint\n"
            f"from rpg.errors import RPGError\ntry: read_checkpoint(Path({str(tmp_path / 'x.pt')!r}))\n"
            "except RPGError as error: print(error, 'torchao' in sys.modules)"
        )
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
        assert "quantised by torchao" in done.stdout
        assert done.stdout.endswith("False\n")

    @pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::UserWarning")
    def test_tensors_that_pytorch_quantised(self, tmp_path: Path) -> None:
        quantised = torch.quantize_per_tensor(torch.randn(3), 0.1, 0, torch.qint8)
        torch.save({"a": quantised}, tmp_path / "x.pt")
        assert "'a': expected a dense tensor, found a quantized one" in refusal(tmp_path / "x.pt")

    @pytest.mark.parametrize("imported", [True, False])
    def test_sharded_tensors(self, tmp_path: Path, imported: bool) -> None:
        code = (
            "import sys, torch, torch.distributed as dist\n"
            "from torch.distributed.tensor import distribute_tensor, Shard, init_device_mesh\n"
            "dist.init_process_group('gloo', store=dist.HashStore(), rank=0, world_size=1)\n"
            "mesh = init_device_mesh('cpu', (1,))\n"
            "torch.save({'w': distribute_tensor(torch.ones(4, 2), mesh, [Shard(0)])}, sys.argv[1])\n"
        )
        subprocess.run([sys.executable, "-c", code, str(tmp_path / "x.pt")], check=True, capture_output=True)
        if imported:
            import torch.distributed.tensor  # noqa: F401
        assert "holds sharded tensors (torch.distributed.tensor.DTensor)" in refusal(tmp_path / "x.pt")

    def test_compressed_archives(self, tmp_path: Path) -> None:
        torch.save({"w": torch.ones(1000)}, tmp_path / "x.pt")
        with (
            zipfile.ZipFile(tmp_path / "x.pt") as old,
            zipfile.ZipFile(tmp_path / "y.pt", "w", zipfile.ZIP_DEFLATED) as new,
        ):
            for name in old.namelist():
                new.writestr(name, old.read(name))
        assert "is compressed; expected a file as torch.save writes it" in refusal(tmp_path / "y.pt")


INFLATING = {
    # The names of functions, and what they are called with: tuples of an opcode's bytes.
    "a bytearray of a number": b"cbuiltins\nbytearray\n" + pickle.dumps(10**9, 2)[2:-1] + b"\x85R",
    "a tensor of a number": b"ctorch\nTensor\n" + pickle.dumps(3 * 10**8, 2)[2:-1] + b"\x85R",
    "hexadecimal digits of hexadecimal digits": (
        b"c_codecs\nencode\n" * 30
        + b"X\x01\x00\x00\x00aX\x06\x00\x00\x00latin1\x86R"
        + b"X\x03\x00\x00\x00hex\x86R" * 29
    ),
}
READ = """
import resource, sys
from pathlib import Path
from rpg.collection.checkpoint import check_finite, read_checkpoint
from rpg.errors import RPGError

before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
try:
    check_finite(read_checkpoint(Path(sys.argv[1])), Path(sys.argv[1]))
    print("read", end=" ")
except RPGError as error:
    assert "\\n" not in str(error)
    print("refused", end=" ")
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
"""


@pytest.mark.parametrize("value", INFLATING)
@pytest.mark.parametrize("suffix", [".pt", ".safetensors"])
def test_a_small_file_makes_no_large_memory(tmp_path: Path, value: str, suffix: str) -> None:
    """What PyTorch's own reader makes of these is up to a million times as large as the file."""
    content = b"\x80\x02}(X\x01\x00\x00\x00w" + INFLATING[value] + b"u."
    path = tmp_path / f"x{suffix}"
    torch.save({"w": torch.ones(4)}, tmp_path / "small.pt")
    with zipfile.ZipFile(tmp_path / "small.pt") as old, zipfile.ZipFile(path, "w") as new:
        for name in old.namelist():
            new.writestr(name, content if name.endswith("/data.pkl") else old.read(name))
    result = subprocess.run(
        [sys.executable, "-c", READ, str(path)], capture_output=True, text=True, timeout=120, check=True
    )
    said, kilobytes = result.stdout.split()
    assert (said, int(kilobytes) < 100_000) == ("refused", True), result.stdout


def test_storages_that_lie_over_each_other_take_no_more_memory(tmp_path: Path) -> None:
    """A thousand entries of an archive that all stand for the same bytes."""
    torch.save({f"w{i}": torch.full((1000,), float(i)) for i in range(1000)}, tmp_path / "x.pt")
    with (
        zipfile.ZipFile(tmp_path / "x.pt") as old,
        zipfile.ZipFile(tmp_path / "y.pt", "w", zipfile.ZIP_STORED) as new,
    ):
        one = None
        for info in old.infolist():
            if "/data/" in info.filename and not info.filename.endswith("/0"):
                assert one is not None
                other = copy.copy(one)
                other.filename = other.orig_filename = info.filename
                new.filelist.append(other)
                new.NameToInfo[info.filename] = other
            else:
                new.writestr(info.filename, old.read(info.filename))
                one = new.getinfo(info.filename) if info.filename.endswith("/data/0") else one
    assert (tmp_path / "y.pt").stat().st_size < 400_000
    read = read_checkpoint(tmp_path / "y.pt")
    assert len(read) == 1000 and len({tensor.data_ptr() for tensor in read.values()}) == 1, "tied, in 4 kB"


def test_bytes_that_lie_beside_weights_are_read_as_before(tmp_path: Path) -> None:
    torch.save({"w": torch.ones(4), "b": bytearray(b"\xff\0"), "c": b"\xff"}, tmp_path / "x.pt")
    assert list(read_checkpoint(tmp_path / "x.pt")) == ["w"]


def mark(path: str) -> dict[str, Any]:
    Path(path).touch()
    return {}


class TestNothingIsExecuted:
    @pytest.mark.parametrize(
        "function",
        [
            lambda harm: Call(os.system, f"touch {harm}"),
            lambda harm: Call(eval, f"open({str(harm)!r}, 'w')"),
            lambda harm: Call(exec, f"open({str(harm)!r}, 'w')"),
            lambda harm: Call(open, str(harm), "w"),
            lambda harm: Call(subprocess.Popen, ["touch", str(harm)]),
            lambda harm: Call(mark, str(harm)),
            lambda harm: Call(getattr, Call(__import__, "os"), "mkdir"),
            lambda harm: Call(map, mark, [str(harm)]),
            lambda harm: defaultdict(Call(mark, str(harm))),  # type: ignore[arg-type]
            lambda harm: {Call(mark, str(harm)): 1},
        ],
        ids=["system", "eval", "exec", "open", "Popen", "own", "getattr", "map", "factory", "key"],
    )
    @pytest.mark.parametrize("zipped", [True, False], ids=["zip", "legacy"])
    def test_calls_in_a_file_are_not_made(self, tmp_path: Path, function: Any, zipped: bool) -> None:
        harm = tmp_path / "harm"
        try:
            evil = function(harm)
        except TypeError:
            evil = {"factory": Call(mark, str(harm))}
        weights = {"w": torch.ones(2)}
        for content in (evil, {"model": weights, "x": evil}, {**weights, "x": evil}, {"w": evil}):
            try:
                torch.save(content, tmp_path / "x.pt", _use_new_zipfile_serialization=zipped)
                found = read_checkpoint(tmp_path / "x.pt")
                assert list(found) == ["w"]
                assert torch.equal(found["w"], weights["w"])
            except RPGError as error:
                assert "\n" not in str(error)
        assert not harm.exists()
        assert_no_placeholder_is_left()

    @settings(max_examples=300, deadline=None)
    @given(data=st.data())
    def test_no_stream_of_operations_calls_anything(self, data: st.DataObject, tmp_path_factory: Any) -> None:
        """Any program of the pickle machine: loads of globals, calls, builds, memo, items, in any order."""
        harm = tmp_path_factory.getbasetemp() / "harm"
        harm.unlink(missing_ok=True)
        names = [
            ("os", "system"), ("posix", "system"), ("builtins", "eval"), ("builtins", "exec"),
            ("builtins", "getattr"), ("builtins", "setattr"), ("builtins", "dict"), ("builtins", "type"),
            (__name__, "mark"), ("subprocess", "Popen"), ("functools", "partial"), ("operator", "attrgetter"),
            ("collections", "OrderedDict"), ("collections", "Counter"), ("collections", "defaultdict"),
            ("torch._utils", "_rebuild_tensor_v2"), ("torch._tensor", "_rebuild_from_type_v2"),
            ("torch._utils", "_rebuild_parameter_with_state"), ("torch", "FloatStorage"),
            ("torch.nn.parameter", "Parameter"), ("torch", "load"), ("torch", "Tensor"),
            ("copyreg", "_reconstructor"),
        ]  # fmt: skip
        texts = [
            str(harm),
            f"touch {harm}",
            f"open({str(harm)!r}, 'w')",
            "w",
            "__class__",
            "items",
            "__dict__",
        ]
        operation = st.one_of(
            st.sampled_from(names).map(lambda name: f"c{name[0]}\n{name[1]}\n".encode()),
            st.sampled_from(texts).map(lambda t: b"X" + len(t).to_bytes(4, "little") + t.encode()),
            st.sampled_from(
                [b"R", b"\x81", b"b", b"(", b"t", b"\x85", b"\x86", b"\x87", b")", b"}", b"]", b"s", b"u",
                 b"a", b"e", b"N", b"\x88", b"K\x01", b"q\x00", b"h\x00", b"q\x01", b"h\x01", b"Q", b"\x8f"]
            ),
        )  # fmt: skip
        calls = st.tuples(
            st.sampled_from(names).map(lambda name: f"c{name[0]}\n{name[1]}\n".encode()),
            st.sampled_from(texts).map(lambda t: b"X" + len(t).to_bytes(4, "little") + t.encode()),
        ).map(lambda pair: pair[0] + pair[1] + b"\x85R")
        program = b"".join(data.draw(st.lists(st.one_of(operation, calls), min_size=1, max_size=14)))
        path = tmp_path_factory.getbasetemp() / "program.pt"
        with zipfile.ZipFile(path, "w") as archive:
            archive.writestr("x/data.pkl", b"\x80\x02" + program + b".")
            archive.writestr("x/byteorder", b"little")
            archive.writestr("x/version", b"3\n")
            archive.writestr("x/data/0", b"\0" * 16)
        try:
            read_torch_file(path, None)
        except RPGError as error:
            assert "\n" not in str(error)
        assert not harm.exists()
        assert_no_placeholder_is_left()

    def test_the_operations_would_call(self, tmp_path: Path) -> None:
        harm = str(tmp_path / "harm").encode()
        program = b"\x80\x02c" + __name__.encode() + b"\nmark\nX" + len(harm).to_bytes(4, "little") + harm
        pickletools.dis(program + b"\x85R.", out=io.StringIO())
        sys.modules.setdefault(__name__, sys.modules[mark.__module__])
        pickle.loads(program + b"\x85R.")
        assert (tmp_path / "harm").exists()

    def test_mappings_that_hold_themselves_end(self, tmp_path: Path) -> None:
        loop: dict[str, Any] = {"n": 1}
        loop["self"] = loop
        tangle: dict[str, Any] = {}
        for _ in range(60):
            tangle = {"a": tangle, "b": tangle, "c": [tangle, tangle]}
        for content in (loop, tangle, {"w": torch.ones(2), "x": [loop, tangle]}):
            torch.save(content, tmp_path / "x.pt")
            try:
                assert list(read_checkpoint(tmp_path / "x.pt")) == ["w"]
            except RPGError as error:
                assert "\n" not in str(error)
