"""CUDA kernels: operators (registered when it is loaded), and calls of layers that it keeps.

``handle`` is a capsule of torch._C._aoti; a handle that is passed goes with the call. Who calls:
aqlm_infer/backends/held.py. ValueError, TypeError and RuntimeError say what cannot be taken.
"""

from typing import Any

import torch

def take_held(
    number: int,
    parameters: list[torch.Tensor | None],
    buffers: list[torch.Tensor],
    versioned: list[torch.Tensor],
    values: list[Any],
) -> Any: ...
def held_linear(
    held: Any,
    parameters: dict[str, torch.Tensor | None],
    buffers: dict[str, torch.Tensor | None],
    handle: Any,
) -> Any | None: ...
def held_parts(
    held: Any,
    parameters: dict[str, torch.Tensor | None],
    buffers: dict[str, torch.Tensor | None],
    handle: Any,
    sizes: list[int],
) -> list[Any] | None: ...
def held_is_valid(
    held: Any,
    parameters: dict[str, torch.Tensor | None],
    buffers: dict[str, torch.Tensor | None],
    handle: Any,
) -> bool: ...
def held_rotation(held: Any, handle: Any) -> Any: ...
def held_product(held: Any, handle: Any) -> Any: ...
