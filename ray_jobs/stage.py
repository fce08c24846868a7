"""Stages: what they depend on, whether their output is up to date, and how long they took.

A finished stage leaves `stages/NAME.json` with the fingerprint of its inputs: its sections of the config and
the fingerprint of the stage before. A stage whose fingerprint is unchanged is not run again.
"""

import argparse
import functools
import hashlib
import importlib
import json
import os
import socket
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from ray_jobs.cluster import ray_cluster
from ray_jobs.resources import ResourceRequest, require_resources
from ray_jobs.run_paths import RunPaths
from rpg import __version__
from rpg.commands.exit_status import run_command
from rpg.commands.progress import console
from rpg.config import Config, load_config, to_plain
from rpg.errors import RPGError
from rpg.storage.errors import StorageError, storage_errors_for
from rpg.storage.files import is_number, read_json, sha256, write_json, write_text
from rpg.storage.locations import AnyPath, exists, identity, is_remote
from rpg.storage.locks import LOCK_FILE, LockedError, exclusive_lock, lock_path


@dataclass(frozen=True)
class Stage:
    """One step of the flow."""

    name: str
    run: Callable[[Config], None]
    sections: tuple[str, ...]
    """Keys of the config (dotted) that its output depends on, besides the stage before."""
    after: "Stage | None"
    """The stage before; see `stage_before`."""
    outputs: Callable[[RunPaths], list[AnyPath]]
    """Files that must be there for the stage to count as done."""
    applies: Callable[[Config], bool] = lambda config: True
    """Whether the stage is part of the flow."""
    distinguishing: Callable[[RunPaths], AnyPath] | None = None
    """An output whose content the later stages depend on, for a stage whose equal inputs need not give equal
    outputs."""
    ignored: tuple[str, ...] = ()
    """Keys of those sections that do not change the output."""
    further: Callable[[Config], dict[str, str]] = lambda config: {}
    """What else its output depends on, by name, such as digests of code that the config names."""
    given: Callable[[Config], AnyPath | None] = lambda config: None
    """The file that describes an output which the user has given, if the config names one. The stage then
    only checks that output, when a later stage needs it."""
    resources: Callable[[Config], ResourceRequest | None] = lambda config: None
    """The workers that the stage cannot do without; None if one CPU is enough."""
    check: Callable[[Config], None] = lambda config: None
    """Raises an `RPGError` for what can be seen to be wrong before Ray is started."""


def stage_before(stage: Stage, config: Config) -> Stage | None:
    """The stage whose output this one takes; those that are not part of the flow are passed over."""
    before = stage.after
    while before and not before.applies(config):
        before = before.after
    return before


