"""One name on disk for each compiled kernel, whatever ran before it in the process.

Triton (3.6) names what it compiled by a hash that is kept in each function, and which depends on
the functions that were hashed before it: a helper's globals count where it is met first. Another
order of layers, and the next process compiles again what lies on disk. So all kernels of matmuls
are hashed in one order when the first of them is loaded (0.05 s).
"""

import importlib

from triton.runtime.jit import JITFunction

BODIES = (
    "additive", "words", "planes", "e8p", "scalar", "scalar_integers", "first", "hadamard",
    "partial",
)  # fmt: skip


def fix() -> None:
    """Hash the kernels of BODIES in their order. (The interpreter's functions have no hash.)"""
    for name in BODIES:
        module = importlib.import_module(f"{__package__}.{name}")
        for function in vars(module).values():
            if isinstance(function, JITFunction):
                function.cache_key  # noqa: B018 (a property that keeps what it returns)
