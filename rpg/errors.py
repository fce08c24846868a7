"""The exception whose message is written for the user."""


class RPGError(Exception):
    """Bad input or a failed write; the message is one line.

    The message names the file, the tensor or the key at fault and says what was expected. Commands print only
    the message, without a traceback, and exit with status 2.
    """


def one_line(error: BaseException) -> str:
    """The message of an error without line breaks, or the name of its type if the message is empty."""
    return " ".join(str(error).split()) or type(error).__name__
