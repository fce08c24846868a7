"""Files of models that are being written, each by one thread at a time."""

from collections.abc import Callable
from contextlib import ExitStack, suppress
from types import TracebackType

from rpg.errors import RPGError
from rpg.generation.model_file import ModelFile
from rpg.generation.sampled import Sampled


class UnfinishedFiles:
    """A context manager: what is not finished where the block ends is cleared away."""

    def __init__(self, open_file: Callable[[int], ModelFile], finished: Callable[[], None]) -> None:
        """`open_file` gives the file of a model; `finished` is called for every one that is in its place."""
        self._open_file = open_file
        self._finished = finished
        self._files: dict[int, ModelFile] = {}

    def __enter__(self) -> "UnfinishedFiles":
        return self

    def write(self, model: int, first_token: int, rows: slice, sampled: Sampled) -> None:
        """Write `rows` of a batch, the tokens of `model` from `first_token` on, after those before them.

        Raises:
            RPGError: naming the file, which is cleared away then.
        """
        with ExitStack() as stack:
            if first_token == 0:
                file = stack.enter_context(self._open_file(model))
            else:
                file = self._files.pop(model)
                stack.push(file)
            sampled.write(rows, file, first_token)
            if first_token + rows.stop - rows.start < file.layout.tokens:
                self._files[model] = file
                # All went well so far: it stays open.
                stack.pop_all()
                return
        self._finished()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        while self._files:
            _, file = self._files.popitem()
            # Not with what ended the block: that has happened to another file, and would be told of this one.
            # Nor is it told of what closing meets, such as the same full disk.
            with suppress(_UnfinishedError, RPGError):
                file.__exit__(_UnfinishedError, _UnfinishedError(), None)


class _UnfinishedError(Exception):
    pass
