"""What imports what: programs start without what they do not need, and imports go one way."""

import ast
import os
import subprocess
import sys
from graphlib import TopologicalSorter
from pathlib import Path

ROOT = Path(__file__).parents[1]
ORDER = [
    "rpg/errors.py", "rpg/seeds.py", "rpg/threads.py", "rpg/gpu_compiler.py", "rpg/captured.py",
    "rpg/storage", "rpg/config", "rpg/state_dicts.py", "rpg/adapter_merge.py", "rpg/text_encoder.py",
    "rpg/words", "rpg/encoders.py", "rpg/collection", "rpg/generator", "rpg/sampling", "rpg/tasks",
    "rpg/training", "rpg/evaluation", "rpg/client", "rpg/commands", "ray_jobs", "serve",
]  # fmt: skip
"""As docs/architecture.md lists them: a file may import what stands before its own place."""


def test_programs_start_without_torchvision() -> None:
    """torchvision is imported only where one of its networks is used."""
    code = (
        "import sys, rpg.commands.main, serve.app, ray_jobs.pipeline\n"
        "assert 'torchvision' not in sys.modules, 'torchvision was imported'"
    )
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def product_files() -> dict[str, Path]:
    """The files of the product by module."""
    paths = [path for folder in ("rpg", "ray_jobs", "serve") for path in (ROOT / folder).rglob("*.py")]
    return {".".join(path.relative_to(ROOT).with_suffix("").parts): path for path in paths}


def imports() -> dict[str, set[str]]:
    """By module, the product's modules that it imports, inside of functions as well."""
    files = product_files()
    found: dict[str, set[str]] = {module: set() for module in files}
    for module, path in files.items():
        for node in ast.walk(ast.parse(path.read_text())):
            names: list[str] = []
            if isinstance(node, ast.ImportFrom) and node.module:
                names = [node.module, *(f"{node.module}.{alias.name}" for alias in node.names)]
            elif isinstance(node, ast.Import):
                names = [alias.name for alias in node.names]
            found[module] |= {name for name in names if name in files and name != module}
    return found


def place(module: str) -> int:
    path = str(product_files()[module].relative_to(ROOT))
    return next(i for i, prefix in enumerate(ORDER) if path == prefix or path.startswith(f"{prefix}/"))


def test_imports_go_down_and_never_up() -> None:
    up = [
        f"{module} -> {other}"
        for module, others in imports().items()
        if module != "rpg.__init__"
        for other in others
        if place(other) > place(module)
    ]
    assert not up


def test_no_circle_of_imports() -> None:
    graph = imports()
    TopologicalSorter(graph).prepare()


def test_the_library_imports_no_ray() -> None:
    for module, path in product_files().items():
        if module.startswith("rpg."):
            nodes = list(ast.walk(ast.parse(path.read_text())))
            names = [alias.name for node in nodes if isinstance(node, ast.Import) for alias in node.names]
            names += [node.module or "" for node in nodes if isinstance(node, ast.ImportFrom)]
            assert not {name.partition(".")[0] for name in names} & {"ray", "ray_jobs", "serve"}, module


def test_the_architecture_page_names_every_file() -> None:
    page = (ROOT / "docs" / "architecture.md").read_text()
    missing = [
        str(path.relative_to(ROOT))
        for path in product_files().values()
        if not path.name.startswith("__") and f"{path.name}`" not in page
    ]
    assert not missing