def fingerprint(stage: Stage, config: Config) -> str:
    """SHA-256 of all that determines the stage's output."""
    plain = to_plain(config)
    for key in stage.ignored:
        section, _, name = key.rpartition(".")
        del _at(plain, section)[name]
    inputs = {section: _at(plain, section) for section in stage.sections}
    earlier = stage_before(stage, config)
    before = fingerprint(earlier, config) + _content_digest(earlier, config) if earlier else ""
    given = stage.given(config)
    content = sha256(given) if given and exists(given) else ""
    further = stage.further(config)
    text = json.dumps([__version__, stage.name, inputs, before, content, further], sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()


def _content_digest(stage: Stage, config: Config) -> str:
    path = stage.distinguishing(RunPaths.of(config)) if stage.distinguishing else None
    return sha256(path) if path and exists(path) else ""


def is_done(stage: Stage, config: Config) -> bool:
    """Whether the stage's output is there and was made from the inputs of this config."""
    paths = RunPaths.of(config)
    record = _record_path(paths, stage)
    if not exists(record) or not all(exists(path) for path in stage.outputs(paths)):
        return False
    content = read_json(record, "a stage's record")
    return isinstance(content, dict) and content.get("fingerprint") == fingerprint(stage, config)


def check_stage(stage: Stage, config: Config) -> None:
    """Refuse to run the stage where the config is wrong or the stage before is missing; needs no Ray.

    Raises:
        RPGError: with the reason.
    """
    stage.check(config)
    before = stage_before(stage, config)
    if before and not before.given(config) and not is_done(before, config):
        raise RPGError(
            f"{RunPaths.of(config).root}: stage '{stage.name}' needs stage '{before.name}', which has "
            f"not been run with this config: run python -m ray_jobs.{before.name}, or ray_jobs.pipeline"
        )


def run_stage(stage: Stage, config: Config) -> None:
    """Run the stage and record that it is done.

    The stage before must be done, or its output given by the user; then that output is checked first.
    """
    check_stage(stage, config)
    paths, before = RunPaths.of(config), stage_before(stage, config)
    if before and not is_done(before, config):
        run_stage(before, config)
    record, inputs = _record_path(paths, stage), fingerprint(stage, config)
    with _withdrawn(record, stage.outputs(paths)):
        began = time.perf_counter()
        stage.run(config)
        seconds = time.perf_counter() - began
    write_json(record, {"fingerprint": inputs, "seconds": seconds})
    console.print(f"{stage.name}: done in {seconds:.1f} s")


def require_resources_of(stages: Sequence[Stage], config: Config) -> None:
    """Check that the cluster has the workers that the stages need, before any of them has begun.

    Raises:
        RPGError: naming the setting that asks for more than there is.
    """
    requests = [stage.resources(config) for stage in stages]
    require_resources([request for request in requests if request], config.ray.wait_seconds)


def with_stages_before(stage: Stage, config: Config) -> list[Stage]:
    """The chain of stages that ends with `stage`, first to last."""
    before = stage_before(stage, config)
    return [*(with_stages_before(before, config) if before else []), stage]


def stage_seconds(stage: Stage, config: Config) -> float:
    """How many seconds the stage took when it last ran."""
    path = _record_path(RunPaths.of(config), stage)
    record = read_json(path, "a stage's record")
    seconds: Any = record.get("seconds") if isinstance(record, dict) else None
    if not is_number(seconds):
        raise RPGError(f"{path}: seconds: expected how long the stage took, got {seconds!r:.80}")
    return float(seconds)


def stage_main(name: str, **switches: str) -> int:
    """The command line of one stage's module: CONFIG [key=value …]; returns the exit status.

    `switches` are keyword arguments of the stage's `run` that `--NAME` sets to True, with their help texts.
    """
    # The module is imported by its name, since it runs as __main__: Ray's workers import by name what the
    # module defines, and would be sent copies of what is in __main__.
    stage: Stage = getattr(importlib.import_module(f"ray_jobs.{name}"), name.upper())

    def run(config: Config, **switched: bool) -> None:
        require_resources_of([stage], config)
        run_stage(replace(stage, run=functools.partial(stage.run, **switched)), config)

    return job_main(
        f"ray_jobs.{name}", stage.run.__doc__ or "", run, functools.partial(check_stage, stage), switches
    )


def job_main(
    program: str,
    description: str,
    run: Callable[..., None],
    check: Callable[[Config], None],
    switches: Mapping[str, str],
) -> int:
    """Parse CONFIG [key=value …], `check` it, join Ray and call `run`; errors become one line, exit status 2.

    `switches` are keyword arguments of `run` that `--NAME` sets to True, with their help texts.
    """
    parser = argparse.ArgumentParser(prog=f"python -m {program}", description=description.splitlines()[0])
    parser.add_argument(
        "config", type=Path, metavar="CONFIG", help="a YAML preset, such as configs/digits.yaml"
    )
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="changes, such as train.steps=500")
    for switch, text in switches.items():
        parser.add_argument(f"--{switch}", action="store_true", help=text)
    arguments = parser.parse_args()

    def command() -> None:
        config = load_config(arguments.config, arguments.overrides)
        # Workers run in other directories.
        config.evaluate.directory = str(Path(config.evaluate.directory).absolute())
        cache = Path(config.ray.cache_directory)
        with locked_output(RunPaths.of(config).root, cache):
            # Starting Ray takes seconds, so mistakes that can be found without it are told before.
            check(config)
            with ray_cluster(config.ray):
                run(config, **{switch: getattr(arguments, switch) for switch in switches})

    return run_command(command, program)


@contextmanager
def locked_output(output: AnyPath, cache: Path) -> Iterator[None]:
    """Hold the lock of a run's directory: one job at a time writes there.

    Behind a URI the object `.lock` says which job came last. Writing it shows, before any work is done, that
    the output can be written.

    Raises:
        RPGError: if another job holds the lock, or the output cannot be written.
    """
    path = lock_path(output, cache / "jobs")
    try:
        lock = exclusive_lock(path)
    except LockedError as error:
        raise RPGError(f"{output}: another job is writing here; choose another output") from error
    except OSError as error:
        raise RPGError(f"{path.parent}: cannot be an output directory: {error.strerror}") from error
    with lock:
        if is_remote(output):
            write_text(output / LOCK_FILE, f"{socket.gethostname()} {os.getpid()}\n")
        yield


@contextmanager
def _withdrawn(record: AnyPath, outputs: list[AnyPath]) -> Iterator[None]:
    """Remove a stage's record while the stage runs, and put it back if the stage fails without having changed
    its outputs."""
    with storage_errors_for(record):
        earlier = record.read_text(encoding="utf-8") if record.is_file() else None
    before = _identities(outputs)
    with storage_errors_for(record, "cannot be removed"):
        record.unlink(missing_ok=True)
    try:
        yield
    except BaseException as error:
        # A storage that has failed fails here again; the user is told of the first failure.
        with suppress(StorageError):
            if earlier is not None and _identities(outputs) == before:
                write_text(record, earlier)
        raise error


def _identities(outputs: list[AnyPath]) -> list[object]:
    """Values that differ once a stage has changed its outputs.

    A local stage replaces its outputs as a whole, so each output's own identity is enough. Behind a URI the
    other files of an output's directory are written before it, so the whole directory counts.
    """
    return [identity(path.parent if is_remote(path) else path) for path in outputs]


def _record_path(paths: RunPaths, stage: Stage) -> AnyPath:
    return paths.root / "stages" / f"{stage.name}.json"


def _at(plain: Any, dotted: str) -> Any:
    for part in dotted.split("."):
        plain = plain[part]
    return plain
