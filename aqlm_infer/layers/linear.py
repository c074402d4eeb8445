"""``QuantLinear``: a drop-in ``nn.Linear`` whose weight is stored in a quantized format.

Two states. *Canonical*: the format's own tensors, under the names that checkpoints use. *Prepared*:
the code tensors are replaced by a kernel's runtime buffers, the values (codebooks, scales, sign
vectors, bias) stay. ``state_dict`` gives canonical tensors in both states, bit for bit.
"""

from __future__ import annotations

import os
import warnings
from operator import is_

import torch
import torch.nn.functional as F
from torch import is_grad_enabled, nn
from torch._C import _get_tracing_state, _len_torch_dispatch_stack
from torch._C._functorch import peek_interpreter_stack
from torch.compiler import is_compiling

from ..backends import KERNELS, Kernel, Problem, select, why_not_fast
from ..backends.held import Held
from ..formats import Format, Tensors, parse_scheme
from ..ops.library import OperandError


def may_pass_dispatcher(x: torch.Tensor) -> bool:
    """Whether nothing looks at operators (a mode, a trace, a functional transform), and x is a
    plain tensor, which no key of the dispatcher would change."""
    return type(x) is torch.Tensor and not (
        _len_torch_dispatch_stack()
        or _get_tracing_state()
        or peek_interpreter_stack()
        or x.is_neg()
    )


def _version_of(value: torch.Tensor) -> tuple[int, int]:
    """(version, address): what changes with a value. Inference tensors have no versions."""
    try:
        address = value.data_ptr()
    except RuntimeError:  # a fake tensor, or one of a functional transform
        address = 0
    return (0 if value.is_inference() else value._version), address


LAYER_CLASSES: dict[type[Format], type[QuantLinear]] = {}
"""Subclasses of ``QuantLinear`` for formats that need one."""


