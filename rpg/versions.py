"""The versions that a result was made with."""

import importlib.metadata
import platform
import subprocess
from pathlib import Path

from rpg import __version__

_PACKAGES = ("numpy", "omegaconf", "pyarrow", "ray", "safetensors", "scikit-learn", "torch")


def versions() -> dict[str, str]:
    """Python, RPG (with its commit where it runs from a checkout) and the packages that results depend on."""
    found = {"python": platform.python_version(), "rpg": __version__}
    commit = _commit()
    if commit:
        found["rpg commit"] = commit
    for package in _PACKAGES:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def _commit() -> str | None:
    root = Path(__file__).parent.parent
    if not (root / ".git").exists():
        return None
    git = ["git", "-C", str(root), "describe", "--always", "--dirty", "--abbrev=12"]
    try:
        return subprocess.run(git, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None
