"""What programs import when they start."""

import os
import subprocess
import sys
from pathlib import Path


def test_programs_start_without_torchvision() -> None:
    """torchvision is imported only where one of its networks is used."""
    code = (
        "import sys, rpg.commands.main, serve.app, ray_jobs.pipeline\n"
        "assert 'torchvision' not in sys.modules, 'torchvision was imported'"
    )
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parents[1])}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
