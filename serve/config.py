"""Configuration of the service: a dataclass schema, read from YAML and validated."""

import re
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from typing import Annotated

from annotated_types import Ge, Gt, Interval

from rpg.config import Expected, Finite, JudgeConfig, check_bounds, read_config
from rpg.errors import RPGError
from rpg.storage.locations import AnyPath, location

SCOPES = ("submit", "read", "admin")
LOOPBACK = ("127.0.0.1", "::1", "localhost")

_NAME = re.compile(r"[a-z0-9]([a-z0-9_-]{0,61}[a-z0-9])?")
_SHA256 = re.compile(r"[0-9a-f]{64}")

AtLeastOne = Annotated[int, Ge(1), Expected("at least 1")]


@dataclass
class GeneratorEntry:
    """A generator that is served, on replicas of its own."""

    name: str = ""
    path: str = ""
    """Directory or URI of a saved generator, below one of `roots`."""
    replicas: AtLeastOne = 1
    max_replicas: int = 0
    """The generator starts with `replicas` and grows up to so many while jobs wait; 0: always `replicas`."""
    collection: str = ""
    """Directory or URI of the collection that it learned from, below one of `roots`: jobs may then ask for
    evaluation. Empty: they may not."""
    images: str = ""
    """Directory or URI of the images that networks are evaluated on, below one of `roots`, for task families
    that need some (`collect.images`)."""
    tasks: str = ""
    """Task family that measures networks: the name of an installed one, FILE.py:CLASS or MODULE:CLASS. Empty:
    the one that the collection names."""
    evaluate: JudgeConfig = field(default_factory=JudgeConfig)
    """A command that measures networks in place of a family."""
    num_gpus: float = 1.0
    """GPUs of a replica: 1, or 0 to run on a CPU."""


@dataclass
class LimitsConfig:
    """Limits above which a request is refused."""

    queued_models: AtLeastOne = 100_000
    """Models asked for and not made yet, of all jobs."""
    models_per_job: AtLeastOne = 10_000
    conditions: AtLeastOne = 10_000
    """Conditions of one job."""
    descriptions: AtLeastOne = 64
    """Descriptions of one job: a replica reads them before the job is accepted."""
    steps: AtLeastOne = 1000
    """Steps of the solver."""
    body_bytes: AtLeastOne = 8_000_000
    listeners: AtLeastOne = 1000
    """Connections that follow the events of jobs at once."""


@dataclass
class RetentionConfig:
    """How long jobs that have ended are kept; whichever limit is reached first removes the oldest."""

    days: Annotated[float, Ge(0)] = 7.0
    gigabytes: Annotated[float, Ge(0)] = 100.0
    """Size of the models of all ended jobs together."""


@dataclass
class TokenEntry:
    """Who may call. `printf %s TOKEN | sha256sum` gives `sha256`; the token itself is stored nowhere."""

    sha256: str = ""
    owner: str = ""
    """Jobs belong to owners; tokens of one owner see the same jobs."""
    scopes: list[str] = field(default_factory=lambda: ["submit", "read"])
    """`submit` makes, cancels and removes jobs; `read` sees them; `admin` does both with those of all."""
    expires: str = ""
    """ISO 8601 time with its zone, such as 2027-01-31T00:00:00Z; empty: never."""


@dataclass
class HttpConfig:
    """Where `python -m serve` listens. `serve run` and KubeRay have settings of their own."""

    host: str = "127.0.0.1"
    port: Annotated[int, Interval(ge=1, lt=2**16), Expected("1 to 65535")] = 8000


@dataclass
class CacheConfig:
    """Where a node keeps copies of generators that lie behind a URI."""

    directory: str = "~/.cache/rpg"
    gigabytes: Annotated[Finite, Gt(0)] = 100.0


@dataclass
class ServeConfig:
    """The whole service."""

    storage: str = ""
    """Directory or URI that holds the jobs and their models."""
    roots: list[str] = field(default_factory=list)
    """Directories or URIs; generators are loaded from below these alone."""
    generators: list[GeneratorEntry] = field(default_factory=list)
    auth: bool = True
    """`auth: off` asks nobody for a token, and then answers this machine alone."""
    tokens: list[TokenEntry] = field(default_factory=list)
    limits: LimitsConfig = field(default_factory=LimitsConfig)
    retention: RetentionConfig = field(default_factory=RetentionConfig)
    wait_for_nodes: bool = False
    """Generators that need more than the cluster has now wait for it to grow, instead of being refused."""
    num_cpus: AtLeastOne | None = None
    """CPUs of a Ray that `python -m serve` itself starts; None: all of the machine's."""
    http: HttpConfig = field(default_factory=HttpConfig)
    cache: CacheConfig = field(default_factory=CacheConfig)


@dataclass(frozen=True)
class ConfigFile:
    """The service's YAML file, and what relative paths in it are relative to."""

    path: Path
    directory: Path

    @classmethod
    def here(cls, path: Path) -> "ConfigFile":
        """The file at `path`, its relative paths from the current directory, as they are in a command."""
        return cls(path.absolute(), Path.cwd())

    def read(self) -> ServeConfig:
        """Read and validate it.

        Raises:
            RPGError: naming the file and the key.
        """
        return load_serve_config(self.path, self.directory)


