"""Loads the compiled modules, and keeps the reason when one cannot be loaded.

``_cpu`` needs no torch library, but it must share torch's OpenMP runtime: torch is imported first.
"""

from __future__ import annotations

import importlib
from types import ModuleType

import torch

_REBUILD = "build it with `pip install --no-build-isolation .` (needs a C++ compiler)"


def _load(name: str) -> tuple[ModuleType | None, str | None]:
    try:
        return importlib.import_module(f"aqlm_infer.{name}"), None
    except ModuleNotFoundError as error:
        if error.name != f"aqlm_infer.{name}":
            raise
        return None, f"aqlm_infer.{name} is not built; {_REBUILD}"
    except ImportError as error:
        torch_version = torch.__version__
        return None, f"aqlm_infer.{name} does not load with torch {torch_version}: {error}"


cpu, cpu_problem = _load("_cpu")
cuda, cuda_problem = _load("_cuda")
