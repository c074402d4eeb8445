"""``prepare_for_generation``: make a quantized transformers model decode fast, and undo it."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch
from torch import nn

from ..formats import Format
from ..layers import quantized_layers, share_rotations
from .errors import GenerationSetupError
from .head import give_rows, head_format, quantize_head, restore_head, take_rows
from .stack import stack_siblings, unstack

if TYPE_CHECKING:
    from .runner import StepRunner

_ATTRIBUTE = "aqlm_generation"
_OLDEST = (8, 0)
"""Compute capability that the CUDA kernels are built for, or later."""


@dataclass
class Preparation:
    """What ``prepare_for_generation`` did to a model: its attribute ``aqlm_generation``.

    ``stacked`` lists siblings that became one launch, ``rotations`` those that share a rotated
    input. ``runner`` runs the steps; where they are not captured, ``reason`` says why.
    """

    options: dict
    stacked: list[tuple[str, ...]]
    rotations: list[tuple[str, ...]]
    runner: StepRunner | None
    reason: str | None
    head: nn.Linear | None = field(repr=False, default=None)


def prepare_for_generation(
    model: nn.Module,
    *,
    graphs: bool | None = None,
    compile: bool = True,
    lm_head: str | Format | None = None,
    max_length: int | None = None,
    max_graphs: int = 4,
) -> nn.Module:
    """Make ``model.generate`` fast, in place; returns the model.

    Layers that share an input become one launch. On a GPU, steps of one token are captured in CUDA
    graphs, one for each batch size and cache length, when ``generate`` first needs them: greedy
    search and sampling then run them on a static cache. On the CPU the same steps, of known blocks
    (Llama and its like), run their operators one by one. Prompts without padding run in the same
    operators where the model's blocks are known (Llama and its like). Everything else runs as
    before.

    Args:
        model: a transformers causal language model with quantized layers, on its device.
        graphs: capture decode steps; None does where it can be done. True raises where it cannot.
            False launches the operators of every step one by one, where the blocks are known.
        compile: torch.compile the step before it is captured, where the model is none of those
            that have a step of fused operators (Llama and its like). It takes seconds to minutes,
            once for each graph; without it the model's own kernels are captured.
        lm_head: quantize the output head, to ``rtn-int8-g128`` for instance. It is a lossy change.
        max_length: the most positions a cache may have, None for what each call asks for. A longer
            prompt with its new tokens is an error.
        max_graphs: graphs, with their caches, to keep.

    Undone by ``undo_prepare_for_generation``. Saving a prepared model undoes it for that time.
    Raises GenerationSetupError for a model without quantized layers, prepared already, on a mixture
    of devices, on an unsupported GPU, and with a transformers that is too old for it.
    """
    from ..integrations.requirements import GENERATES, too_old

    if reason := too_old(GENERATES):
        raise GenerationSetupError(f"prepare_for_generation {reason}")
    if getattr(model, _ATTRIBUTE, None) is not None:
        raise GenerationSetupError(
            "the model is prepared already: undo_prepare_for_generation(model) first"
        )
    if not any(True for _ in quantized_layers(model)):
        raise GenerationSetupError(
            f"{type(model).__name__} has no quantized layer: there is nothing to prepare"
        )
    if max_graphs < 1 or (max_length is not None and max_length < 2):
        raise GenerationSetupError(
            f"max_graphs={max_graphs}, max_length={max_length}: need at least 1 and at least 2"
        )
    devices = check_devices(model)
    reason = _why_not_captured(model, devices)
    if graphs and reason is not None:
        raise GenerationSetupError(f"graphs=True: decode steps cannot be captured: {reason}")
    if lm_head is not None:
        head_format(model, lm_head)  # an error before anything is changed
    options = {"graphs": graphs, "compile": compile, "lm_head": lm_head, "max_length": max_length,
               "max_graphs": max_graphs}  # fmt: skip
    rotations, stacked = share_rotations(model), stack_siblings(model)
    head = None if lm_head is None else quantize_head(model, lm_head)
    give_rows(_head(model))
    runner = None
    if reason is None:
        runner = _runner(model, max_length, max_graphs, compile, graphs is not False)
        reason = "graphs=False" if graphs is False else None
    elif any(device.type == "cuda" for device in devices):
        warnings.warn(f"decode steps run without CUDA graphs: {reason}", stacklevel=2)
    elif _why_no_steps(model, devices) is None:
        runner = _runner(model, max_length, max_graphs, compile, False)
    prepared = Preparation(options, stacked, rotations, runner, reason, head)
    setattr(model, _ATTRIBUTE, prepared)
    model.save_pretrained = _Saver(model)
    return model


def undo_prepare_for_generation(model: nn.Module) -> nn.Module:
    """Undo ``prepare_for_generation``: layers, head and methods are what they were before.

    Shared rotations stay: they change no result and no saved tensor.
    """
    prepared: Preparation | None = getattr(model, _ATTRIBUTE, None)
    if prepared is None:
        raise GenerationSetupError("the model is not prepared for generation")
    if prepared.runner is not None:
        prepared.runner.uninstall()
    take_rows(_head(model))
    if prepared.head is not None:
        restore_head(model, prepared.head)
    unstack(model)
    del model.save_pretrained
    delattr(model, _ATTRIBUTE)
    return model


class _Saver:
    """``save_pretrained`` of a prepared model: saves what it was before it was prepared."""

    def __init__(self, model: nn.Module):
        self.model = model

    def __call__(self, *args, **kwargs):
        model = self.model
        options = getattr(model, _ATTRIBUTE).options
        undo_prepare_for_generation(model)
        try:
            return model.save_pretrained(*args, **kwargs)
        finally:
            prepare_for_generation(model, **options)


@contextmanager
def captured(
    model: nn.Module, *, compile: bool = True, max_graphs: int = 4
) -> Iterator[StepRunner]:
    """Captured decode steps on any model of transformers, quantized or not, for the block's time.

    Raises GenerationSetupError where a model cannot be captured.
    """
    reason = _why_not_captured(model, check_devices(model))
    if reason is not None:
        raise GenerationSetupError(f"decode steps cannot be captured: {reason}")
    runner = _runner(model, None, max_graphs, compile, True)
    try:
        yield runner
    finally:
        runner.uninstall()


def _runner(
    model: nn.Module, max_length: int | None, max_graphs: int, compile: bool, capture: bool
) -> StepRunner | None:
    """A runner in the model's place; None for steps that would be the model's own, uncaptured."""
    from .llama import why_not_llama
    from .runner import StepRunner

    if not capture and why_not_llama(model) is not None:
        return None
    runner = StepRunner(model, max_length, max_graphs, compile, capture)
    runner.install()
    return runner


def check_devices(model: nn.Module) -> set[torch.device]:
    """The devices of the model's tensors, checked: GenerationSetupError names what cannot work."""
    devices = {t.device for t in (*model.parameters(), *model.buffers())}
    kinds = sorted({device.type for device in devices})
    names = ", ".join(sorted(map(str, devices)))
    if "meta" in kinds:
        raise GenerationSetupError("the model has tensors on the meta device: load it whole first")
    if len(kinds) > 1:
        raise GenerationSetupError(
            f"the model is spread over {names}: move it to one kind of device first"
        )
    if kinds == ["cuda"]:
        for device in devices:
            check_capability(torch.cuda.get_device_capability(device), str(device))
    return devices


