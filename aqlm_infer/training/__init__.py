"""PV-Tuning (arXiv 2405.14852): train a quantized model's values and choose its codes, end to end.

``tune_checkpoint`` is the function behind ``aqlm-infer tune``; ``Trainer`` the loop on models in
memory. A format that offers a ``Representation`` can be tuned: ``families.REPRESENTATIONS``.
"""

from .data import read_windows
from .job import TuneReport, tune_checkpoint
from .lamb import Lamb
from .representation import Representation, TuningError, represent
from .runs import RunFolder
from .settings import METHODS, Method, TuneSettings
from .student import Student
from .trainer import NotFinite, Trainer, TuneResult

__all__ = [
    "METHODS",
    "Lamb",
    "Method",
    "NotFinite",
    "Representation",
    "RunFolder",
    "Student",
    "Trainer",
    "TuneReport",
    "TuneResult",
    "TuneSettings",
    "TuningError",
    "read_windows",
    "represent",
    "tune_checkpoint",
]
