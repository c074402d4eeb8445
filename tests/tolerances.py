"""Named error bounds. A global score hides one bad row: every check is global and elementwise."""

from __future__ import annotations

import torch

# Relative 2-norm against float64. "exact" on CPU uses 16-bit look-up tables with one scale a chunk:
# the bound is 5e-4; measured errors are about 1e-5 (see csrc/cpu/README.md).
RELATIVE = {
    ("exact", torch.float32): 2e-4,
    ("exact", torch.float16): 1e-3,
    ("exact", torch.bfloat16): 8e-3,
    ("fast", torch.float32): 3e-2,
    ("fast", torch.float16): 3e-2,
    ("fast", torch.bfloat16): 3e-2,
}

# One element may be off by this many bounds of its token's largest row: look-up tables are rounded
# to a step that their largest entry sets, so a row of small weights carries the same error.
ELEMENTWISE_FACTOR = 8.0


def assert_close(y, expected, x, weight, dtype, precision="exact"):
    """Compare y [M, N] with the float64 ``expected`` = x W^T + bias, as a whole and one by one."""
    bound = RELATIVE[precision, dtype]
    y, expected = y.double(), expected.double()
    assert y.shape == expected.shape, f"shape {list(y.shape)} vs {list(expected.shape)}"
    assert torch.isfinite(y).all(), "output is not finite"
    if not y.numel():
        return
    error = (y - expected).norm() / expected.norm()
    assert error <= bound, f"relative error {error:.2e} > {bound:.0e} ({precision}, {dtype})"
    # The error of a sum of K terms scales with the root of the summed squares of its terms.
    spread = (x.double().square() @ weight.double().square().T).sqrt() + expected.abs()
    worst = ((y - expected).abs() / spread.amax(1, keepdim=True)).max()
    limit = bound * ELEMENTWISE_FACTOR
    assert worst <= limit, f"one element is off by {worst:.2e} of the largest row > {limit:.0e}"
