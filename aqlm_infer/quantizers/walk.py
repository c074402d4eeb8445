"""A step repeated over blocks of columns: on a GPU recorded once and replayed as a CUDA graph.

A step is some 50 small operations for each of thousands of blocks. Launched one by one they set the
pace, not their arithmetic (docs/notes/quantizers.md).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch


class Walk:
    """Calls ``step(block)`` for one block after another.

    Args:
        step: gets the number of a block, int64 [1] on the device, and works on tensors that stay
            where they are between calls. It must not wait for the device, and everything that
            differs between blocks must come from tensors: it is recorded at the second block.
        device: of those tensors.
    """

    def __init__(self, step: Callable[[torch.Tensor], None], device: torch.device):
        self.step, self.device = step, torch.device(device)
        self.graph: torch.cuda.CUDAGraph | None = None
        self.warm = False
        self.block = torch.zeros(1, dtype=torch.int64, device=device)

    def __call__(self, blocks: Sequence[int]) -> None:
        for block in torch.tensor(blocks, device=self.device).split(1):
            if self.device.type != "cuda" or not self.warm:
                # The first call runs as it is, so that libraries are loaded before the recording.
                self.step(block)
                self.warm = True
                continue
            self.block.copy_(block)
            if self.graph is None:
                self._record()
            self.graph.replay()

    def _record(self) -> None:
        self.graph = torch.cuda.CUDAGraph()
        # torch's own stream for captures is of the device that a process captured on first.
        with torch.cuda.device(self.device):
            stream = torch.cuda.Stream()
            with torch.cuda.graph(self.graph, stream=stream):
                self.step(self.block)


def columns_of(matrix: torch.Tensor, block: torch.Tensor, size: int) -> torch.Tensor:
    """Columns of a block, [rows, size], copied out of a contiguous [rows, blocks * size]."""
    return matrix.view(len(matrix), -1, size).index_select(1, block)[:, 0]


def rows_of(matrix: torch.Tensor, block: torch.Tensor, size: int) -> torch.Tensor:
    """Rows of a block, [size, columns], copied out of a contiguous [blocks * size, columns]."""
    return matrix.view(-1, size, matrix.shape[1]).index_select(0, block)[0]


def set_columns(
    matrix: torch.Tensor, block: torch.Tensor, size: int, columns: torch.Tensor
) -> None:
    """Write ``columns`` [rows, size] where :func:`columns_of` reads."""
    matrix.view(len(matrix), -1, size).index_copy_(1, block, columns[:, None])
