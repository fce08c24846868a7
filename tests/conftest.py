"""Small networks, collections and generators, shared by the tests of generator, generation and training."""

import os
import random
import signal
import socket
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from pathlib import Path

import pytest
import torch
from s3fs import S3FileSystem
from torch import Tensor, nn

from rpg.collection.collection import Entry
from rpg.collection.layout import Layout
from rpg.collection.manifest import write_manifest
from rpg.collection.shard_file import write_shard
from rpg.collection.shards import ShardedCollection
from rpg.collection.statistics import LayoutStatistics
from rpg.config import (
    ConditionConfig,
    ConditionKind,
    DenoiserConfig,
    DenoiserKind,
    DiffusionConfig,
    GeneratorConfig,
    Normalisation,
    Prediction,
    RecurrentConfig,
    RecurrentKind,
    SamplingConfig,
    Solver,
    TokenDtype,
)
from rpg.generator.generator import Generator
from rpg.text_encoder import encoder_digest
from tests.s3_server import CREDENTIALS, Proxy, S3Server, s3_server

if not torch.cuda.is_available():
    # Kernels are tested in Triton's interpreter, which must be asked for before Triton is imported anywhere.
    os.environ["TRITON_INTERPRET"] = "1"

StateDict = dict[str, Tensor]


class SmallNet(nn.Module):
    """A convolution, a BatchNorm with its buffers and a linear layer: 146 values; images [N, 1, 4, 4]."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(1, 4, 3, padding=1)
        self.norm = nn.BatchNorm2d(4)
        self.head = nn.Linear(4, 18)

    def forward(self, images: Tensor) -> Tensor:
        logits: Tensor = self.head(self.norm(self.conv(images)).relu().mean((2, 3)))
        return logits


def _checkpoints(template: Mapping[str, Tensor], count: int, seed: int) -> list[StateDict]:
    """The template with noise on its floating-point tensors; variances stay positive."""
    generator = torch.Generator().manual_seed(seed)

    def perturbed(name: str, tensor: Tensor) -> Tensor:
        if not tensor.is_floating_point():
            return tensor
        noise = torch.randn(tensor.shape, generator=generator)
        values = tensor * torch.exp(0.3 * noise) if name.endswith("running_var") else tensor + 0.3 * noise
        return values.to(tensor.dtype)

    return [{name: perturbed(name, tensor) for name, tensor in template.items()} for _ in range(count)]


def _layout(checkpoints: Sequence[StateDict], token_size: int, normalisation: Normalisation) -> Layout:
    statistics = LayoutStatistics(checkpoints[0])
    for state_dict in checkpoints:
        statistics.update(state_dict)
    return statistics.layout(token_size, normalisation)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """What runs in Triton's interpreter comes last: its process cannot compile kernels afterwards."""
    items.sort(key=lambda item: "gpu" in item.path.parts)


@pytest.fixture(scope="session", autouse=True)
def one_thread() -> None:
    """Tensors are small here: threads would only wait for each other."""
    torch.set_num_threads(1)


@pytest.fixture(scope="session", autouse=True)
def interruptible() -> None:
    """Processes that tests start and interrupt: those of a shell's background jobs would not notice."""
    if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(scope="session")
def small_net() -> type[SmallNet]:
    return SmallNet


@pytest.fixture(scope="session")
def make_checkpoints() -> Callable[..., list[StateDict]]:
    """`make_checkpoints(count, template=SmallNet's, seed=0)`."""

    def make(count: int, template: Mapping[str, Tensor] | None = None, seed: int = 0) -> list[StateDict]:
        return _checkpoints(SmallNet().state_dict() if template is None else template, count, seed)

    return make


@pytest.fixture(scope="session")
def make_layout() -> Callable[..., Layout]:
    """`make_layout(token_size=16, template=SmallNet's, normalisation=residual)`."""

    def make(
        token_size: int = 16,
        template: Mapping[str, Tensor] | None = None,
        normalisation: Normalisation = Normalisation.residual,
    ) -> Layout:
        template = SmallNet().state_dict() if template is None else template
        return _layout(_checkpoints(template, 4, seed=0), token_size, normalisation)

    return make


@pytest.fixture(scope="session")
def make_collection() -> Callable[..., ShardedCollection]:
    """`make_collection(directory, count, condition_width, token_size, dtype, states)`: four to a shard."""

    def make(
        directory: Path,
        count: int = 10,
        condition_width: int | None = 3,
        token_size: int = 16,
        dtype: TokenDtype = TokenDtype.float32,
        states: int = 0,
    ) -> ShardedCollection:
        checkpoints = _checkpoints(SmallNet().state_dict(), count, seed=0)
        layout = _layout(checkpoints, token_size, Normalisation.residual)
        named = [(f"{i:04d}.safetensors", checkpoint) for i, checkpoint in enumerate(checkpoints)]
        shards = [
            write_shard(directory / f"{i:05d}.arrow", layout, named[i : i + 4], dtype)
            for i in range(0, count, 4)
        ]
        generator = torch.Generator().manual_seed(1)
        entries = [
            Entry(
                name,
                "",
                None
                if condition_width is None
                else torch.rand(condition_width, generator=generator).tolist(),
                state=i % states if states else None,
            )
            for i, (name, _) in enumerate(named)
        ]
        write_manifest(directory, layout, shards, entries, dtype)
        return ShardedCollection.open(directory)

    return make


