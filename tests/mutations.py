"""What may happen to a file on a storage that others write to, as strategies of Hypothesis."""

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from hypothesis import strategies as st

SECRET_VARIABLE = "RPG_TEST_SECRET"
SECRET = "a-value-that-nobody-may-see"

HOSTILE_VALUES: list[Any] = [
    None, True, False, -1, 0, 1, 7, 10**9, 2**63, 10**30, -(10**30), 1.5, -0.0, 1e300, float("nan"),
    float("inf"), "", "text", "../../outside/kept.txt", "/", "a\nb", "\0", "\ud800", "x" * 5000, [], {},
    [[]], [None], {"a": 1}, [-1, 10**30, "x", None], f"${{oc.env:{SECRET_VARIABLE}}}",
]  # fmt: skip


class Mutation(NamedTuple):
    """Something that is done to a file, given a place outside that nothing may reach."""

    name: str
    apply: Callable[[Path, Path], None]
    is_link: bool = False

    def __repr__(self) -> str:
        return self.name


def _link_to_copy(path: Path, outside: Path) -> None:
    shutil.copy2(path, outside / "copy")
    path.unlink()
    path.symlink_to(outside / "copy")


def _replaced(make: Callable[[Path], Any]) -> Callable[[Path, Path], None]:
    def apply(path: Path, outside: Path) -> None:
        path.unlink()
        make(path)

    return apply


def _sparse(path: Path) -> None:
    with path.open("wb") as file:
        file.write(b"{")
        file.truncate(2**36)


def _linked_directory(path: Path, outside: Path) -> None:
    """The directory of the file becomes a link to a copy of it."""
    directory = path.parent
    shutil.copytree(directory, outside / "directory", symlinks=True)
    shutil.rmtree(directory)
    directory.symlink_to(outside / "directory")


KINDS = [
    Mutation("link to a copy", _link_to_copy, is_link=True),
    Mutation(
        "link to a directory", lambda path, outside: _replaced(lambda p: p.symlink_to(outside))(path, outside)
    ),
    Mutation("link to nothing", _replaced(lambda path: path.symlink_to(path.name + ".nothing"))),
    Mutation("link to itself", _replaced(lambda path: path.symlink_to(path.name))),
    Mutation("FIFO", _replaced(os.mkfifo)),
    Mutation("directory", _replaced(Path.mkdir)),
    Mutation("64 GiB of nothing", _replaced(_sparse)),
    Mutation("missing", lambda path, outside: path.unlink()),
    Mutation("empty", lambda path, outside: path.write_bytes(b"") and None),
    Mutation("nested", lambda path, outside: path.write_text("[" * 50_000) and None),
    Mutation("nested mappings", lambda path, outside: path.write_text('{"a":' * 50_000) and None),
    Mutation("not text", lambda path, outside: path.write_bytes(b"\xff\xfe\0\x80" * 50) and None),
]
LINKED_DIRECTORY = Mutation("directory is a link to a copy", _linked_directory, is_link=True)


def _places(value: Any, place: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """The keys that lead to every value within parsed JSON."""
    found = [place] if place else []
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, each in items:
        found += _places(each, (*place, key))
    return found


def _changed_json(choice: int, value: Any) -> Callable[[Path, Path], None]:
    def apply(path: Path, outside: Path) -> None:
        content = json.loads(path.read_text())
        places = _places(content)
        *way, last = places[choice % len(places)]
        inner = content
        for key in way:
            inner = inner[key]
        inner[last] = value
        path.write_text(json.dumps(content))

    return apply


def _changed_line(choice: int, value: Any) -> Callable[[Path, Path], None]:
    """YAML of plain `key: value` lines."""

    def apply(path: Path, outside: Path) -> None:
        lines = path.read_text().splitlines()
        number = choice % len(lines)
        key, colon, _ = lines[number].partition(":")
        lines[number] = f"{key}{colon} {json.dumps(value)}"
        path.write_text("\n".join(lines) + "\n")

    return apply


def _bytes_changed(choice: int, content: bytes) -> Callable[[Path, Path], None]:
    def apply(path: Path, outside: Path) -> None:
        before = path.read_bytes()
        at = choice % (len(before) + 1)
        path.write_bytes(before[:at] + content + before[at + len(content) :])

    return apply


def _cut(choice: int) -> Callable[[Path, Path], None]:
    def apply(path: Path, outside: Path) -> None:
        before = path.read_bytes()
        path.write_bytes(before[: choice % (len(before) + 1)])

    return apply


def mutations_of(name: str) -> st.SearchStrategy[Mutation]:
    """What may happen to a file of that name, whose content is JSON, YAML or other bytes by its suffix."""
    places = st.integers(0, 2**20)
    anything = [
        st.sampled_from(KINDS),
        st.builds(lambda at: Mutation(f"cut at {at}", _cut(at)), places),
        st.builds(
            lambda at, content: Mutation(f"{content!r} at {at}", _bytes_changed(at, content)),
            places,
            st.binary(min_size=1, max_size=8),
        ),
    ]
    change = {".json": _changed_json, ".yaml": _changed_line}.get(Path(name).suffix)
    if change is not None:
        values = st.sampled_from(HOSTILE_VALUES)
        changed = st.builds(
            lambda at, value: Mutation(f"value {at} is {value!r:.40}", change(at, value)), places, values
        )
        anything += [changed] * 4
    return st.one_of(anything)
