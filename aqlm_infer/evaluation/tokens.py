"""Token streams to evaluate on: files of uint16 ids, or text files encoded with the tokenizer."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch

SEPARATOR = "<|endoftext|>"
"""A line of a text file that separates documents."""


class TokenError(ValueError):
    """Tokens that cannot be evaluated."""


def read_token_file(path: str | Path, vocab_size: int) -> torch.Tensor:
    """The ids of a raw little-endian uint16 file, as int64.

    Raises FileNotFoundError, or TokenError on an odd number of bytes or an id outside the
    vocabulary.
    """
    path = Path(path)
    size = path.stat().st_size
    if size % 2:
        raise TokenError(f"{path} has {size} bytes, an odd number: not uint16 token ids")
    ids = np.fromfile(path, dtype="<u2").astype(np.int64)
    if ids.size and int(ids.max()) >= vocab_size:
        where = int(ids.argmax())
        raise TokenError(
            f"{path} holds token id {ids[where]} at position {where}, but the model's vocabulary"
            f" has {vocab_size}"
        )
    return torch.from_numpy(ids)


def read_text_file(path: str | Path, tokenizer) -> torch.Tensor:
    """The ids of a UTF-8 text file, as int64.

    Documents are separated by a line ``<|endoftext|>``; each is encoded without special tokens and
    put between the tokenizer's begin and end tokens, where it has them. Raises FileNotFoundError,
    or TokenError when the file is not UTF-8.
    """
    path = Path(path)
    try:
        text = path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise TokenError(f"{path} is not UTF-8 text: {error}") from error
    first = [] if tokenizer.bos_token_id is None else [tokenizer.bos_token_id]
    last = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
    ids: list[int] = []
    for document in text.split(f"\n{SEPARATOR}\n"):
        encoded = tokenizer(document, add_special_tokens=False, verbose=False).input_ids
        ids += [*first, *encoded, *last]
    return torch.tensor(ids, dtype=torch.int64)
