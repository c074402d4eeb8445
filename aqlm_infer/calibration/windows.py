"""Calibration tokens: windows of one length, drawn from a token file or a text file."""

from __future__ import annotations

import hashlib
from pathlib import Path

import torch

from ..evaluation import load_tokenizer, read_text_file, read_token_file
from ..evaluation.tokens import TokenError


def calibration_windows(
    file: str | Path,
    model: str | Path,
    vocab_size: int,
    *,
    samples: int,
    seq_len: int,
    seed: int,
) -> torch.Tensor:
    """``samples`` different windows of ``seq_len`` tokens, int64 [samples, seq_len].

    A ``.bin`` file holds raw little-endian uint16 ids; anything else is UTF-8 text, encoded with
    the tokenizer stored with ``model``. The stream is cut into windows from its start; which of
    them are taken, and in which order, ``seed`` decides. Raises TokenError when the stream is too
    short or holds an id outside the vocabulary, FileNotFoundError when there is no file.
    """
    file = Path(file)
    if not file.is_file():
        raise FileNotFoundError(2, "no such calibration file", str(file))
    if samples < 1 or seq_len < 2:
        raise TokenError(f"samples={samples}, seq_len={seq_len}: need at least 1 and 2")
    if file.suffix == ".bin":
        ids = read_token_file(file, vocab_size)
    else:
        ids = read_text_file(file, load_tokenizer(model))
        if ids.numel() and int(ids.max()) >= vocab_size:
            raise TokenError(
                f"the tokenizer of {model} gives token id {int(ids.max())}, but the model's"
                f" vocabulary has {vocab_size}: they do not match"
            )
    windows = ids.numel() // seq_len
    if windows < samples:
        raise TokenError(
            f"{file} has {ids.numel()} tokens, {windows} windows of {seq_len}: fewer than the"
            f" {samples} asked for"
        )
    generator = torch.Generator().manual_seed(seed)
    chosen = torch.randperm(windows, generator=generator)[:samples]
    return ids[: windows * seq_len].view(windows, seq_len)[chosen].clone()


def digest(windows: torch.Tensor) -> str:
    """A short hash of the windows, for resume keys."""
    return hashlib.sha256(windows.contiguous().numpy().tobytes()).hexdigest()[:16]
