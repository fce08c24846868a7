"""The one exception that a user is meant to read."""


class RPGError(Exception):
    """Bad input or a failed write, told in one line.

    The message names the file, the tensor or the key at fault and says what was expected. Command lines
    print it alone, without a traceback, and exit with status 2.
    """


def one_line(error: BaseException) -> str:
    """What an error says, without line breaks; its type where it says nothing."""
    return " ".join(str(error).split()) or type(error).__name__