def check_capability(capability: tuple[int, int], device: str) -> None:
    """Raise GenerationSetupError for a GPU that the CUDA kernels are not built for."""
    if capability < _OLDEST:
        raise GenerationSetupError(
            f"{device} has compute capability {capability[0]}.{capability[1]}; the kernels are"
            f" built for {_OLDEST[0]}.{_OLDEST[1]} and later"
        )


def _head(model: nn.Module) -> nn.Module | None:
    return getattr(model, "get_output_embeddings", lambda: None)()


def _why_not_captured(model: nn.Module, devices) -> str | None:
    """Reason why decode steps of the model cannot be captured in a CUDA graph, or None."""
    if any(device.type != "cuda" for device in devices):
        return f"the model is on {', '.join(sorted(map(str, devices)))}, graphs need a CUDA device"
    return _why_no_steps(model, devices)


def _why_no_steps(model: nn.Module, devices) -> str | None:
    """Reason why decode steps of the model cannot run on a static cache, or None."""
    if len(devices) > 1:
        return f"the model is on {len(devices)} devices, a graph runs on one"
    from transformers import GenerationMixin

    from ..integrations.moe import QuantExperts
    from .cache import why_not_static

    if not isinstance(model, GenerationMixin):
        return f"{type(model).__name__} is no transformers model that generates"
    if any(isinstance(module, QuantExperts) for module in model.modules()):
        return "experts are chosen on the host"
    if not getattr(model, "_can_compile_fullgraph", False):
        return f"{type(model).__name__} is marked as one that cannot be compiled as one graph"
    return why_not_static(model.config)
