"""The generator: condition, recurrent network and denoiser with their layout; all that is needed to make
a checkpoint (arXiv 2501.11587)."""

import dataclasses
import hashlib
import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from rpg.collection.checkpoint import write_checkpoint
from rpg.collection.layout import Layout
from rpg.config import (
    ConditionKind,
    DenoiserKind,
    GeneratorConfig,
    RecurrentKind,
    generator_config_from_yaml,
    save_config,
    to_plain,
)
from rpg.errors import RPGError
from rpg.generator.condition import NoCondition, PermutationState, VectorCondition, build_condition
from rpg.generator.denoiser import build_denoiser
from rpg.generator.denoiser.adaln_mlp import AdaLNMLP
from rpg.generator.denoiser.unet import ConditionalUNet
from rpg.generator.diffusion import Diffusion
from rpg.generator.model_card import model_card
from rpg.generator.positions import position_embedding
from rpg.generator.recurrent import build_recurrent
from rpg.storage.directories import replacing_directory
from rpg.storage.errors import storage_errors_for
from rpg.storage.files import write_text
from rpg.storage.locations import AnyPath, fetched, location
from rpg.text_encoder import ENCODER_DIRECTORY, TextEncoder, copy_encoder, load_encoder

Condition = VectorCondition | PermutationState | NoCondition
Denoiser = ConditionalUNet | AdaLNMLP

CONFIG_FILE = "config.yaml"
WEIGHTS_FILE = "generator.safetensors"
CARD_FILE = "README.md"
LAYOUT_KEY = "layout"
"""Metadata key of the weights: the layout's digest. Behind a URI the files are not replaced at once."""
CONFIG_KEY = "config"
"""Metadata key of the weights: the configuration but for `sampling`, as JSON; older files have none."""
ENCODER_KEY = "encoder"
"""Metadata key of the weights: the text encoder's digest, where there is one."""

_FLOATS = (torch.float32, torch.float16, torch.bfloat16, torch.float64)
"""What floating-point weights may be stored as."""


