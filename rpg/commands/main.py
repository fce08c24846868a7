"""The `rpg` command: what can be done without Ray. The jobs that need it are `python -m ray_jobs....`."""

import argparse
import importlib.metadata
import json
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

from omegaconf import OmegaConf
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from upath import UPath

from rpg import __version__
from rpg.commands.arguments import condition_text, condition_values, count, seed
from rpg.commands.exit_status import run_command
from rpg.commands.jobs import add_jobs_command
from rpg.config import SamplingPrecision, Solver, load_config, validate_sampling
from rpg.errors import RPGError

# Commands import what they need themselves: `rpg --help` does not wait for PyTorch.


def main(arguments: Sequence[str] | None = None) -> int:
    """Run `rpg` with `arguments` (default: those of the process) and return its exit status."""
    options = _parser().parse_args(arguments)
    return run_command(lambda: options.run(options), "rpg")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="rpg",
        description="Generates the weights of neural networks from collections of trained checkpoints.",
        epilog="Stages that run on Ray: python -m ray_jobs.{collect,shard,train,generate,evaluate,pipeline}",
    )
    parser.add_argument("--version", action="version", version=f"rpg {__version__}")
    commands = parser.add_subparsers(title="commands", required=True, metavar="COMMAND")

    register = commands.add_parser("register", help="make a collection of a folder of checkpoints")
    register.add_argument(
        "directory", help="folder or URI of .safetensors, .pt, .pth or PEFT adapter directories"
    )
    source = register.add_mutually_exclusive_group()
    source.add_argument(
        "--conditions", type=Path, metavar="FILE", help="CSV (header file,...) or JSON ({file: [numbers]})"
    )
    source.add_argument(
        "--descriptions",
        type=Path,
        metavar="FILE",
        help="CSV (header file,description) or JSON ({file: text}); their embeddings are the conditions",
    )
    register.add_argument(
        "--pattern",
        help="template such as '{index}_acc{acc}_class{class:bits10}_{rest}', or a regular expression with "
        "named groups; kinds: bitsN, digits, value, state, metric (default: the published model's naming); "
        "beside --conditions or --descriptions one without a condition, such as '{rest}_seed{seed:state}'",
    )
    register.add_argument(
        "--encoder",
        type=Path,
        metavar="DIR",
        help="text encoder that reads the descriptions: config.json, tokenizer.json and model.safetensors "
        "as transformers saves them; copied into the collection (default: the one that is there)",
    )
    register.add_argument(
        "--skip-bad", action="store_true", help="leave out checkpoints that cannot be used, and list them"
    )
    register.set_defaults(run=_register)

    inspect = commands.add_parser(
        "inspect", help="print the layout of a checkpoint, collection, shards or generator"
    )
    inspect.add_argument("path", help="file, directory or URI")
    inspect.add_argument(
        "--token-size",
        type=int,
        metavar="N",
        help="for checkpoints and collections (default: 8192, or the largest tensor if that is smaller)",
    )
    inspect.add_argument("--all", action="store_true", help="show every tensor of a long layout")
    inspect.add_argument("--json", action="store_true", help="print JSON for machines")
    inspect.add_argument("--verify", action="store_true", help="check files against their SHA-256")
    inspect.set_defaults(run=_inspect)

    generate = commands.add_parser("generate", help="generate checkpoints on this machine")
    generate.add_argument("generator", help="directory or URI of a generator")
    asked = generate.add_mutually_exclusive_group()
    asked.add_argument(
        "--condition",
        action="append",
        type=condition_text,
        metavar="C",
        help="one digit a value, such as 0101010101, or numbers with commas, such as 0.5,2; with a minus in "
        "front write --condition=-1,0; may be given several times",
    )
    asked.add_argument(
        "--description",
        action="append",
        metavar="TEXT",
        help="in place of a condition, where the generator has a text encoder; may be given several times",
    )
    generate.add_argument(
        "--number", type=count, default=1, metavar="N", help="models for each condition (default: 1)"
    )
    generate.add_argument("--seed", type=seed, default=0, metavar="S", help="default: 0")
    generate.add_argument("--out", required=True, metavar="DIR", help="directory or URI where the models go")
    generate.add_argument("--solver", choices=[solver.value for solver in Solver])
    generate.add_argument("--steps", type=count, metavar="N", help="evaluations of the denoiser")
    generate.add_argument("--temperature", type=float, metavar="T", help="scale of the starting noise")
    generate.add_argument("--guidance", type=float, metavar="G", help="classifier-free guidance; 1 is off")
    generate.add_argument(
        "--clip", type=float, metavar="C", help="largest normalised value that a step may estimate; 0: any"
    )
    generate.add_argument(
        "--precision",
        choices=[precision.value for precision in SamplingPrecision],
        help="of products on a GPU; a CPU uses float32",
    )
    generate.add_argument("--device", choices=["cpu", "cuda"], help="default: the GPU, where there is one")
    generate.set_defaults(run=_generate)

    config = commands.add_parser("config", help="print a preset with overrides applied, checked and resolved")
    config.add_argument("preset", type=Path, help="YAML file")
    config.add_argument("overrides", nargs="*", metavar="key=value")
    config.set_defaults(run=_config)

    add_jobs_command(commands)

    # Commands of packages that build on this one, which it does not know.
    for entry in importlib.metadata.entry_points(group="rpg.commands"):
        entry.load()(commands)
    return parser


