"""Other libraries' entry points. Nothing here imports them: each is registered once loaded."""

from __future__ import annotations

import importlib
import sys
from importlib.abc import MetaPathFinder

_WATCHED = "transformers.quantizers.auto"
"""The module that holds transformers' table of quantizers."""


def register_lazily() -> None:
    """Register the transformers loader now, or as soon as transformers is imported.

    Works in either import order, after a reload of either package, and any number of times.
    """
    stop_watching()
    sys.meta_path.insert(0, _AfterTransformers())
    if _WATCHED in sys.modules:
        _register_transformers()


def stop_watching() -> None:
    """Undo the part of ``register_lazily`` that waits for an import."""
    # By name: a reload of this module makes a new class, and the old finder must go.
    name = _AfterTransformers.__qualname__
    sys.meta_path[:] = [
        f for f in sys.meta_path if (type(f).__module__, type(f).__qualname__) != (__name__, name)
    ]


def _register_transformers() -> None:
    module = importlib.import_module(".transformers", __name__)
    register = getattr(module, "register", None)
    # None while that module is itself being imported, and is what imports transformers: it
    # registers on its last line.
    if register is not None:
        register()


class _AfterTransformers(MetaPathFinder):
    """Finds nothing itself: has our loader registered when the watched module has been executed."""

    def __init__(self) -> None:
        self._searching = False

    def find_spec(self, fullname, path=None, target=None):
        # The flag keeps two such finders in one process from asking each other for ever.
        if fullname != _WATCHED or self._searching:
            return None
        self._searching = True
        try:
            found = (
                finder.find_spec(fullname, path, target)
                for finder in sys.meta_path
                if finder is not self and hasattr(finder, "find_spec")
            )
            spec = next((spec for spec in found if spec is not None), None)
        finally:
            self._searching = False
        if spec is None or spec.loader is None:
            return spec
        execute = spec.loader.exec_module

        def execute_then_register(module):
            execute(module)
            _register_transformers()

        # On this spec's own loader object: nothing else that Python loads is affected.
        spec.loader.exec_module = execute_then_register
        return spec