class QuantLinear(nn.Module):
    """``y = x W^T + bias`` with W [N, K] in a quantized format.

    Args:
        in_features, out_features: K and N.
        scheme: scheme id or format record.
        bias: whether the layer has one.
        dtype, device: of the values and the bias. Values with a dtype of their own (Wscale) keep
            it, also in ``half()`` and the like.
        precision: what the kernels may round: "exact", or one that ``aqlm-infer info`` lists.
        kernel: kernel id to force, instead of the cheapest that takes the layer.

    A new layer's tensors are uninitialised until ``load_state_dict`` fills them;
    ``prepare`` then picks a kernel and repacks. Codes never require grad; values do only when
    ``requires_grad_`` is called on them. Then the layer computes through its differentiable
    dequantized weight, or, when rotated, through differentiable operators.

    Kernels may keep buffers derived from the values (``Kernel.fold``). An eager forward renews them
    after any in-place change of the values; a compiled graph or a captured CUDA graph reads what
    the last eager forward left.
    """

    _held: Held | None = None  # its operands, kept by the backend
    _seen: list | None = None  # values and bias of the last eager call without them

    def __init__(
        self,
        in_features: int,
        out_features: int,
        scheme: str | Format,
        bias: bool = True,
        *,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
        precision: str = "exact",
        kernel: str | None = None,
    ):
        super().__init__()
        self.in_features, self.out_features = in_features, out_features
        self.format = parse_scheme(scheme)
        self.format.check_shape(out_features, in_features)
        self.precision = precision
        self.forced_kernel = kernel
        self.kernel_id: str | None = None
        dtype = dtype or torch.get_default_dtype()
        specs = self.format.tensor_specs(out_features, in_features)
        self._value_names = tuple(n for n in specs if n not in self.format.code_names)
        self._own_dtype = tuple(n for n in self._value_names if specs[n].dtype is not None)
        for name, spec in specs.items():
            value = torch.empty(spec.shape, dtype=spec.dtype or dtype, device=device)
            self.register_parameter(name, nn.Parameter(value, requires_grad=False))
        value = torch.empty(out_features, dtype=dtype, device=device) if bias else None
        self.register_parameter("bias", None if value is None else nn.Parameter(value))
        self._buffer_names: tuple[str, ...] = ()
        self._folded: list[tuple[int, int]] | None = None
        self._slow: str | None = None  # what the first use has to say of the kernel

    # -- construction ------------------------------------------------------------------------------

    @classmethod
    def class_for(cls, format: Format) -> type[QuantLinear]:
        """The layer class of a format; a subclass stands by itself."""
        return LAYER_CLASSES.get(type(format), cls) if cls is QuantLinear else cls

    @classmethod
    def from_tensors(
        cls,
        scheme: str | Format,
        tensors: Tensors,
        in_features: int,
        bias: torch.Tensor | None = None,
        *,
        name: str = "layer",
        precision: str = "exact",
        kernel: str | None = None,
    ) -> QuantLinear:
        """A prepared layer from canonical tensors; FormatError names a bad one and its values."""
        format = parse_scheme(scheme)
        out_features = format.out_features(tensors, name)
        format.check_tensors(tensors, out_features, in_features, name)
        specs = format.tensor_specs(out_features, in_features)
        layer = cls.class_for(format)(
            in_features,
            out_features,
            format,
            bias is not None,
            dtype=next(tensors[n].dtype for n, spec in specs.items() if spec.dtype is None),
            device="meta",
            precision=precision,
            kernel=kernel,
        )
        state = dict(tensors) if bias is None else {**tensors, "bias": bias.detach()}
        layer.load_state_dict(state, assign=True)
        return layer

    @classmethod
    def from_linear(
        cls,
        linear: nn.Linear,
        scheme: str | Format,
        *,
        quantizer=None,
        hessian: torch.Tensor | None = None,
        precision: str = "exact",
        kernel: str | None = None,
    ) -> QuantLinear:
        """Quantize ``linear`` (``quantizer`` None: the scheme's default, data-free) and wrap it."""
        from ..quantizers import quantizer_for

        format = parse_scheme(scheme)
        format.check_shape(linear.out_features, linear.in_features)
        quantizer = quantizer or quantizer_for(format)
        weight = linear.weight.detach()
        specs = format.tensor_specs(linear.out_features, linear.in_features)
        tensors = {
            k: t if specs[k].dtype else t.to(weight.dtype)
            for k, t in quantizer.fit(weight, hessian).items()
        }
        layer = cls.from_tensors(
            format, tensors, linear.in_features, linear.bias, precision=precision, kernel=kernel
        )
        if linear.bias is not None:
            layer.bias.requires_grad_(linear.bias.requires_grad)
        return layer.train(linear.training)

    # -- canonical and prepared state --------------------------------------------------------------

    @property
    def kernel(self) -> Kernel | None:
        """The kernel that the layer is prepared for, or None in the canonical state."""
        return None if self.kernel_id is None else KERNELS[self.kernel_id]

    def _values(self) -> dict[str, torch.Tensor]:
        # From the module's own dict: nn.Module's attribute look-up costs a microsecond a tensor.
        return {n: self._parameters[n] for n in self._value_names}

    def freeze(self) -> QuantLinear:
        """Let no value require grad (the bias is left as it is)."""
        for value in self._values().values():
            value.requires_grad_(False)
        return self

    def _buffers_of_kernel(self) -> dict[str, torch.Tensor]:
        return {n: self._buffers[n] for n in self._buffer_names}

    def tensors(self) -> dict[str, torch.Tensor]:
        """The canonical tensors (codes unpacked when the layer is prepared), without the bias."""
        return {**self._codes(), **{n: t.detach() for n, t in self._values().items()}}

    def _codes(self) -> dict[str, torch.Tensor]:
        if self.kernel is None:
            return {n: getattr(self, n).detach() for n in self.format.code_names}
        N, K = self.out_features, self.in_features
        return self.kernel.unpack(self.format, self._buffers_of_kernel(), N, K, (N,))

    def _reference_value(self) -> torch.Tensor:
        # A value that has the layer's dtype: formats without one do not exist.
        name = next(n for n in self._value_names if n not in self._own_dtype)
        return self._parameters[name]

    def problem(self) -> Problem:
        """What kernel selection sees of this layer."""
        value = self._reference_value()
        N, K = self.out_features, self.in_features
        return Problem(self.format, N, K, value.dtype, value.device.type, self.precision)

    @torch.no_grad()
    def prepare(self, name: str = "layer") -> QuantLinear:
        """Pick a kernel for the layer's device and dtype, and repack the codes into its layout.

        Does nothing on the meta device or when already prepared. Raises FormatError (with ``name``)
        when the tensors are not what the format asks for, KernelError when no kernel takes the
        layer or the forced one does not.
        """
        if self.kernel_id is not None or self._reference_value().is_meta:
            return self
        tensors = self.tensors()
        self.format.check_tensors(tensors, self.out_features, self.in_features, name)
        problem = self.problem()
        kernel = select(problem, self.forced_kernel)
        chosen = self.forced_kernel or os.environ.get("AQLM_KERNEL")
        self._slow = None
        if kernel.id == "ref.dequant" and not chosen and problem.dtype != torch.float64:
            slow = f"{problem}: slow reference kernel ({why_not_fast(problem)})"
            if problem.device == "cpu" and torch.cuda.is_available():
                self._slow = slow  # a model that is loaded here may be on its way to the GPU
            else:
                warnings.warn(slow, stacklevel=2)
        buffers = kernel.repack(self.format, tensors, (self.out_features,), self.precision)
        if kernel.fold is not None:
            buffers |= kernel.fold(self.format, self._values())
            self._folded = self._versions()
        for name in self.format.code_names:
            self.register_parameter(name, None)
        for name, buffer in buffers.items():
            self.register_buffer(name, buffer.detach(), persistent=False)
        self._buffer_names = tuple(buffers)
        self.kernel_id = kernel.id
        return self

    def _versions(self) -> list[tuple[int, int]]:
        """Numbers of each value that change with it: in place, by ``.data``, or by a new tensor."""
        return [_version_of(self._parameters[name]) for name in self._value_names]

    @torch.no_grad()
    def restore(self) -> QuantLinear:
        """Undo ``prepare``: the canonical code tensors come back, the runtime buffers go."""
        if self.kernel is None:
            return self
        codes = self._codes()
        for name in self._buffer_names:
            delattr(self, name)
        self.kernel_id, self._buffer_names, self._folded, self._seen = None, (), None, None
        for name, tensor in codes.items():
            self.register_parameter(name, nn.Parameter(tensor, requires_grad=False))
        return self

    def _apply(self, fn, recurse=True):
        # Runtime layouts belong to a device and a dtype: move the canonical tensors, then repack.
        prepared = self.kernel is not None
        self.restore()
        kept = {n: self._parameters[n].detach() for n in self._own_dtype}
        super()._apply(fn, recurse)
        for name, value in kept.items():
            moved = self._parameters[name]
            if moved.dtype != value.dtype:
                moved.data = value.to(moved.device)
        return self.prepare() if prepared else self

    def _save_to_state_dict(self, destination, prefix, keep_vars):
        super()._save_to_state_dict(destination, prefix, keep_vars)
        if self.kernel is not None:
            for name, tensor in self._codes().items():
                destination[prefix + name] = tensor

    def _load_from_state_dict(self, state_dict, prefix, *args):
        prepared = self.kernel is not None
        self.restore()
        super()._load_from_state_dict(state_dict, prefix, *args)
        complete = all(
            prefix + name in state_dict and state_dict[prefix + name].shape == spec.shape
            for name, spec in self.format.tensor_specs(self.out_features, self.in_features).items()
        )
        if prepared or complete:
            self.prepare(prefix.rstrip(".") or "layer")

    # -- use ---------------------------------------------------------------------------------------

    @property
    def weight(self) -> torch.Tensor:
        """The dequantized [N, K] weight in the layer's dtype (computed anew at every access)."""
        if self.trains_values:  # differentiable
            return self.format.dequantize({**self._codes(), **self._values()})
        if self.kernel is None:
            return self.format.dequantize(self.tensors())
        N, K = self.out_features, self.in_features
        values = {n: t.detach() for n, t in self._values().items()}
        return self.kernel.dequantize(self.format, self._buffers_of_kernel(), values, K, (N,))

    @property
    def trains_values(self) -> bool:
        """Whether any value (codebooks, scales, sign vectors) requires grad."""
        return any(self._parameters[n].requires_grad for n in self._value_names)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        # Packed codes are padded, so that operators take x of 248 for 256 columns without a word.
        if x.shape[-1] != self.in_features:
            raise OperandError(
                f"x is {list(x.shape)}, expected [..., {self.in_features}] (in_features)"
            )
        if not (is_grad_enabled() or is_compiling()) and may_pass_dispatcher(x):
            held = self._held
            if held is None:
                self._hold()
            else:
                y = self._run_held(held, x)
                if y is not None:
                    return y
                self._held = None
        return self._compute(x)

    def _hold(self) -> None:
        """Have the kernel keep the layer's operands, from the second call with the same values on.

        Where tensors come and go with every call (offloading), to keep them is to keep memory.
        """
        kernel, parameters, buffers = self.kernel, self._parameters, self._buffers
        if kernel is None or kernel.hold is None or self._slow is not None:
            return
        # Values and bias, which are small: they may outlive their place by a call.
        seen, values = self._seen, list(parameters.values())
        if seen is None or len(seen) != len(values) or not all(map(is_, seen, values)):
            self._seen = values
            return
        if kernel.fold is not None and self._folded != self._versions():
            return
        number = kernel.hold(
            self.format, buffers, parameters, parameters["bias"], (self.out_features,),
            self.precision,
        )  # fmt: skip
        if number is not None:
            folded = self._values().values() if kernel.fold is not None else ()
            self._held = Held(number, parameters, buffers, folded)

    def __setattr__(self, name, value):
        # Held operands stand for all that they were made of, precision and bias among it.
        self.__dict__.pop("_held", None)
        super().__setattr__(name, value)

    def _run_held(self, held: Held, x: torch.Tensor) -> torch.Tensor | None:
        return held.linear(x, self._parameters, self._buffers)

    def _compute(self, x: torch.Tensor) -> torch.Tensor:
        kernel, compiling = self.kernel, is_compiling()
        trains = (is_grad_enabled() or compiling) and self.trains_values
        if trains and is_grad_enabled() and not (kernel is not None and kernel.trains):
            bias = None if self.bias is None else self.bias.to(x.dtype)
            return F.linear(x, self.weight.to(x.dtype), bias)
        if kernel is None:
            raise RuntimeError(
                f"{type(self).__name__} {self.format.id} is not prepared: load its tensors, then"
                " prepare()"
            )
        if self._slow is not None and not compiling:
            warnings.warn(self._slow, stacklevel=2)
            self._slow = None
        # The module's own dicts: copies, and its attribute look-up, cost a microsecond each.
        buffers, values = self._buffers, self._parameters
        if kernel.fold is not None:
            if trains:
                buffers = {**buffers, **kernel.fold(self.format, values)}
            elif not compiling and self._folded != self._versions():
                self._renew_folded()
        if kernel.rotate is not None:
            x = self._rotated(x, buffers, values)
        bias, parts = values["bias"], (self.out_features,)
        return kernel.matmul(self.format, x, buffers, values, bias, parts, self.precision)

    @torch.no_grad()
    def _renew_folded(self) -> dict[str, torch.Tensor]:
        folded = self.kernel.fold(self.format, self._values())
        for name, new in folded.items():
            # In place, so that a captured CUDA graph reads it too.
            self._buffers[name].copy_(new)
        self._folded = self._versions()
        return {name: self._buffers[name] for name in folded}

    def _rotated(self, x, buffers: dict[str, torch.Tensor], values: dict[str, torch.Tensor]):
        return self.kernel.rotate(self.format, x, buffers, values)

    def extra_repr(self) -> str:
        kernel = self.kernel.id if self.kernel else "not prepared"
        bits = self.format.bits_per_weight(self.out_features, self.in_features)
        return (
            f"in_features={self.in_features}, out_features={self.out_features},"
            f" bias={self.bias is not None}, scheme={self.format.id}, bits={bits:.2f},"
            f" kernel={kernel}"
        )
