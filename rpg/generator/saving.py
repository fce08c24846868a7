"""Saving and loading a generator: its files, its model card, its digest and its text encoder."""

import hashlib
import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Self

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from rpg.collection.checkpoint import write_checkpoint
from rpg.collection.layout import Layout
from rpg.config import (
    ConditionKind,
    DenoiserKind,
    GeneratorConfig,
    Positions,
    RecurrentKind,
    TokenDtype,
    generator_config_from_yaml,
    save_config,
    to_plain,
)
from rpg.encoders import Encoder, load_encoder
from rpg.errors import RPGError
from rpg.generator.networks import build_networks
from rpg.storage.below import check_ordinary_below, path_below
from rpg.storage.directories import replacing_directory
from rpg.storage.errors import storage_errors_for
from rpg.storage.files import write_text
from rpg.storage.locations import AnyPath, fetched, location
from rpg.text_encoder import ENCODER_DIRECTORY, copy_encoder

CONFIG_FILE = "config.yaml"
WEIGHTS_FILE = "generator.safetensors"
CARD_FILE = "README.md"
LAYOUT_KEY = "layout"
"""Metadata key of the weights: the layout's digest, since files behind a URI are replaced one by one."""
CONFIG_KEY = "config"
"""Metadata key of the weights: the configuration as `_architecture` writes it. Older files have none."""
ENCODER_KEY = "encoder"
"""Metadata key of the weights: the text encoder's digest, if there is an encoder."""

_CARD = """# Generator of neural networks

Makes checkpoints of one architecture: {tensors} tensors, cut into {tokens} tokens of {token_size} values.
{form}It takes {asks}. {parameters:,} parameters: {config.recurrent.kind} recurrence,
{config.denoiser.kind} denoiser, {config.diffusion.prediction} prediction. Method: Recurrent Diffusion,
arXiv 2501.11587.

```python
from pathlib import Path

from rpg.generator.generator import Generator
from rpg.sampling.generate import generate_models

generator = Generator.from_pretrained("PATH/TO/THIS/DIRECTORY")
sampling = generator.config.sampling
conditions = {argument}
files = generate_models(generator, conditions, number=5, seed=0, out=Path("generated"), sampling=sampling)
```
{accuracy}"""
_LATER_KEYS = {
    "condition": ("encoder", "states", "form", "last_tokens"),
    "recurrent": ("output_width", "positions"),
}
"""What `config.yaml` has not always had, by section."""
_FLOATS = (torch.float32, torch.float16, torch.bfloat16, torch.float64)
"""What floating-point weights may be stored as."""