def load_serve_config(path: Path, directory: Path | None = None) -> ServeConfig:
    """Read and validate the service's YAML file.

    Relative paths in it become absolute ones, from `directory` or the current one: wherever a worker runs,
    they mean what they mean here.

    Raises:
        RPGError: naming the file and the key.
    """
    config = read_config(path, ServeConfig, "the service's YAML config")
    directory = directory or Path.cwd()
    config.storage = _absolute(config.storage, directory)
    config.roots = [_absolute(root, directory) for root in config.roots]
    for entry in config.generators:
        entry.path = _absolute(entry.path, directory)
        entry.collection = _absolute(entry.collection, directory)
        entry.images = _absolute(entry.images, directory)
        if entry.evaluate.command:
            entry.evaluate.directory = str(directory / entry.evaluate.directory)
        file, _, name = entry.tasks.rpartition(":")
        if file.endswith(".py"):
            entry.tasks = f"{_absolute(file, directory)}:{name}"
    try:
        validate_serve_config(config)
    except RPGError as error:
        raise RPGError(f"{path}: {error}") from error
    return config


def validate_serve_config(config: ServeConfig) -> None:
    """Check ranges and combinations.

    Raises:
        RPGError: naming the key and what was expected.
    """
    if not config.storage:
        raise RPGError("storage: expected a directory or URI")
    location(config.storage)
    check_bounds(config)
    if not config.generators:
        raise RPGError("generators: expected at least one")
    names: set[str] = set()
    roots = [location(root) for root in config.roots]
    for i, entry in enumerate(config.generators):
        key = f"generators[{i}]"
        if not _NAME.fullmatch(entry.name):
            raise RPGError(f"{key}.name: expected small letters, digits, - and _, got '{entry.name}'")
        if entry.name in names:
            raise RPGError(f"{key}.name: '{entry.name}' is there already")
        names.add(entry.name)
        _check_generator(entry, key, roots)
    for i, token in enumerate(config.tokens):
        _check_token(token, f"tokens[{i}]")
    if len({token.sha256 for token in config.tokens}) < len(config.tokens):
        raise RPGError("tokens: one sha256 is there twice")
    if config.auth and not config.tokens:
        raise RPGError("tokens: expected at least one; 'auth: off' asks for none, on this machine alone")
    if not config.auth and config.http.host not in LOOPBACK:
        raise RPGError(f"http.host: with 'auth: off' expected 127.0.0.1, got {config.http.host}")
    if config.limits.models_per_job > config.limits.queued_models:
        raise RPGError(
            f"limits.models_per_job: expected at most queued_models = {config.limits.queued_models}, "
            f"got {config.limits.models_per_job}"
        )


def expiry(token: TokenEntry) -> datetime | None:
    """When a token expires; None: never."""
    return datetime.fromisoformat(token.expires) if token.expires else None


def _absolute(text: str, directory: Path) -> str:
    if not text or "://" in text:
        return text
    try:
        return str(directory / Path(text).expanduser())
    except RuntimeError as error:
        raise RPGError(f"{text}: {error}") from error


def _check_generator(entry: GeneratorEntry, key: str, roots: list[AnyPath]) -> None:
    if not entry.path:
        raise RPGError(f"{key}.path: expected a directory or URI of a saved generator")
    for name, text in (("path", entry.path), ("collection", entry.collection), ("images", entry.images)):
        if text and not any(_is_below(location(text), root) for root in roots):
            raise RPGError(f"{key}.{name}: {text} lies below none of roots: {', '.join(map(str, roots))}")
    if entry.max_replicas and entry.max_replicas < entry.replicas:
        raise RPGError(
            f"{key}.max_replicas: expected 0 or at least replicas = {entry.replicas}, "
            f"got {entry.max_replicas}"
        )
    if entry.num_gpus not in (0, 1):
        raise RPGError(f"{key}.num_gpus: expected 1, or 0 for a CPU, got {entry.num_gpus:g}")


def _is_below(path: AnyPath, root: AnyPath) -> bool:
    if isinstance(path, Path) and isinstance(root, Path):
        # Links and .. must not lead out.
        return path.resolve().is_relative_to(root.resolve())
    if isinstance(path, Path) or isinstance(root, Path) or ".." in path.parts:
        return False
    return str(path).startswith(str(root).rstrip("/") + "/")


def _check_token(token: TokenEntry, key: str) -> None:
    if not _SHA256.fullmatch(token.sha256):
        raise RPGError(f"{key}.sha256: expected 64 hexadecimal digits in small letters")
    if not token.owner:
        raise RPGError(f"{key}.owner: expected a name")
    for scope in token.scopes:
        if scope not in SCOPES:
            raise RPGError(f"{key}.scopes: expected {', '.join(SCOPES)}, got '{scope}'")
    try:
        when = expiry(token)
    except ValueError:
        raise RPGError(f"{key}.expires: expected an ISO 8601 time, got '{token.expires}'") from None
    if when is not None and when.tzinfo is None:
        raise RPGError(f"{key}.expires: expected a time with its zone, such as {when.isoformat()}Z")
