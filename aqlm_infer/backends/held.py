"""Operands that CUDA keeps for a layer, so that an eager call neither passes nor checks them.

Conversions of a layer's tensors, in Python, the dispatcher and the stable ABI, cost the host as
much as its launches do. ``ops.hold_*`` gives a layer's operands to ``_cuda``, and ``Held`` calls it
past the dispatcher. The kernels are the same, and so is every bit of the results.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import torch

from . import native

_handles = getattr(torch._C, "_aoti", None)
_handle_of = getattr(_handles, "unsafe_alloc_void_ptr_from_tensor", None)
_tensor_of = getattr(_handles, "alloc_tensor_by_stealing_from_void_ptr", None)


def _are_ours() -> bool:
    """Whether handles of tensors are as ``_cuda`` takes them: whoever asked for one frees it."""
    if native.cuda is None or _handle_of is None or _tensor_of is None:
        return False
    probe = torch.empty(0)
    before = probe._use_count()
    _tensor_of(_handle_of(probe))  # the handle, of nothing, stays behind
    return probe._use_count() == before + 1


can_hold = _are_ours()
if can_hold:
    _linear, _parts = native.cuda.held_linear, native.cuda.held_parts


class Held:
    """One layer's operands, with what they were made of. Copies and pickles of it are None.

    They serve x on their own device while the module's ``parameters`` and ``buffers`` are the very
    objects that they were (``functional_call`` and accelerate write into a module's dicts) and
    while ``values``, which buffers derive from, have not changed: in place, where torch counts that
    (not in inference tensors), or by ``.data``. What is used as it is, is read in every call.
    """

    __slots__ = ("_operands",)

    def __init__(
        self, number: int, parameters: Mapping, buffers: Mapping, values: Iterable[torch.Tensor]
    ):
        values = list(values)
        versioned = [value for value in values if not value.is_inference()]
        self._operands = native.cuda.take_held(
            number, list(parameters.values()), list(buffers.values()), versioned,
            [_handle_of(value) for value in values],
        )  # fmt: skip

    def linear(self, x: torch.Tensor, parameters: Mapping, buffers: Mapping) -> torch.Tensor | None:
        """The layer's result, or None where these are not its operands any more."""
        y = _linear(self._operands, parameters, buffers, _handle_of(x))
        return None if y is None else _tensor_of(y)

    def parts(
        self, x: torch.Tensor, parameters: Mapping, buffers: Mapping, sizes: list[int]
    ) -> list[torch.Tensor] | None:
        """Columns of the result, ``sizes`` in order: tensors of their own over its memory."""
        found = _parts(self._operands, parameters, buffers, _handle_of(x), sizes)
        return None if found is None else [_tensor_of(part) for part in found]

    def serves(self, x: torch.Tensor, parameters: Mapping, buffers: Mapping) -> bool:
        """Whether ``linear`` would give a result."""
        return native.cuda.held_is_valid(self._operands, parameters, buffers, _handle_of(x))

    def rotation(self, x: torch.Tensor) -> torch.Tensor:
        """x as ``product`` takes it; what the operands were made of is not looked at."""
        return _tensor_of(native.cuda.held_rotation(self._operands, _handle_of(x)))

    def product(self, z: torch.Tensor) -> torch.Tensor:
        """The result for a rotated z, likewise."""
        return _tensor_of(native.cuda.held_product(self._operands, _handle_of(z)))

    def __reduce__(self):
        return type(None), ()
