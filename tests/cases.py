"""What the tests run over: schemes, shapes by failure mode, and random layers. Never zeros."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import load_file

from aqlm_infer.backends import native
from aqlm_infer.formats import (
    AdditiveFormat,
    E8PFormat,
    Format,
    QuipFormat,
    ScalarFormat,
    parse_scheme,
)
from aqlm_infer.formats.e8p import CODEBOOK_IDS

GOLDEN = Path(__file__).parent / "golden"
GOLDEN_LAYERS = sorted(p.stem for p in GOLDEN.glob("aqlm_*.safetensors"))

# Without the CPU module (a GPU with the CUDA wheel) files must still be read: what runs there is
# chosen by -m gpu. CPU cases fail then, they are not skipped.
ISAS = ("_cpu is not built",) if native.cpu is None else native.cpu.supported_isas()

# Tokens: none, one, around the vector widths 8 and 16, passes with every kind of remainder.
TOKENS = (0, 1, 2, 3, 7, 8, 9, 16, 17, 18, 19, 29, 33, 64, 129)

# (scheme, N, K): N around row blocks (odd, one below and above 64), K odd numbers of groups.
LAYERS = (
    ("aqlm-2x8-g8", 65, 136),
    ("aqlm-2x8-g8", 512, 256),
    ("aqlm-2x8-g8", 1, 8),
    ("aqlm-1x8-g8", 63, 200),
    ("aqlm-1x8-g4", 130, 68),
    ("aqlm-4x8-g8", 33, 72),
    ("aqlm-8x8-g32", 70, 96),
    ("aqlm-2x6-g8", 64, 104),
    ("aqlm-2x7-g8", 66, 56),
    ("aqlm-4x4-g8", 129, 88),
    ("aqlm-3x5-g4", 31, 60),
    ("aqlm-1x1-g3", 17, 27),
    ("aqlm-2x8-g8-o2", 34, 64),
    ("aqlm-1x3-g7-o3", 9, 49),
    ("aqlm-1x16-g8", 65, 136),
    ("aqlm-1x16-g16", 40, 208),
    ("aqlm-1x12-g8", 67, 72),
    ("aqlm-1x15-g8", 20, 88),
    ("aqlm-2x9-g4", 21, 52),
    ("aqlm-2x16-g8", 12, 40),
    ("aqlm-1x10-g32-o2", 6, 96),
    ("aqlm-1x11-g5", 13, 35),
)

# E8P and QuIP's grid: both orders of factors (1, Paley I and II, Williamson), N and K at the least
# size, odd numbers of 64-column groups and of 128-blocks; odd N where only K needs whole bytes.
ROTATED_LAYERS = (
    ("quip-e8p-2bit", 192, 320),
    ("quip-e8p-2bit", 16, 64),
    ("quip-e8p-2bit", 112, 704),
    ("quip-e8p-2bit", 688, 128),
    ("quip-e8p-3bit", 224, 192),
    ("quip-e8p-4bit", 144, 448),
    ("quip-e8p-3bit-r2.1", 80, 64),
    ("quip-e8p-2bit-b128", 128, 384),
    ("quip-e8p-4bit-b128", 256, 128),
    ("quip-e8p-2bit-f32+16+16", 64, 128),
    ("quip-int2", 20, 152),
    ("quip-int3", 132, 40),
    ("quip-int4", 1, 24),
    ("quip-int2-b128", 128, 256),
    ("quip-int4-b128", 384, 128),
    ("quip-int3-kron", 35, 96),
)

# Scalar grids: odd N, groups of one word and of many, N and K at tile sizes plus one vector.
SCALAR_LAYERS = (
    ("gptq-int4-g128", 65, 256),
    ("gptq-int4-g32", 1, 32),
    ("gptq-int3-g64", 33, 192),
    ("gptq-int2-g64", 130, 320),
    ("gptq-int8-g32", 7, 96),
    ("rtn-int2-g16", 64, 48),
    ("rtn-int3-g8", 17, 40),
    ("rtn-int4-g64", 129, 576),
    ("rtn-int8-g24", 5, 72),
)


@dataclass(frozen=True)
class Layer:
    """A random layer: canonical tensors, bias and its shape."""

    format: Format
    N: int
    K: int
    tensors: dict[str, torch.Tensor]
    bias: torch.Tensor

    def weight(self) -> torch.Tensor:
        """The float64 oracle [N, K]."""
        return self.format.dequantize(self.tensors, torch.float64)


def random_layer(scheme: str, N: int, K: int, dtype=torch.float32, seed: int = 0) -> Layer:
    """A layer with every code extreme present, values exact in ``dtype``."""
    format = parse_scheme(scheme)
    rng = torch.Generator().manual_seed(seed)
    tensors = _RANDOM[type(format)](format, N, K, dtype, rng)
    return Layer(format, N, K, tensors, torch.randn(N, generator=rng).to(dtype))


def _additive(format: AdditiveFormat, N, K, dtype, rng) -> dict[str, torch.Tensor]:
    specs = format.tensor_specs(N, K)
    codes = torch.randint(0, format.entries, specs["codes"].shape, generator=rng)
    half = format.entries // 2
    extremes = torch.tensor([0, format.entries - 1, half, half - 1])
    flat = codes.view(-1)
    flat[: min(4, flat.numel())] = extremes[: flat.numel()]
    codebooks = torch.randn(specs["codebooks"].shape, generator=rng).to(dtype)
    scales = (torch.rand(specs["scales"].shape, generator=rng) + 0.5).to(dtype)
    return {"codes": format.pack_codes(codes), "codebooks": codebooks, "scales": scales}


def _signs(size: int, dtype, rng) -> torch.Tensor:
    """A sign vector as fine-tuning leaves it: not of magnitude 1."""
    signs = torch.randint(0, 2, (size,), generator=rng) * 2 - 1
    return (signs * (torch.rand(size, generator=rng) * 0.5 + 0.75)).to(dtype)


def _e8p(format: E8PFormat, N, K, dtype, rng) -> dict[str, torch.Tensor]:
    words = torch.randint(-(2**63), 2**63 - 1, (N, K * format.bits // 64), generator=rng)
    words.view(-1)[:2] = torch.tensor([0, -1])
    tensors = {
        "Qidxs": words,
        "SU": _signs(K, dtype, rng),
        "SV": _signs(N, dtype, rng),
        "Wscale": torch.rand((), generator=rng) * 0.05 + 0.01,
        "codebook_id": torch.tensor(CODEBOOK_IDS[format.bits]),
    }
    if format.parts:
        tensors["fuse_scales"] = torch.rand(len(format.parts), generator=rng) + 0.5
    return tensors


def _random_codes(bits: int, rows: int, columns: int, rng) -> torch.Tensor:
    codes = torch.randint(0, 1 << bits, (rows, columns), generator=rng)
    codes.view(-1)[: min(2, codes.numel())] = torch.tensor([0, (1 << bits) - 1])[: codes.numel()]
    return codes


def _quip(format: QuipFormat, N, K, dtype, rng) -> dict[str, torch.Tensor]:
    tensors = {
        **format.pack_codes(_random_codes(format.bits, N, K, rng)),
        "SU": _signs(K, dtype, rng),
        "SV": _signs(N, dtype, rng),
        "Wscale": torch.rand((), generator=rng) * 0.05 + 0.01,
    }
    for name, spec in format.tensor_specs(N, K).items():
        size = spec.shape[0] if spec.shape else 0
        if name.endswith(("_B0", "_B1")):
            square = torch.randn(size, size, generator=rng)
            tensors[name] = torch.linalg.qr(square)[0].contiguous()
        elif name.endswith(("_p_in", "_p_out")):
            tensors[name] = torch.randperm(size, generator=rng).int()
    return tensors


def _scalar(format: ScalarFormat, N, K, dtype, rng) -> dict[str, torch.Tensor]:
    groups = K // format.group_size
    codes = _random_codes(format.bits, N, K, rng)
    zeros = _random_codes(format.bits, N, groups, rng)
    scales = ((torch.rand(N, groups, generator=rng) + 0.5) / (1 << format.bits)).to(dtype)
    return {**format.pack_codes(codes, zeros), "scales": scales}


_RANDOM = {AdditiveFormat: _additive, E8PFormat: _e8p, QuipFormat: _quip, ScalarFormat: _scalar}


def random_input(M: int, K: int, dtype=torch.float32, seed: int = 1) -> torch.Tensor:
    """Tokens [M, K] with a few outlier channels, sliced from a larger tensor: rows are misaligned
    and strided."""
    rng = torch.Generator().manual_seed(seed)
    wide = torch.randn(M, K + 5, generator=rng)
    wide[:, :: max(K // 3, 1)] *= 20
    return wide.to(dtype)[:, 3 : 3 + K]


def golden_layer(name: str) -> tuple[AdditiveFormat, dict, dict[str, torch.Tensor]]:
    """(format, spec, tensors) of a golden file; transposed codes are turned upright."""
    with safe_open(GOLDEN / f"{name}.safetensors", "pt") as file:
        spec = json.loads(file.metadata()["spec"])
        tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
    if name.endswith("_transposed"):
        tensors["codes"] = tensors["codes"].transpose(0, 1).contiguous()
    format = AdditiveFormat(
        spec["num_codebooks"],
        spec["nbits_per_codebook"],
        spec["in_group_size"],
        spec["out_group_size"],
    )
    return format, spec, tensors


def golden(name: str) -> dict[str, torch.Tensor]:
    """All tensors of a golden file."""
    return load_file(GOLDEN / f"{name}.safetensors")


def golden_e8p(bits: int) -> dict[str, dict[str, torch.Tensor]]:
    """The golden E8P layers of this width by name, ``{"192x320": tensors}``.

    Some leave out what is 1 or implied by the width; it is added.
    """
    layers: dict[str, dict[str, torch.Tensor]] = {}
    for key, tensor in golden(f"quip_layer_{bits}bit").items():
        name, _, tensor_name = key.partition(".")
        layers.setdefault(name, {})[tensor_name] = tensor
    for tensors in layers.values():
        tensors.setdefault("Wscale", torch.tensor(1.0))
        tensors.setdefault("codebook_id", torch.tensor(CODEBOOK_IDS[bits]))
    return layers