class PretrainedMixin(nn.Module):
    """Saves a generator to a directory or URI and loads it, in the manner of Hugging Face's hub mixin."""

    config: GeneratorConfig
    layout: Layout
    encoder_directory: AnyPath | None

    def digest(self) -> str:
        """SHA-256 of everything that determines what is generated: weights, layout, architecture, encoder."""
        hashed = hashlib.sha256()
        hashed.update(_architecture(self.config).encode())
        hashed.update(self.layout.digest().encode())
        for name, tensor in sorted(self.state_dict().items()):
            hashed.update(name.encode())
            hashed.update(tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().tobytes())
        return hashed.hexdigest()

    def text_encoder(self) -> Encoder:
        """Load the encoder that turns a description into a condition.

        Raises:
            RPGError: if the generator has no encoder; naming the file that is missing, damaged or does not
                fit the generator.
        """
        config = self.config.condition
        if config.kind != ConditionKind.vector:
            raise RPGError(f"description: this generator takes none (its kind is '{config.kind}')")
        if not config.encoder:
            raise RPGError("description: this generator has no text encoder; expected a condition")
        if self.encoder_directory is None:
            raise RPGError("description: the text encoder is not at hand; expected a saved generator")
        encoder = load_encoder(self.encoder_directory, config.encoder)
        if encoder.size != config.size:
            raise RPGError(
                f"{self.encoder_directory}: expected embeddings of {config.size} values, as the generator's "
                f"condition.size says, got {encoder.size}"
            )
        return encoder

    def card(self, accuracy_table: str = "") -> str:
        """The model card (README.md) in Markdown: what the generator makes, and how to use it.

        `accuracy_table` is a report's table of accuracies in Markdown; empty if there is none.
        """
        condition, layout = self.config.condition, self.layout
        asks = {
            ConditionKind.vector: f"a condition of {condition.size} values"
            + (", the embedding of a description" if condition.encoder else "")
            + (f" ({condition.states} permutation states, by seed)" if condition.states else ""),
            ConditionKind.permutation: f"no condition ({condition.size} permutation states, by seed)",
            ConditionKind.none: "no condition",
        }[condition.kind]
        argument = f"[[0.0] * {condition.size}]" if condition.kind == ConditionKind.vector else "None"
        if condition.encoder:
            argument = '[generator.text_encoder().encode("DESCRIPTION")]'
        beside = ", ".join(layout.companions.files)
        form = (
            f"Each is a directory with {layout.companions.weights_name} beside {beside}.\n" if beside else ""
        )
        return _CARD.format(
            form=form,
            tensors=len(layout.specs),
            tokens=layout.tokens,
            token_size=layout.token_size,
            asks=asks,
            parameters=sum(parameter.numel() for parameter in self.parameters()),
            config=self.config,
            argument=argument,
            accuracy=f"\n## Accuracy\n\n{accuracy_table}" if accuracy_table else "",
        )

    def save_pretrained(self, directory: AnyPath | str) -> None:
        """Write config.yaml, generator.safetensors, the layout with its centre and companions, a model card,
        and the text encoder if there is one.

        An earlier generator in a local `directory` is replaced as a whole or not at all; behind a URI its
        files are replaced one by one, the weights last.

        Raises:
            RPGError: naming `directory`, if it holds something other than a generator or cannot be written.
        """
        directory = location(directory) if isinstance(directory, str) else directory
        with storage_errors_for(directory):
            foreign = (
                directory.is_dir() and any(directory.iterdir()) and not (directory / WEIGHTS_FILE).is_file()
            )
        if foreign:
            raise RPGError(
                f"{directory}: holds other files, which saving would replace; "
                "expected a new directory or a generator's"
            )
        with replacing_directory(directory) as temporary:
            save_config(self.config, temporary / CONFIG_FILE)
            self.layout.save(temporary)
            write_text(temporary / CARD_FILE, self.card())
            if self.encoder_directory is not None:
                copy_encoder(self.encoder_directory, temporary / ENCODER_DIRECTORY)
            weights = _stored(self.state_dict(), self.config.dtype, directory)
            metadata = {
                "format": "pt", LAYOUT_KEY: self.layout.digest(), CONFIG_KEY: _architecture(self.config),
            }  # fmt: skip
            if self.config.condition.encoder:
                metadata[ENCODER_KEY] = self.config.condition.encoder
            write_checkpoint(temporary / WEIGHTS_FILE, weights, metadata)

    @classmethod
    def from_pretrained(cls, directory: AnyPath | str) -> Self:
        """Load a saved generator from a directory or URI, in evaluation mode, on the CPU.

        Raises:
            RPGError: naming the file that is missing, damaged or does not fit the others.
        """
        directory = location(directory) if isinstance(directory, str) else directory
        with fetched(directory) as local:
            generator = cls._load(local)
        if generator.config.condition.encoder:
            generator.encoder_directory = directory / ENCODER_DIRECTORY
        return generator

    @classmethod
    def _load(cls, directory: Path) -> Self:
        if not directory.is_dir():
            raise RPGError(f"{directory}: not found; expected a generator's directory")
        config = generator_config_from_yaml(directory / CONFIG_FILE)
        layout = Layout.load(directory)
        if config.condition.encoder:
            check_ordinary_below(directory, ENCODER_DIRECTORY)
        path = directory / WEIGHTS_FILE
        try:
            with path_below(directory, WEIGHTS_FILE) as local, safe_open(local, framework="pt") as file:
                metadata = file.metadata() or {}
                weights = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        except FileNotFoundError as error:
            raise RPGError(f"{path}: not found; expected the generator's weights") from error
        except (SafetensorError, OSError) as error:
            raise RPGError(f"{path}: not a readable safetensors file: {error}") from error
        if metadata.get(LAYOUT_KEY, layout.digest()) != layout.digest():
            raise RPGError(f"{path}: was saved with another layout than the one beside it")
        if metadata.get(ENCODER_KEY, "") != config.condition.encoder:
            raise RPGError(f"{path}: was saved with another text encoder than {CONFIG_FILE} names")
        with _building(directory / CONFIG_FILE):
            expected = _expected(config, layout, len(weights))
        _check_weights(path, expected, weights)
        # Checked after the shapes, because an error about a shape says more exactly what does not fit.
        if not _holds(metadata.get(CONFIG_KEY, "{}"), config):
            raise RPGError(f"{path}: was saved with another configuration than the {CONFIG_FILE} beside it")
        with _building(directory / CONFIG_FILE):
            generator = cls(config, layout)
        generator.load_state_dict(weights)
        return generator.eval()


def _architecture(config: GeneratorConfig) -> str:
    """The configuration without `sampling` and `dtype`, which do not change what the weights mean, as sorted
    JSON."""
    architecture = to_plain(config)
    for key in ("sampling", "dtype"):
        del architecture[key]
    # Older versions did not know these keys: without them, digests stay what they were.
    defaults = to_plain(GeneratorConfig())
    for part, keys in _LATER_KEYS.items():
        for key in keys:
            if architecture[part][key] == defaults[part][key]:
                del architecture[part][key]
    return json.dumps(architecture, sort_keys=True)


