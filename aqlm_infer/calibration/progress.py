"""The progress bar of a calibrated quantization: which layer, the last one's error, time to go."""

from __future__ import annotations

import time

from tqdm import tqdm


class ProgressBar:
    """Counts weights, so that the estimate of the time to go holds between unlike layers.

    Blocks of an interrupted run are counted as done, but not as work: the estimate starts with the
    first block that is quantized.
    """

    def __init__(self, blocks: int, weights: int, enabled: bool):
        self.blocks, self.errors = blocks, ""
        self.bar = tqdm(
            total=weights, desc="quantize", unit=" weights", unit_scale=True, smoothing=0,
            disable=not enabled,
        )  # fmt: skip

    def __enter__(self) -> ProgressBar:
        return self

    def __exit__(self, *_) -> None:
        self.bar.close()

    def block(self, index: int) -> None:
        """Block ``index``, or the output head after the last, comes next."""
        self.bar.set_description_str(f"block {index + 1}/{self.blocks}")

    def reused(self, weights: int) -> None:
        """The block was there already."""
        if not self.bar.disable:
            self.bar.initial += weights
            self.bar.start_t = time.time()
        self.bar.update(weights)

    def begin(self, name: str) -> None:
        """A layer's turn; the error shown is that of the layer before."""
        self.bar.set_postfix_str(f"{self.errors}now {name}")

    def layer(self, name: str, weights: int, error: float) -> None:
        """A layer is done."""
        self.errors = f"{name} error {error:.4f}, "
        self.bar.update(weights)

    def tuning(self, epoch: int, epochs: int, error: float) -> None:
        """An epoch of fine-tuning is done, with this error of the block's outputs."""
        self.bar.set_postfix_str(f"fine-tuning {epoch}/{epochs}, output error {error:.5f}")
