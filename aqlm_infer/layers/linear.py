"""``QuantLinear``: a drop-in ``nn.Linear`` whose weight is stored in a quantized format.

Two states. *Canonical*: the format's own tensors, under the names that checkpoints use. *Prepared*:
the code tensors are replaced by a kernel's runtime buffers (never mutated by a forward), the values
(codebooks, scales, bias) stay. ``state_dict`` gives canonical tensors in both states, bit for bit.
"""

from __future__ import annotations

import os
import warnings

import torch
import torch.nn.functional as F
from torch import nn

from ..backends import KERNELS, Kernel, Problem, select, why_not_fast
from ..formats import Format, FormatError, Tensors, parse_scheme


class QuantLinear(nn.Module):
    """``y = x W^T + bias`` with W [N, K] in a quantized format.

    Args:
        in_features, out_features: K and N.
        scheme: scheme id or format record.
        bias: whether the layer has one.
        dtype, device: of codebooks, scales and bias.
        precision: what the kernels may round: "exact", or one that ``aqlm-infer info`` lists.
        kernel: kernel id to force, instead of the cheapest that takes the layer.

    A new layer's tensors are uninitialised until ``load_state_dict`` fills them;
    ``prepare`` then picks a kernel and repacks. Codes never require grad; codebooks and scales do
    only when ``requires_grad_`` is called on them, and then the layer computes through its
    differentiable dequantized weight.
    """

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
        for name, spec in specs.items():
            value = torch.empty(spec.shape, dtype=spec.dtype or dtype, device=device)
            self.register_parameter(name, nn.Parameter(value, requires_grad=False))
        value = torch.empty(out_features, dtype=dtype, device=device) if bias else None
        self.register_parameter("bias", None if value is None else nn.Parameter(value))
        self._buffer_names: tuple[str, ...] = ()

    # -- construction ------------------------------------------------------------------------------

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
        values = [t for k, t in tensors.items() if k not in format.code_names]
        if not values:
            raise FormatError(f"{name} has no tensors of {format.id}: {sorted(tensors)}")
        out_features = format.out_features(tensors, name)
        format.check_tensors(tensors, out_features, in_features, name)
        layer = cls(
            in_features,
            out_features,
            format,
            bias is not None,
            dtype=values[0].dtype,
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
        tensors = quantizer.fit(weight, hessian)
        tensors = {
            k: t if k in format.code_names else t.to(weight.dtype) for k, t in tensors.items()
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

    def problem(self) -> Problem:
        """What kernel selection sees of this layer."""
        value = next(iter(self._values().values()))
        N, K = self.out_features, self.in_features
        return Problem(self.format, N, K, value.dtype, value.device.type, self.precision)

    @torch.no_grad()
    def prepare(self, name: str = "layer") -> QuantLinear:
        """Pick a kernel for the layer's device and dtype, and repack the codes into its layout.

        Does nothing on the meta device or when already prepared. Raises FormatError (with ``name``)
        when the tensors are not what the format asks for, KernelError when no kernel takes the
        layer or the forced one does not.
        """
        if self.kernel_id is not None or next(iter(self._values().values())).is_meta:
            return self
        tensors = self.tensors()
        self.format.check_tensors(tensors, self.out_features, self.in_features, name)
        problem = self.problem()
        kernel = select(problem, self.forced_kernel)
        chosen = self.forced_kernel or os.environ.get("AQLM_KERNEL")
        if kernel.id == "ref.dequant" and not chosen and problem.dtype != torch.float64:
            reasons = why_not_fast(problem)
            warnings.warn(f"{problem}: slow reference kernel ({reasons})", stacklevel=2)
        buffers = kernel.repack(self.format, tensors, (self.out_features,), self.precision)
        for name in self.format.code_names:
            self.register_parameter(name, None)
        for name, buffer in buffers.items():
            self.register_buffer(name, buffer, persistent=False)
        self._buffer_names = tuple(buffers)
        self.kernel_id = kernel.id
        return self

    @torch.no_grad()
    def restore(self) -> QuantLinear:
        """Undo ``prepare``: the canonical code tensors come back, the runtime buffers go."""
        if self.kernel is None:
            return self
        codes = self._codes()
        for name in self._buffer_names:
            delattr(self, name)
        self.kernel_id, self._buffer_names = None, ()
        for name, tensor in codes.items():
            self.register_parameter(name, nn.Parameter(tensor, requires_grad=False))
        return self

    def _apply(self, fn, recurse=True):
        # Runtime layouts belong to a device and a dtype: move the canonical tensors, then repack.
        prepared = self.kernel is not None
        self.restore()
        super()._apply(fn, recurse)
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
        if self.trains_values:
            return self.format.dequantize({**self._codes(), **self._values()})
        if self.kernel is None:
            return self.format.dequantize(self.tensors())
        N, K = self.out_features, self.in_features
        values = {n: t.detach() for n, t in self._values().items()}
        return self.kernel.dequantize(self.format, self._buffers_of_kernel(), values, K, (N,))

    @property
    def trains_values(self) -> bool:
        """Whether codebooks or scales require grad."""
        return any(self._parameters[n].requires_grad for n in self._value_names)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.trains_values and torch.is_grad_enabled():
            bias = None if self.bias is None else self.bias.to(x.dtype)
            return F.linear(x, self.weight.to(x.dtype), bias)
        if self.kernel is None:
            raise RuntimeError(
                f"QuantLinear {self.format.id} is not prepared: load its tensors, then prepare()"
            )
        return self.kernel.matmul(
            self.format,
            x,
            self._buffers_of_kernel(),
            self._values(),
            self.bias,
            (self.out_features,),
            self.precision,
        )

    def extra_repr(self) -> str:
        kernel = self.kernel.id if self.kernel else "not prepared"
        bits = self.format.bits_per_weight(self.out_features, self.in_features)
        return (
            f"in_features={self.in_features}, out_features={self.out_features},"
            f" bias={self.bias is not None}, scheme={self.format.id}, bits={bits:.2f},"
            f" kernel={kernel}"
        )
