"""`rpg jobs`: have models made by a service, and fetch them."""

import argparse
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from rpg.commands.arguments import (
    Commands,
    add_request_arguments,
    add_sampling_arguments,
    condition_values,
)
from rpg.commands.progress import bytes_progress, models_progress
from rpg.config import TokenDtype
from rpg.errors import RPGError

if TYPE_CHECKING:
    from rpg.client import Client, Job

SERVER, TOKEN = "RPG_SERVER", "RPG_TOKEN"

_NEWEST = 20


def add_jobs_command(commands: Commands) -> None:
    """Add `rpg jobs` to the command's parsers."""
    description = f"Have models made by a service (rpg serve). The token is read from {TOKEN}."
    parser = commands.add_parser("jobs", help="have models made by a service", description=description)
    actions = parser.add_subparsers(title="commands", required=True, metavar="COMMAND")

    submit = _action(actions, "submit", "ask for models, and print the job's id", _submit)
    submit.add_argument("generator", help="name of a generator that is served")
    add_request_arguments(
        submit,
        condition_help="as for `rpg generate`: one digit a value, or numbers with commas; may be given "
        "several times",
        description_help="in place of a condition, where the generator reads such; may be given several "
        "times",
    )
    add_sampling_arguments(submit)
    submit.add_argument(
        "--dtype", choices=[dtype.value for dtype in TokenDtype], help="of the networks' tensors"
    )
    submit.add_argument("--evaluate", action="store_true", help="measure every model, where that is possible")
    submit.add_argument(
        "--pack", action="store_true", help="have the service store small networks many in a file: faster"
    )
    submit.add_argument("--priority", type=int, metavar="P", help="-100 to 100; higher ones are made first")

    status = _action(actions, "status", "show a job, or the newest ones", _status)
    status.add_argument("id", nargs="?", help=f"of a job (default: the {_NEWEST} newest)")

    wait = _action(actions, "wait", "wait until a job has ended", _wait)
    wait.add_argument("id", help="of a job")

    download = _action(actions, "download", "fetch the finished models of a job, and print where", _download)
    download.add_argument("id", help="of a job")
    download.add_argument(
        "--out", required=True, type=Path, metavar="DIR", help="what is there already is not fetched again"
    )

    cancel = _action(actions, "cancel", "stop a job; what it has made stays", _cancel)
    cancel.add_argument("id", help="of a job")


def _action(
    actions: Commands,
    name: str,
    text: str,
    run: Callable[["Client", argparse.Namespace], None],
) -> argparse.ArgumentParser:
    parser = actions.add_parser(name, help=text)
    parser.add_argument("--server", metavar="URL", help=f"such as http://127.0.0.1:8000 (default: {SERVER})")

    def with_client(options: argparse.Namespace) -> None:
        with _client(options) as client:
            run(client, options)

    parser.set_defaults(run=with_client)
    return parser


@contextmanager
def _client(options: argparse.Namespace) -> Iterator["Client"]:
    from rpg.client import CallError, Client

    server = options.server or os.environ.get(SERVER)
    if not server:
        raise RPGError(f"no service: expected --server or {SERVER}, such as http://127.0.0.1:8000")
    try:
        with Client(server, os.environ.get(TOKEN) or None) as client:
            yield client
    except CallError as error:
        if error.status == 401:
            raise RPGError(f"{error}; the token is read from {TOKEN}") from error
        raise


def _submit(client: "Client", options: argparse.Namespace) -> None:
    conditions = None
    if options.condition is not None:
        size = next((g.condition_size for g in client.generators() if g.name == options.generator), 0)
        conditions = [condition_values(text, size) for text in options.condition]
    job = client.submit(
        options.generator,
        conditions,
        options.number,
        options.seed,
        descriptions=options.description,
        solver=options.solver,
        steps=options.steps,
        temperature=options.temperature,
        guidance=options.guidance,
        dtype=options.dtype,
        evaluate=options.evaluate or None,
        pack=options.pack,
        priority=options.priority,
    )
    for text, understood in zip(options.description or [], job.understood or [], strict=False):
        meant = ", ".join(
            f"{each.name} ({each.probability:.2f})" for each in understood.classes if each.meant
        )
        print(f"{text!r}: {meant}; sureness {understood.sureness:.2f}", file=sys.stderr)
    print(job.id)


def _status(client: "Client", options: argparse.Namespace) -> None:
    _show([client.job(options.id)] if options.id is not None else client.jobs(limit=_NEWEST).jobs)


def _wait(client: "Client", options: argparse.Namespace) -> None:
    with models_progress() as display:
        job = client.wait(
            options.id, lambda job: display.update(job.finished, job.models, job.error or job.state)
        )
    line = f"{job.finished} of {job.models} models"
    if job.state != "succeeded":
        raise RPGError(f"job {job.id} {job.state} with {line}" + (f": {job.error}" if job.error else ""))
    print(f"{job.id}: {line}")


def _download(client: "Client", options: argparse.Namespace) -> None:
    with bytes_progress() as display:
        paths = client.download(options.id, options.out, display.update)
    for path in paths:
        print(path)
    job = client.job(options.id)
    if len(paths) < job.models:
        print(f"{len(paths)} of {job.models} models; the job is {job.state}", file=sys.stderr)


def _cancel(client: "Client", options: argparse.Namespace) -> None:
    job = client.cancel(options.id)
    print(f"{job.id}: {job.state}, {job.finished} of {job.models} models")


def _show(jobs: Sequence["Job"]) -> None:
    table = Table(
        "id", "generator", "state", "models", "models/s", "seconds left", "accuracy", "note", box=None
    )
    for job in jobs:
        table.add_row(
            job.id,
            escape(job.generator),
            job.state,
            f"{job.finished}/{job.models}",
            _figure(job.models_per_second),
            _figure(job.seconds_left),
            _figure(job.accuracy),
            escape(job.error or ""),
        )
    # A pipe or a file has no width that the table would have to fit into.
    Console(width=None if sys.stdout.isatty() else 200, highlight=False).print(table)


def _figure(value: float | None) -> str:
    return "" if value is None else f"{value:.3g}"
