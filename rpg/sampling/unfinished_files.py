"""Files of models that are being written, each by one thread at a time."""

from collections.abc import Callable
from contextlib import ExitStack

from rpg.sampling.model_writer import ModelFile
from rpg.sampling.sampled import Sampled


class UnfinishedFiles:
    """Files between their first token and their last."""

    def __init__(self, open_file: Callable[[int], ModelFile]) -> None:
        """`open_file` gives the file of a model."""
        self._open_file = open_file
        self._files: dict[int, ModelFile] = {}

    def write(self, model: int, first_token: int, rows: slice, sampled: Sampled) -> ModelFile | None:
        """Write `rows` of a batch, the tokens of `model` from `first_token` on, after those before them.

        Returns:
            The file, still open and no longer one of these, if all its tokens are written.

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
            # All went well so far: it stays open.
            stack.pop_all()
        if first_token + rows.stop - rows.start == file.layout.tokens:
            return file
        self._files[model] = file
        return None

    def discard(self, model: int) -> Exception | None:
        """Clear away the file of `model`, if there is one; what closing it met, such as a full disk."""
        file = self._files.pop(model, None)
        return None if file is None else _discarded(file)

    def clear(self) -> list[Exception]:
        """As `discard`, for all."""
        met = []
        while self._files:
            _, file = self._files.popitem()
            if (error := _discarded(file)) is not None:
                met.append(error)
        return met


def _discarded(file: ModelFile) -> Exception | None:
    # Not with what made it useless: that may have happened to another file, and would be told of this one.
    unfinished = _UnfinishedError()
    try:
        file.__exit__(_UnfinishedError, unfinished, None)
    except Exception as error:
        return None if error is unfinished else error
    return None


class _UnfinishedError(Exception):
    pass