class Generator(nn.Module):
    """p(token | its position, condition) for every token of a layout.

    The recurrent network turns position embeddings plus the embedded condition into prototypes; the denoiser
    models each token given its prototype.

    Attributes:
        config: what it is built from.
        layout: of the networks that it makes.
        encoder_directory: where its text encoder's files are; None if they are not at hand, or it has none.
    """

    positions: Tensor

    def __init__(self, config: GeneratorConfig, layout: Layout) -> None:
        super().__init__()
        self.config = config
        self.layout = layout
        self.encoder_directory: AnyPath | None = None
        width = config.recurrent.width
        self.condition, self.recurrent, self.denoiser = _networks(config, layout.token_size)
        self.diffusion = Diffusion(config.diffusion)
        embedding = position_embedding(layout.positions(), width)
        self.register_buffer("positions", embedding, persistent=False)

    @classmethod
    def for_collection(
        cls,
        config: GeneratorConfig,
        layout: Layout,
        conditions: Tensor | None,
        checkpoints: int,
        encoder: str = "",
        states: Tensor | None = None,
    ) -> "Generator":
        """A fresh generator for a sharded collection of `checkpoints` with `conditions` [checkpoints, size].

        `encoder` is the digest of the text encoder that the conditions came from, if any; `states` are the
        checkpoints' permutation states, int64 [checkpoints], if they have them.

        Raises:
            RPGError: if the condition's kind, size, states or encoder does not fit the collection.
        """
        kind, asked = config.condition.kind, config.condition.size
        if kind == ConditionKind.vector and conditions is None:
            raise RPGError(
                "generator.condition.kind: 'vector' needs a collection with conditions; "
                "this one has none: use 'permutation' or 'none'"
            )
        size = 0
        if kind == ConditionKind.permutation:
            size = checkpoints
        elif kind == ConditionKind.vector:
            assert conditions is not None
            size = conditions.shape[1]
        if asked not in (0, size):
            raise RPGError(f"generator.condition.size: the collection has {size}, got {asked}")
        found = _states_found(config.condition.states, states)
        encoder = encoder if kind == ConditionKind.vector else ""
        if config.condition.encoder not in ("", encoder):
            raise RPGError(
                f"generator.condition.encoder: the collection has '{encoder}', "
                f"got '{config.condition.encoder}'"
            )
        condition = dataclasses.replace(config.condition, size=size, encoder=encoder, states=found)
        config = dataclasses.replace(config, condition=condition)
        generator = cls(config, layout)
        if isinstance(generator.condition, VectorCondition):
            assert conditions is not None
            generator.condition.fit(conditions)
        return generator

    def prototypes(
        self, condition: Tensor, dropped: Tensor | None = None, indices: Tensor | None = None
    ) -> Tensor:
        """Prototypes for B conditions (see `rpg.generator.condition`).

        Args:
            condition: B rows.
            dropped: bool [B], conditions to leave out.
            indices: int64 [B, K], tokens whose prototypes are wanted; None: all.

        Returns:
            [B, K or tokens, width].
        """
        embedded = self.condition(condition, dropped)
        prototypes: Tensor
        prototypes, _ = self.recurrent(self.positions + embedded[:, None], keep_state=False, at=indices)
        return prototypes

    def loss(
        self,
        tokens: Tensor,
        mask: Tensor,
        indices: Tensor,
        condition: Tensor,
        t: Tensor,
        noise: Tensor,
        dropped: Tensor | None = None,
    ) -> Tensor:
        """Mean squared error of the prediction over real values, one value for each checkpoint, [B].

        Args:
            tokens: sampled tokens [B, K, token_size].
            mask: bool, like `tokens`: true at real values, false at padding.
            indices: int64 [B, K], which tokens of the layout they are.
            condition: one a checkpoint, B rows.
            t: int64 timesteps [B].
            noise: like `tokens`.
            dropped: bool [B], conditions to leave out.
        """
        prototypes = self.prototypes(condition, dropped, indices).flatten(0, 1)
        each = t[:, None].expand(indices.shape)
        noised = self.diffusion.diffuse(tokens, noise, each)
        target = self.diffusion.target(tokens, noise, each)
        prediction: Tensor = self.denoiser(noised.flatten(0, 1), t, prototypes).view_as(target)
        error = ((prediction.float() - target) ** 2) * mask
        return error.sum((1, 2)) / mask.sum((1, 2)).clamp(min=1)

    def digest(self) -> str:
        """SHA-256 of everything that determines what is generated: weights, layout, architecture, encoder."""
        hashed = hashlib.sha256()
        hashed.update(_architecture(self.config).encode())
        hashed.update(self.layout.digest().encode())
        for name, tensor in sorted(self.state_dict().items()):
            hashed.update(name.encode())
            hashed.update(tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().tobytes())
        return hashed.hexdigest()

    def text_encoder(self) -> TextEncoder:
        """Load the encoder that turns a description into a condition.

        Raises:
            RPGError: if the generator has none; naming the file that is missing, damaged or does not fit it.
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
        """The model card, with a report's Markdown table where there is one."""
        parameters = sum(parameter.numel() for parameter in self.parameters())
        layout = self.layout
        return model_card(
            self.config, len(layout.specs), layout.tokens, layout.token_size, parameters, accuracy_table
        )

    def save_pretrained(self, directory: AnyPath | str) -> None:
        """Write config.yaml, generator.safetensors, the layout with its centre, a model card, and the text
        encoder if its files are at hand.

        An earlier generator in a local `directory` is replaced as a whole or not at all; behind a URI its
        files are replaced one by one, the weights last.
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
            weights = {name: tensor.detach().cpu().contiguous() for name, tensor in self.state_dict().items()}
            metadata = {
                "format": "pt", LAYOUT_KEY: self.layout.digest(), CONFIG_KEY: _architecture(self.config),
            }  # fmt: skip
            if self.config.condition.encoder:
                metadata[ENCODER_KEY] = self.config.condition.encoder
            write_checkpoint(temporary / WEIGHTS_FILE, weights, metadata)

    @classmethod
    def from_pretrained(cls, directory: AnyPath | str) -> "Generator":
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
    def _load(cls, directory: Path) -> "Generator":
        if not directory.is_dir():
            raise RPGError(f"{directory}: not found; expected a generator's directory")
        config = generator_config_from_yaml(directory / CONFIG_FILE)
        layout = Layout.load(directory)
        path = directory / WEIGHTS_FILE
        if not path.is_file():
            raise RPGError(f"{path}: not found; expected the generator's weights")
        try:
            with safe_open(path, framework="pt") as file:
                metadata = file.metadata() or {}
                weights = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        except (SafetensorError, OSError) as error:
            raise RPGError(f"{path}: not a readable safetensors file: {error}") from error
        if metadata.get(LAYOUT_KEY, layout.digest()) != layout.digest():
            raise RPGError(f"{path}: was saved with another layout than the one beside it")
        if metadata.get(ENCODER_KEY, "") != config.condition.encoder:
            raise RPGError(f"{path}: was saved with another text encoder than {CONFIG_FILE} names")
        with _building(directory / CONFIG_FILE):
            expected = _expected(config, layout.token_size, len(weights))
        _check_weights(path, expected, weights)
        # After the shapes, which say more exactly what does not fit.
        if not _holds(metadata.get(CONFIG_KEY, "{}"), config):
            raise RPGError(f"{path}: was saved with another configuration than the {CONFIG_FILE} beside it")
        with _building(directory / CONFIG_FILE):
            generator = cls(config, layout)
        generator.load_state_dict(weights)
        return generator.eval()


def _states_found(asked: int, states: Tensor | None) -> int:
    """How many permutation states a generator has that asks for so many, of a collection with `states`."""
    if asked == 0:
        return 0
    if states is None:
        raise RPGError(
            "generator.condition.states: the collection's checkpoints have none; expected 0, or a collection "
            "that is registered with them"
        )
    found = len(states.unique())
    if asked not in (-1, found):
        raise RPGError(f"generator.condition.states: the collection has {found}, got {asked}")
    return found


def _architecture(config: GeneratorConfig) -> str:
    """All of a configuration that says what weights mean; how to sample may be changed later."""
    architecture = to_plain(config)
    del architecture["sampling"]
    # Digests of generators without these are what they were before there were any.
    for key in ("encoder", "states"):
        if not getattr(config.condition, key):
            del architecture["condition"][key]
    return json.dumps(architecture, sort_keys=True)


def _holds(saved: str, config: GeneratorConfig) -> bool:
    """Whether a configuration is the one that `_architecture` wrote; later versions may know more keys."""

    def holds(saved: Any, found: Any) -> bool:
        if isinstance(saved, dict) and isinstance(found, dict):
            return all(key in found and holds(value, found[key]) for key, value in saved.items())
        return bool(saved == found)

    try:
        return holds(json.loads(saved), to_plain(config))
    except ValueError:
        return False


def _networks(config: GeneratorConfig, token_size: int) -> tuple[Condition, nn.Module, Denoiser]:
    width = config.recurrent.width
    return (
        build_condition(config.condition, width),
        build_recurrent(config.recurrent),
        build_denoiser(config.denoiser, token_size, width),
    )


def _expected(config: GeneratorConfig, token_size: int, tensors: int) -> dict[str, Tensor]:
    """What a file of that many `tensors` has to hold, without any memory for it or much time.

    Raises:
        RPGError: naming the key, if that cannot be so few.
    """
    # Others have no use for their depth.
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
    with torch.device("meta"):
        networks = zip(("condition", "recurrent", "denoiser"), _networks(config, token_size), strict=True)
        return {
            f"{part}.{name}": tensor
            for part, network in networks
            for name, tensor in network.state_dict().items()
        }


@contextmanager
def _building(path: Path) -> Iterator[None]:
    """Name the configuration in errors about what is built from it."""
    try:
        yield
    except RPGError as error:
        raise RPGError(f"{path}: {error}") from error
    except (RuntimeError, MemoryError, OverflowError, TypeError) as error:
        # PyTorch refuses sizes beyond its integers and the memory with any of these.
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