@pytest.fixture(scope="session")
def make_generator() -> Callable[..., Generator]:
    """`make_generator(layout, ...)`: small, in evaluation mode, every parameter random (none is zero)."""

    def make(
        layout: Layout,
        recurrent: RecurrentKind = RecurrentKind.mamba2,
        denoiser: DenoiserKind = DenoiserKind.adaln_mlp,
        condition: ConditionKind = ConditionKind.vector,
        dropout: float = 0.0,
        prediction: Prediction | None = None,
        width: int = 32,
        timesteps: int = 1000,
        condition_size: int = 3,
        states: int = 0,
    ) -> Generator:
        if prediction is None:
            prediction = Prediction.x0 if denoiser == DenoiserKind.direct else Prediction.v
        config = GeneratorConfig(
            recurrent=RecurrentConfig(kind=recurrent, width=16, depth=2, state_size=8, head_size=8),
            denoiser=DenoiserConfig(kind=denoiser, width=width, depth=2, channels=[1, 4, 6, 4, 1]),
            condition=ConditionConfig(
                kind=condition,
                size=0 if condition == ConditionKind.none else condition_size,
                states=states,
                width=8,
                dropout=dropout,
            ),
            diffusion=DiffusionConfig(prediction=prediction, timesteps=timesteps),
        )
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            generator = Generator(config, layout)
            with torch.no_grad():
                for parameter in generator.parameters():
                    parameter.add_(0.1 * torch.randn_like(parameter))
        return generator.eval()

    return make


@pytest.fixture(scope="session")
def text_encoder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny text encoder, not to be written to: embeddings of 32 values."""
    # Not before it is needed: transformers takes seconds to import.
    from tests.text_encoders import save_encoder

    return save_encoder(tmp_path_factory.mktemp("encoders") / "words")


@pytest.fixture(scope="session")
def words_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny words model (`tests.words_models`), not to be written to; it needs `words_package`."""
    from tests.words_models import save_words_model

    return save_words_model(tmp_path_factory.mktemp("words_models"))


@pytest.fixture
def words_package(words_model: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The package that the words model's encoder comes in can be imported; the directory that it is in."""
    site = words_model.parent / "site"
    monkeypatch.syspath_prepend(site)
    return site


@pytest.fixture(scope="session")
def asked_generator(words_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An untrained generator of CIFAR-10 networks that reads descriptions by `words_model`."""
    from tests.words_models import save_asked_generator

    return save_asked_generator(tmp_path_factory.mktemp("asked") / "small", words_model)


@pytest.fixture(scope="session")
def describing(
    make_generator: Callable[..., Generator], make_layout: Callable[..., Layout], text_encoder: Path
) -> Generator:
    """A generator that reads descriptions."""
    generator = make_generator(make_layout(16), recurrent=RecurrentKind.lstm, condition_size=32)
    generator.config.condition.encoder = encoder_digest(text_encoder)
    generator.config.sampling = SamplingConfig(solver=Solver.ddim, steps=3, token_batch=32)
    generator.encoder_directory = text_encoder
    return generator


@pytest.fixture(scope="session")
def s3() -> Iterator[S3Server]:
    """A real S3 server; RPG and its subprocesses find it as they would find one of a user's."""
    with s3_server() as server, pytest.MonkeyPatch.context() as environment:
        for key, value in {**CREDENTIALS, "AWS_ENDPOINT_URL": server.endpoint}.items():
            environment.setenv(key, value)
        yield server


@pytest.fixture
def proxy(s3: S3Server, monkeypatch: pytest.MonkeyPatch) -> Iterator[Proxy]:
    """The way to the S3 server leads through a proxy that can be told to make trouble."""
    proxy = Proxy(s3.endpoint)
    monkeypatch.setenv("AWS_ENDPOINT_URL", proxy.endpoint)
    # What was opened before knows the old way.
    S3FileSystem.clear_instance_cache()
    yield proxy
    S3FileSystem.clear_instance_cache()
    proxy.stop()


@pytest.fixture(scope="session")
def free_ports() -> Callable[[int], list[int]]:
    """`free_ports(number)`: ports that nothing listens on now.

    Not the ones that the system gives to any outgoing connection: those may be taken before a server that is
    told one of them has started. Nor the ones of Ray's workers, 10002 to 19999.
    """

    def free(number: int) -> list[int]:
        sockets: list[socket.socket] = []
        while len(sockets) < number:
            with suppress(OSError):
                port = random.SystemRandom().randrange(20_000, _first_ephemeral_port())
                sockets.append(socket.create_server(("", port)))
        ports = [int(each.getsockname()[1]) for each in sockets]
        for each in sockets:
            each.close()
        return ports

    return free


def _first_ephemeral_port() -> int:
    first = int(Path("/proc/sys/net/ipv4/ip_local_port_range").read_text().split()[0])
    return first if first > 21_000 else 32_768
