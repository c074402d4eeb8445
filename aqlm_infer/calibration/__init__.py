"""From a checkpoint to a quantized one: data-free, or calibrated block by block.

Quantizers see one weight; this package gives them weights, second moments and a place to resume.
"""

from .datafree import JobError, QuantizeReport, quantize_checkpoint
from .driver import quantize_calibrated
from .report import CalibratedReport
from .target import plan_for_bits
from .tune import TuneOptions

__all__ = [
    "CalibratedReport",
    "JobError",
    "QuantizeReport",
    "TuneOptions",
    "plan_for_bits",
    "quantize_calibrated",
    "quantize_checkpoint",
]