def _register(options: argparse.Namespace) -> None:
    from rpg.collection.register import BadCheckpointsError, register

    try:
        with _progress("checking") as progress:
            collection, skipped = register(
                _location(options.directory),
                options.conditions,
                options.pattern,
                options.skip_bad,
                progress,
                options.descriptions,
                options.encoder,
            )
    except BadCheckpointsError as error:
        _list(error.problems)
        raise
    _list(f"skipped: {line}" for line in skipped)
    width = collection.condition_width
    print(
        f"{options.directory}: {len(collection)} checkpoints, "
        + ("no conditions" if width is None else f"conditions of width {width}")
        + (", from descriptions" if collection.encoder else "")
        + (f", {len(skipped)} skipped" if skipped else "")
    )


def _inspect(options: argparse.Namespace) -> None:
    from rpg.commands.inspect import inspect

    with _progress("verifying") as progress:
        report = inspect(_location(options.path), options.token_size, options.verify, progress)
    if options.json:
        print(json.dumps(report.to_json(), indent=2, ensure_ascii=False, allow_nan=False))
    else:
        # Into a pipe or file there is no width to keep to.
        console = Console(width=None if sys.stdout.isatty() else 160)
        console.print(report.to_rich(show_all=options.all))


def _generate(options: argparse.Namespace) -> None:
    import torch

    from rpg.generator.generator import Generator
    from rpg.sampling.generate import generate_models

    has_gpu = torch.cuda.is_available()
    if options.device == "cuda" and not has_gpu:
        raise RPGError("--device: cuda, but PyTorch finds no GPU")
    generator = Generator.from_pretrained(_location(options.generator))
    given = {key: getattr(options, key) for key in ("steps", "temperature", "guidance", "clip")}
    given = {key: value for key, value in given.items() if value is not None}
    sampling = replace(generator.config.sampling, **given)
    if options.solver is not None:
        sampling = replace(sampling, solver=Solver(options.solver))
    if options.precision is not None:
        sampling = replace(sampling, precision=SamplingPrecision(options.precision))
    validate_sampling(sampling, generator.config, prefix="--")
    conditions = None
    if options.condition is not None:
        conditions = [condition_values(text, generator.config.condition.size) for text in options.condition]
    if options.description is not None:
        encoder = generator.text_encoder()
        conditions = [encoder.encode(text) for text in options.description]
    generator.to(options.device or ("cuda" if has_gpu else "cpu"))
    with _progress("generating") as progress:
        paths = generate_models(
            generator, conditions, options.number, options.seed, _location(options.out), sampling, progress
        )
    for path in paths:
        print(path)


def _config(options: argparse.Namespace) -> None:
    config = load_config(options.preset, options.overrides)
    print(OmegaConf.to_yaml(OmegaConf.structured(config), resolve=True), end="")


def _location(text: str) -> Path | UPath:
    """A local path stays as it was written, so that messages name it so."""
    from rpg.storage.locations import location

    return location(text) if "://" in text else Path(text)


def _list(lines: Iterator[str] | Sequence[str]) -> None:
    for line in lines:
        print(line, file=sys.stderr)


@contextmanager
def _progress(task: str) -> Iterator[Callable[[int, int], None]]:
    """A bar on stderr, gone when done; nothing where stderr is no terminal."""
    console = Console(stderr=True)
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as bar:
        identity = None

        def update(done: int, total: int) -> None:
            nonlocal identity
            if identity is None:
                identity = bar.add_task(task, total=total)
            bar.update(identity, completed=done, total=total)

        yield update
