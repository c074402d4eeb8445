"""Loads the compiled modules, and keeps the reason when one cannot be loaded.

``_cpu`` needs no torch library, but it must share torch's OpenMP runtime: torch is imported first.
"""

from __future__ import annotations

import importlib
import platform
from importlib.machinery import EXTENSION_SUFFIXES
from pathlib import Path
from types import ModuleType

import torch

_REBUILD = "build it with `pip install --no-build-isolation .` (needs a C++ compiler)"


def _load(name: str) -> tuple[ModuleType | None, str | None]:
    try:
        return importlib.import_module(f"aqlm_infer.{name}"), None
    except ModuleNotFoundError as error:
        if error.name != f"aqlm_infer.{name}":
            raise
        return None, f"aqlm_infer.{name} {_why_absent(name)}; {_REBUILD}"
    except ImportError as error:
        torch_version = torch.__version__
        return None, f"aqlm_infer.{name} does not load with torch {torch_version}: {error}"


def _why_absent(name: str, folder: Path = Path(__file__).parents[1]) -> str:
    """ "is not built", or for which Python it was built."""
    fitting = {f"{name}{suffix}" for suffix in EXTENSION_SUFFIXES}
    others = sorted({path.name for path in folder.glob(f"{name}.*.so")} - fitting)
    if not others:
        return "is not built"
    return f"is there for another Python ({', '.join(others)}), not {platform.python_version()}"


cpu, cpu_problem = _load("_cpu")
cuda, cuda_problem = _load("_cuda")
