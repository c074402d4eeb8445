"""Token windows of a run: read, cut, and drawn in an order that depends on the seed alone."""

from __future__ import annotations

from pathlib import Path

import torch

from ..evaluation import load_tokenizer, read_text_file, read_token_file
from .representation import TuningError


def read_windows(path: Path, model: str, vocab_size: int, seq_len: int) -> torch.Tensor:
    """The file's non-overlapping windows [n, seq_len], int64; the tail is dropped.

    A ``.bin`` file is raw uint16 ids, any other UTF-8 text for the tokenizer of ``model``. Raises
    TuningError when there is not one window, TokenError for a file that is not what it should be.
    """
    if path.suffix == ".bin":
        ids = read_token_file(path, vocab_size)
    else:
        ids = read_text_file(path, load_tokenizer(model))
        if ids.numel() and int(ids.max()) >= vocab_size:
            raise TuningError(f"{path} encodes to id {int(ids.max())}, beyond {vocab_size}")
    count = ids.numel() // seq_len
    if not count:
        raise TuningError(f"{path} has {ids.numel()} tokens, not one window of {seq_len}")
    return ids[: count * seq_len].view(count, seq_len)


class Order:
    """Windows of each step: one shuffle after another of all of them, without a remainder lost.

    The windows of a step depend on (count, batch, seed, step) alone, so nothing is to be saved.
    Raises TuningError when there are fewer windows than a batch takes.
    """

    def __init__(self, count: int, batch: int, seed: int):
        if count < batch:
            raise TuningError(f"the data has {count} windows, too few for a batch of {batch}")
        self.count, self.batch, self.seed = count, batch, seed

    def _shuffle(self, epoch: int) -> list[int]:
        generator = torch.Generator().manual_seed(self.seed * 1_000_003 + epoch)
        return torch.randperm(self.count, generator=generator).tolist()

    def __getitem__(self, step: int) -> torch.Tensor:
        """Window numbers [batch] of a step."""
        epoch, place = divmod(step * self.batch, self.count)
        chosen = self._shuffle(epoch)[place : place + self.batch]
        if len(chosen) < self.batch:
            chosen += self._shuffle(epoch + 1)[: self.batch - len(chosen)]
        return torch.tensor(chosen)

    def epochs(self, steps: int) -> float:
        """How often so many steps go through the data."""
        return steps * self.batch / self.count
