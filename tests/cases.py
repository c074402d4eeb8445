"""What the tests run over: schemes, shapes by failure mode, and random layers. Never zeros."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import safe_open

from aqlm_infer.formats import AdditiveFormat, parse_scheme

GOLDEN = Path(__file__).parent / "golden"
GOLDEN_LAYERS = sorted(p.stem for p in GOLDEN.glob("aqlm_*.safetensors"))

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


@dataclass(frozen=True)
class Layer:
    """A random layer: canonical tensors, bias and its shape."""

    format: AdditiveFormat
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
    specs = format.tensor_specs(N, K)
    codes = torch.randint(0, format.entries, specs["codes"].shape, generator=rng)
    half = format.entries // 2
    extremes = torch.tensor([0, format.entries - 1, half, half - 1])
    flat = codes.view(-1)
    flat[: min(4, flat.numel())] = extremes[: flat.numel()]
    codebooks = torch.randn(specs["codebooks"].shape, generator=rng).to(dtype)
    scales = (torch.rand(specs["scales"].shape, generator=rng) + 0.5).to(dtype)
    bias = torch.randn(N, generator=rng).to(dtype)
    tensors = {"codes": format.pack_codes(codes), "codebooks": codebooks, "scales": scales}
    return Layer(format, N, K, tensors, bias)


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
