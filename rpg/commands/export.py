"""`rpg export`: a model as a PyTorch file, or an adapter merged into its base."""

import argparse
from typing import TYPE_CHECKING

from rpg.commands.arguments import Commands, path_or_uri
from rpg.errors import RPGError

if TYPE_CHECKING:
    from torch import Tensor

    from rpg.storage.locations import AnyPath

_TORCH_SUFFIXES = (".pt", ".pth")
_FILE_SUFFIXES = (*_TORCH_SUFFIXES, ".safetensors")


def add_export_command(commands: Commands) -> None:
    """Add `rpg export` to the command's parsers."""
    parser = commands.add_parser(
        "export",
        help="write a model as a .pt file, or merge an adapter into its base",
        description="Write a model in another form. With --base, a LoRA adapter is merged: the result is the "
        "base's weights with the adapter's in them, which load without PEFT.",
    )
    parser.add_argument("model", help="file or directory of a model, or a URI of one")
    parser.add_argument(
        "out", help=".pt, .pth or .safetensors; with --base also a directory, like the base's"
    )
    parser.add_argument("--base", metavar="DIR", help="file or directory of what the adapter was trained on")
    parser.set_defaults(run=_run)


def _run(options: argparse.Namespace) -> None:
    out, model = path_or_uri(options.out), path_or_uri(options.model)
    is_file = out.suffix.lower() in _FILE_SUFFIXES
    if options.base is None:
        if not is_file:
            raise RPGError(f"{out}: expected a name that ends with {', '.join(_FILE_SUFFIXES)}")
        _export(model, out)
    else:
        _export_merged(model, path_or_uri(options.base), out, is_file)
    print(out)


def _export(model: "AnyPath", out: "AnyPath") -> None:
    from rpg.collection.checkpoint import read_checkpoint, write_checkpoint

    state_dict = read_checkpoint(model)
    if out.suffix.lower() in _TORCH_SUFFIXES:
        _save(state_dict, out)
    else:
        write_checkpoint(out, state_dict, {"format": "pt"})


def _export_merged(model: "AnyPath", base: "AnyPath", out: "AnyPath", is_file: bool) -> None:
    from rpg.adapter_merge import AdapterMerge
    from rpg.collection.checkpoint import read_checkpoint
    from rpg.collection.checkpoint_directory import ADAPTER_CONFIG, MODEL_CONFIG, is_adapter
    from rpg.collection.companions import companions_of
    from rpg.collection.safetensors_file import SafetensorsHeader, write_tensors
    from rpg.sampling.model_directory import ModelDirectory
    from rpg.storage.files import AtomicFile
    from rpg.storage.locations import exists, fetched

    if not is_adapter(model):
        raise RPGError(f"{model}: --base is for adapters; expected a directory with {ADAPTER_CONFIG}")
    companions = companions_of(base)
    if not is_file and not companions:
        raise RPGError(
            f"{base}: has no configuration to lie beside the weights in {out}; expected a directory that "
            f"from_pretrained loads, or an output that ends with {', '.join(_FILE_SUFFIXES)}"
        )
    if not is_file and exists(out):
        raise RPGError(f"{out}: is there already; expected a new directory")
    with fetched(model) as local:
        merged = AdapterMerge(
            read_checkpoint(base),
            read_checkpoint(local),
            local / ADAPTER_CONFIG,
            str(base),
            companions.files.get(MODEL_CONFIG, b"{}"),
        )
        if out.suffix.lower() in _TORCH_SUFFIXES:
            _save(dict(merged), out)
            return
        target = AtomicFile(out) if is_file else ModelDirectory(out, companions)
        try:
            header = SafetensorsHeader.of(merged.tensors, {"format": "pt"})
            write_tensors(target.temporary, header, merged)
            target.commit()
        except OSError as error:
            raise target.failure(error) from error
        finally:
            target.discard()


def _save(state_dict: "dict[str, Tensor]", out: "AnyPath") -> None:
    """Write a file that `torch.load(weights_only=True)` reads; tied tensors stay tied."""
    import torch

    from rpg.storage.files import replacing_file

    def whole(tensor: "Tensor") -> "Tensor":
        # torch.save writes all that a tensor is a part of.
        is_part = tensor.untyped_storage().nbytes() > tensor.numel() * tensor.element_size()
        return tensor.clone() if is_part else tensor

    with replacing_file(out) as temporary:
        torch.save({name: whole(tensor) for name, tensor in state_dict.items()}, temporary)
