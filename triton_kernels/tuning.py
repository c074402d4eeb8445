"""Launch configurations: measured ones per device from ``configs/``, else defaults.

``configs/<device>.json`` maps a kernel id to rows ``{"scheme", "N", "K", "M", "config"}``, written
by ``benchmarks/tune_triton.py``. Nothing is tuned at run time: a call takes the row of its scheme
whose shape is nearest, and a device without a file takes the defaults.
"""

from __future__ import annotations

import functools
import json
import math
from importlib import resources

import torch

DEFAULTS: dict[str, dict[str, int]] = {
    "additive.dot": {
        "BLOCK_N": 64, "BLOCK_K": 64, "PROGRAMS": 1056, "num_warps": 4, "num_stages": 2,
    },
    "additive.lookup": {"BLOCK_N": 512, "GROUPS": 8, "PROGRAMS": 2112, "num_warps": 4},
    "additive.dequantize": {"BLOCK_N": 32, "BLOCK_K": 128, "num_warps": 4},
}  # fmt: skip


def device_name() -> str:
    """File name of the current device's table, such as ``nvidia-h200``."""
    if not torch.cuda.is_available():
        return "interpreter"
    return torch.cuda.get_device_name().lower().replace(" ", "-")


@functools.cache
def _table(device: str) -> dict[str, list[dict]]:
    file = resources.files(__package__).joinpath("configs", f"{device}.json")
    return json.loads(file.read_text()) if file.is_file() else {}


@functools.cache
def config(kernel: str, scheme: str, N: int, K: int, M: int) -> dict[str, int]:
    """The configuration of ``kernel`` for a [N, K] weight in ``scheme`` and M tokens."""
    rows = [row for row in _table(device_name()).get(kernel, ()) if row["scheme"] == scheme]
    if not rows:
        return DEFAULTS[kernel]

    def distance(row: dict) -> float:
        pairs = ((row["N"], N), (row["K"], K), (max(row["M"], 1), max(M, 1)))
        return sum(abs(math.log2(a / b)) for a, b in pairs)

    return {**DEFAULTS[kernel], **min(rows, key=distance)["config"]}
