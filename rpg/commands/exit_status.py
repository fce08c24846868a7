"""How every command of RPG ends: errors as one line on stderr, and the exit status."""

import atexit
import gc
import os
import sys
from collections.abc import Callable

from rpg.errors import RPGError, one_line

BAD_INPUT = 2
INTERRUPTED = 130
BROKEN_PIPE = 141


def run_command(main: Callable[[], None], program: str) -> int:
    """Run a command's body and return the process's exit status.

    0 if it ends well; 2 after `program: error: ...` in one line on stderr for an `RPGError` or `OSError`;
    130 after Ctrl-C; 141 if the reader of its output is gone. Any other exception is a bug and keeps its
    traceback.
    """
    # Python would end by searching all that was imported for cycles: up to a second with PyTorch and Ray.
    atexit.register(gc.freeze)
    try:
        main()
        # Flushing here reports a full disk behind stdout like any other error.
        sys.stdout.flush()
    except KeyboardInterrupt:
        print(f"{program}: interrupted", file=sys.stderr)
        return INTERRUPTED
    except BrokenPipeError:
        # Python flushes stdout once more at exit, and would print an error.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return BROKEN_PIPE
    except (RPGError, OSError) as error:
        print(f"{program}: error: {_message(error)}", file=sys.stderr)
        return BAD_INPUT
    return 0


def _message(error: Exception) -> str:
    if isinstance(error, OSError) and error.strerror:
        return f"{error.filename}: {error.strerror}" if error.filename is not None else error.strerror
    return one_line(error)
