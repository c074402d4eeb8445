"""The optimiser of a run: one for all masters, from one gradient."""

from __future__ import annotations

import torch

from .lamb import Lamb
from .settings import TuneSettings
from .student import Student

BETAS, CODE_BETAS = (0.9, 0.95), (0.0, 0.95)
"""Of values and other parameters; of the buffers, which have no first moment."""


def make_optimizer(student: Student, settings: TuneSettings) -> torch.optim.Optimizer:
    """LAMB, or torch's Adam, on the masters that this rank owns.

    Adam has a group for every tensor, since its steps are relative to the tensor's rms.
    """
    rule, lamb = settings.rule, settings.optimizer == "lamb"
    groups: list[dict] = []
    for master in student.masters():
        group = {"lr": settings.lr, "betas": BETAS}
        if master.buffer:
            group = {"lr": rule.code_lr, "betas": CODE_BETAS}
        if lamb:
            group["debias"] = rule.warm_up if master.buffer else True
            group["stacked"] = master.stacked
        else:
            size = float(master.parameter.detach().double().square().mean().sqrt())
            group["lr"] *= size or 1.0
        like = [g for g in groups if {**g, "params": None} == {**group, "params": None}]
        if like:
            like[0]["params"].append(master.parameter)
        else:
            groups.append({**group, "params": [master.parameter]})
    for group in groups:
        group["first_lr"] = group["lr"]
    return (Lamb if lamb else torch.optim.Adam)(groups)


def set_rate(optimizer: torch.optim.Optimizer, factor: float) -> None:
    """Make every learning rate ``factor`` of what it was at the start."""
    for group in optimizer.param_groups:
        group["lr"] = group["first_lr"] * factor