def _stored(weights: dict[str, Tensor], dtype: TokenDtype, directory: AnyPath) -> dict[str, Tensor]:
    """Weights as the file holds them: on the CPU, floating-point ones in `dtype`.

    Raises:
        RPGError: naming the tensor whose values are beyond the dtype's.
    """
    stored = {}
    for name, tensor in weights.items():
        whole = tensor.detach().cpu().contiguous()
        stored[name] = whole.to(getattr(torch, dtype)) if whole.is_floating_point() else whole
        if whole.isfinite().all() and not stored[name].isfinite().all():
            raise RPGError(f"{directory}: tensor '{name}' has values that are too large for {dtype}")
    return stored


def _holds(saved: str, config: GeneratorConfig) -> bool:
    """Whether a configuration is the one that `_architecture` wrote; it may have keys of later versions."""

    def holds(saved: Any, found: Any) -> bool:
        if isinstance(saved, dict) and isinstance(found, dict):
            return all(key in found and holds(value, found[key]) for key, value in saved.items())
        return bool(saved == found)

    try:
        return holds(json.loads(saved), to_plain(config))
    except ValueError:
        return False


def _expected(config: GeneratorConfig, layout: Layout, tensors: int) -> dict[str, Tensor]:
    """The tensors, on the meta device, that weights for a configuration consist of, by name.

    A configuration that somebody else wrote may ask for sizes beyond all memory, so nothing is allocated.

    Args:
        config: the configuration beside the weights.
        layout: beside the weights.
        tensors: how many tensors the file of weights holds.

    Raises:
        RPGError: naming the key, if a network of that depth has more tensors.
    """
    # Other kinds do not use their depth.
    has_depth = {
        "recurrent": config.recurrent.kind != RecurrentKind.none,
        "denoiser": config.denoiser.kind == DenoiserKind.adaln_mlp,
    }
    for part, depth in {"recurrent": config.recurrent.depth, "denoiser": config.denoiser.depth}.items():
        if has_depth[part] and depth > tensors:
            raise RPGError(
                f"{part}.depth: expected no more layers than {WEIGHTS_FILE} has tensors, {tensors}, "
                f"got {depth}"
            )
    with torch.device("meta"), _NoValues():
        networks = build_networks(config, layout.token_size, layout.tokens)
        positions = torch.empty(layout.tokens, config.recurrent.width)
    expected = {
        f"{part}.{name}": tensor
        for part, network in networks._asdict().items()
        for name, tensor in network.state_dict().items()
    }
    return expected | ({"positions": positions} if config.recurrent.positions == Positions.learned else {})


_ELEMENTWISE = ("add", "div", "exp", "expm1", "log", "mul", "neg", "rsub", "sub")


class _NoValues(TorchFunctionMode):
    """Passes over what would fill tensors: `nn.init`, and the functions of values in layers' constructors.

    Tensors on the meta device have no values. But these operations import PyTorch's compiler there, which
    takes longer than all the rest of loading a small generator.
    """

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        given = kwargs or {}
        if getattr(func, "__module__", None) == "torch.nn.init":
            return given["tensor"] if "tensor" in given else args[0]
        if func is torch.arange and len(args) == 1 and not given:
            return torch.empty(args[0], dtype=torch.int64)
        if func.__name__ in _ELEMENTWISE:
            tensors = [each for each in args if isinstance(each, Tensor)]
            dtype = torch.result_type(*args) if len(args) == 2 else args[0].dtype
            return torch.empty(np.broadcast_shapes(*(each.shape for each in tensors)), dtype=dtype)
        return func(*args, **given)


@contextmanager
def _building(path: Path) -> Iterator[None]:
    """Name the configuration file `path` in errors about what the block builds from it."""
    try:
        yield
    except RPGError as error:
        raise RPGError(f"{path}: {error}") from error
    except (RuntimeError, MemoryError, OverflowError, TypeError) as error:
        # PyTorch raises any of these for sizes that exceed its integers or the memory.
        raise RPGError(f"{path}: cannot be built: {str(error).splitlines()[0]}") from error


def _check_weights(path: Path, expected: dict[str, Tensor], found: dict[str, Tensor]) -> None:
    for name, tensor in expected.items():
        if name not in found:
            raise RPGError(f"{path}: tensor '{name}' is missing")
        if found[name].shape != tensor.shape:
            raise RPGError(
                f"{path}: tensor '{name}': expected shape {list(tensor.shape)} by config.yaml "
                f"and layout.json, found {list(found[name].shape)}"
            )
        wanted, dtype = tensor.dtype, found[name].dtype
        if dtype not in (_FLOATS if wanted in _FLOATS else (wanted,)):
            raise RPGError(f"{path}: tensor '{name}': expected {wanted}, found {dtype}")
        if not found[name].isfinite().all():
            raise RPGError(f"{path}: tensor '{name}' holds NaN or infinite values")
    extra = sorted(set(found) - set(expected))
    if extra:
        raise RPGError(f"{path}: unexpected tensor '{extra[0]}'")
