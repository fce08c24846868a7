"""Measurements that are kept piece by piece: a script that ended early goes on where it stopped."""

import hashlib
import json
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rpg.storage.files import read_json, write_json


@dataclass(frozen=True)
class Pieces:
    """The finished pieces of one measurement, a JSON file each below `directory`."""

    directory: Path
    ends: float
    """The time of `time.monotonic`, in seconds, from which on no piece is begun."""

    @classmethod
    def of(cls, runs: Path, settings: Any, ends: float) -> "Pieces":
        """The pieces of a measurement with `settings` (plain values), in their own directory in `runs`."""
        digest = hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()
        return cls(runs / f"pieces-{digest[:12]}", ends)

    def piece(self, name: str, measure: Callable[[], dict[str, Any]]) -> dict[str, Any]:
        """The result of `measure`, from this call or an earlier one.

        The process ends here with status 3 if the time is over.
        """
        path = self.directory / f"{name}.json"
        if not path.exists():
            if time.monotonic() > self.ends:
                print(f"{name}: not begun, the time is over; call again", file=sys.stderr)
                sys.exit(3)
            found = measure()
            write_json(path, found)
        result: dict[str, Any] = read_json(path, "a measurement")
        print(f"{name}: {json.dumps(result)[:300]}", file=sys.stderr, flush=True)
        return result
