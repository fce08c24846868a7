"""Downloading a remote file, or all files below a remote directory, to the local disk."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from upath import UPath

from rpg.errors import RPGError

# The keys under which fsspec's filesystems report a version; those that depend on the content come first.
_VERSION_KEYS = (
    "ETag", "etag", "md5Hash", "generation", "mtime", "LastModified", "updated", "modified", "created",
)  # fmt: skip


class DamagedError(RPGError):
    """A downloaded file differs from the remote one."""


@dataclass(frozen=True)
class RemoteFile:
    """One version of a remote file. If a field changes, the file has changed."""

    size: int
    version: str
    """Its ETag if the storage reports one, otherwise the time of its last change."""


def remote_files(path: UPath) -> dict[str, RemoteFile]:
    """The files below a remote directory, by relative path. A file is returned under the empty path.

    Raises:
        FileNotFoundError: if there is no file or directory at `path`.
        RPGError: if a name leads out of the directory.
    """
    base = path.fs._strip_protocol(path.path).rstrip("/")
    found = {
        name[len(base) :].lstrip("/"): RemoteFile(int(info["size"]), _version(info))
        # Object stores represent directories as empty objects whose name ends with a slash.
        for name, info in path.fs.find(base, detail=True).items()
        if info.get("type") == "file" and not name.endswith("/")
    }
    if not found:
        raise FileNotFoundError(path.path)
    for name in found:
        # Object stores accept any text as a key, but a copy must not be written outside its directory.
        if ".." in PurePosixPath(name).parts:
            raise RPGError(f"{path}: '{name}' below it leads out of it; expected names without '..'")
    return dict(sorted(found.items()))


def download(path: UPath, files: Mapping[str, RemoteFile], target: Path) -> None:
    """Write `files`, some of the `remote_files` of `path`, to `target` (a file) or below it.

    Raises:
        DamagedError: naming the file that arrived with another size.
    """
    base = path.fs._strip_protocol(path.path).rstrip("/")
    places = {(f"{base}/{name}" if name else base): target / name for name in files}
    for place in {place.parent for place in places.values()}:
        place.mkdir(parents=True, exist_ok=True)
    path.fs.get([*places], [str(place) for place in places.values()])
    for place, (name, file) in zip(places.values(), files.items(), strict=True):
        found = place.stat().st_size
        if found != file.size:
            source = path / name if name else path
            raise DamagedError(f"{source}: damaged on its way: expected {file.size} bytes, got {found}")


def _version(info: Mapping[str, Any]) -> str:
    return next((str(info[key]) for key in _VERSION_KEYS if info.get(key)), "")
