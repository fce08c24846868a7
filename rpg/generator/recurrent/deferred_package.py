"""Importing a module of a package without first executing all that the package's `__init__` imports."""

import importlib.util
import sys
import threading
from typing import Any


def defer_init(name: str) -> None:
    """Have the `__init__` of package `name` executed when something that it defines is first asked for.

    Until then its modules can be imported without it. Does nothing where the package is not installed, or has
    been imported already.
    """
    spec = None if name in sys.modules else importlib.util.find_spec(name)
    if spec is None or spec.loader is None:
        return
    loader = spec.loader
    package = importlib.util.module_from_spec(spec)
    executed = False
    lock = threading.RLock()  # of the thread that executes: it may ask for what is not defined yet

    def from_init(attribute: str) -> Any:
        nonlocal executed
        if attribute.startswith("__") and attribute not in ("__version__", "__all__"):
            # Whoever looks through all modules asks for such names.
            raise AttributeError(f"module {name!r} has no attribute {attribute!r}", name=attribute)
        with lock:
            if not executed:
                executed = True
                try:
                    loader.exec_module(package)
                except BaseException:
                    executed = False  # as with any import that fails, the next one tries again
                    raise
        try:
            return vars(package)[attribute]
        except KeyError:
            raise AttributeError(f"module {name!r} has no attribute {attribute!r}", name=attribute) from None

    # Python calls a module's __getattr__ for what the module lacks (PEP 562).
    vars(package)["__getattr__"] = from_init
    sys.modules.setdefault(name, package)
