"""The exception whose message is written for the user."""

_ESCAPED = {
    code: repr(chr(code))[1:-1] for code in (*range(32), *range(0x7F, 0xA0), 0x2028, 0x2029) if code != 9
}
"""Control characters and line breaks, as Python writes them."""


class RPGError(Exception):
    """Bad input or a failed write; the message is one line.

    The message names the file, the tensor or the key at fault and says what was expected. Commands print only
    the message, without a traceback, and exit with status 2. Names of files may hold line breaks and codes
    that terminals obey: these are shown as escapes.
    """

    def __init__(self, message: str) -> None:
        super().__init__(message.translate(_ESCAPED))


def one_line(error: BaseException) -> str:
    """The message of an error without line breaks, or the name of its type if the message is empty."""
    return " ".join(str(error).split()) or type(error).__name__
