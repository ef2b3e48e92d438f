"""Names of a package whose modules are imported when one of them is first asked for: its `__getattr__` (PEP 562).

__getattr__ = later({"dataset.loader": ("Loader",)})       in dataset/__init__.py; beside it, for mypy, the import
"""

from collections.abc import Callable
from importlib import import_module


def later(names: dict[str, tuple[str, ...]]) -> Callable[[str], object]:
    """What gets a name from the module that has it. names: {module: its names}."""
    homes = {name: module for module, several in names.items() for name in several}

    def get(name: str) -> object:
        if name not in homes:
            raise AttributeError(f"there is no {name} here; there are {', '.join(sorted(homes))}")
        return getattr(import_module(homes[name]), name)

    return get
