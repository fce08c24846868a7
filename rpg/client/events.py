"""Reading server-sent events."""

from typing import NamedTuple


class Event(NamedTuple):
    """An event: its name and its data."""

    name: str
    data: str


class EventReader:
    """Turns the bytes of a stream, cut anywhere, into events."""

    def __init__(self) -> None:
        self._rest = b""
        self._name = ""
        self._data: list[str] = []

    def feed(self, block: bytes) -> list[Event]:
        """The events that are whole with `block`."""
        *lines, self._rest = (self._rest + block).split(b"\n")
        found = []
        for line in lines:
            text = line.removesuffix(b"\r").decode(errors="replace")
            key, _, value = text.partition(":")
            value = value.removeprefix(" ")
            if not text:
                if self._data:
                    found.append(Event(self._name, "\n".join(self._data)))
                self._name, self._data = "", []
            elif key == "event":
                self._name = value
            elif key == "data":
                self._data.append(value)
        return found
