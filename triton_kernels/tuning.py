"""Which body a matmul runs and how it is launched: measured rows per device, else defaults.

``configs/<device>.json`` maps a family to rows ``{"scheme", "N", "K", "M", "us", "config"}``,
written by ``benchmarks/tune_triton.py``; a config names the body. Nothing is tuned at run time: a
call takes the row of its scheme whose shape is nearest among those with as many tokens (1, up to
16, 32, 64).
"""

from __future__ import annotations

import functools
import json
import math
from collections.abc import Iterator
from contextlib import contextmanager
from importlib import resources

import torch

Config = dict[str, int | str]

DEFAULTS: dict[str, Config] = {
    "additive.gemv": {
        "BLOCK_N": 256, "BLOCK_G": 4, "FILL": 0, "PROGRAMS": 2112, "num_warps": 4, "num_stages": 1,
    },
    "additive.lookup": {"BLOCK_N": 512, "GROUPS": 8, "FILL": 0, "PROGRAMS": 2112, "num_warps": 4},
    "additive.words_dot": {
        "BLOCK_M": 16, "WIDTH": 1, "Q": 8, "BOOKS": 1, "COPIES": 1, "FIRST": 0,
        "DEALT": 0, "FILL": 0, "PROGRAMS": 1056, "num_warps": 4, "num_stages": 1,
    },
    "additive.planes_dot": {
        "WIDTH": 4, "Q": 4, "PROGRAMS": 132, "num_warps": 16,
    },
    "additive.dot": {
        "BLOCK_M": 16, "BLOCK_N": 128, "BLOCK_K": 128, "FILL": 0, "PROGRAMS": 2112, "num_warps": 4,
        "num_stages": 1,
    },
    "e8p.gemv": {
        "BLOCK_N": 64, "BLOCK_G": 32, "SHARED": 1, "FILL": 0, "PROGRAMS": 2112, "num_warps": 4,
        "num_stages": 1,
    },
    "e8p.integers": {
        "BLOCK_N": 64, "BLOCK_G": 32, "SHARED": 1, "COPIES": 0, "FILL": 0, "PROGRAMS": 2112,
        "num_warps": 4, "num_stages": 1,
    },
    "e8p.integer_dot": {
        "BLOCK_M": 32, "BLOCK_N": 128, "COPIES": 1, "FILL": 0, "PROGRAMS": 1056, "num_warps": 4,
        "num_stages": 1,
    },
    "e8p.first_dot": {
        "BLOCK_N": 128, "COPIES": 1, "FILL": 0, "PROGRAMS": 528, "num_warps": 8, "num_stages": 2,
    },
    "e8p.dot": {
        "BLOCK_M": 16, "BLOCK_N": 64, "BLOCK_G": 16, "FIRST": 1, "SHARED": 0, "FILL": 0,
        "PROGRAMS": 2112, "num_warps": 4, "num_stages": 1,
    },
    "scalar.gemv": {"BLOCK_N": 64, "FILL": 0, "PROGRAMS": 2112, "num_warps": 4, "num_stages": 1},
    "scalar.integers": {
        "BLOCK_N": 64, "FILL": 0, "PROGRAMS": 2112, "num_warps": 4, "num_stages": 1,
    },
    "scalar.integer_dot": {
        "BLOCK_M": 64, "BLOCK_N": 128, "FILL": 0, "PROGRAMS": 1056, "num_warps": 4, "num_stages": 1,
    },
    "scalar.first_dot": {
        "BLOCK_N": 128, "FILL": 0, "PROGRAMS": 528, "num_warps": 8, "num_stages": 3,
    },
    "scalar.dot": {
        "BLOCK_M": 16, "BLOCK_N": 64, "BLOCK_K": 128, "FIRST": 1, "FILL": 0,
        "PROGRAMS": 1056, "num_warps": 4, "num_stages": 1,
    },
}  # fmt: skip
"""By body, for devices and schemes without a row."""

DOT_TOKENS = 64
"""The most tokens of a decode body; more of them multiply with a decoded weight."""

_forced: list[Config] = []


def token_block(M: int) -> int:
    """Tokens of a tile for up to 64: 1, 16, 32 or 64. (By comparisons: M may be symbolic.)"""
    if M == 1:
        return 1
    return 16 if M <= 16 else 32 if M <= 32 else 64


def token_rows(config: Config, M: int) -> int:
    """Rows of a dot's tile of tokens: the config's (at least 16), or more for more tokens."""
    return max(config["BLOCK_M"], token_block(M))


def token_part(config: Config, M: int) -> int:
    """Tokens of a program whose weights go from registers into MMAs: the config's, or fewer."""
    return min(config["BLOCK_M"], max(16, token_block(M)))


def device_name() -> str:
    """File name of the current device's table, such as ``nvidia-h200``."""
    if not torch.cuda.is_available():
        return "interpreter"
    return torch.cuda.get_device_name().lower().replace(" ", "-")


@functools.cache
def table(device: str) -> dict[str, list[dict]]:
    """The measured rows of a device by family; empty for a device without a file."""
    file = resources.files(__package__).joinpath("configs", f"{device}.json")
    return json.loads(file.read_text()) if file.is_file() else {}


def nearest(rows: list[dict], scheme: str, N: int, K: int, M: int) -> Config | None:
    """The config of the scheme's nearest shape among rows with M's block of tokens, or None."""
    fits = [r for r in rows if r["scheme"] == scheme and token_block(r["M"]) == token_block(M)]
    if not fits:
        return None
    return min(fits, key=lambda r: abs(math.log2(r["N"] / N)) + abs(math.log2(r["K"] / K)))[
        "config"
    ]


@functools.cache
def _measured(device: str, family: str, scheme: str, N: int, K: int, M: int) -> Config | None:
    return nearest(table(device).get(family, []), scheme, N, K, M)


def config(family: str, scheme: str, N: int, K: int, M: int, body: str) -> Config:
    """The config, with its ``body``, for a [N, K] weight in ``scheme`` and a block of M tokens.

    ``body`` is the one to run where no row was measured.
    """
    found = _forced[-1] if _forced else _measured(device_name(), family, scheme, N, K, M)
    body = found["body"] if found else body
    return {**DEFAULTS[f"{family}.{body}"], **(found or {}), "body": body}


def default(name: str) -> Config:
    """The default config of ``family.body``."""
    return {**DEFAULTS[name], "body": name.split(".")[1]}


@contextmanager
def forced(config: Config) -> Iterator[None]:
    """Run every matmul with one config: for the tuner and for tests."""
    _forced.append(config)
    try:
        yield
    finally:
        _forced.pop()


def launch_options(config: Config) -> dict[str, int]:
    """The keywords of a launch that Triton itself reads."""
    return {name: config[name] for name in ("num_warps", "num_stages") if name in config}
