"""A plan for a target in average bits: measured on the dense model, before any quantization."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from ..evaluation import load_model
from ..layers import PlanError, plan_layers
from .mixed import best_plan, choices, scheme_errors, sensitivities
from .windows import calibration_windows

TOKENS = 4096
"""Most calibration tokens that sensitivities are measured on."""


def plan_for_bits(
    model: str | Path,
    schemes: Sequence[str],
    target: float,
    calibration: str | Path,
    *,
    samples: int,
    seq_len: int,
    skip: Sequence[str] | None = None,
    seed: int = 0,
    device: str = "cpu",
    progress: bool = False,
) -> dict[str, str]:
    """{layer: scheme} with at most ``target`` bits a weight on average, from ``schemes``.

    Unlike the quantization itself, this holds the whole dense model on the device: one forward a
    layer. Raises PlanError for fewer than two schemes or a target that they cannot reach,
    TokenError for calibration data that does not do.
    """
    if len(set(schemes)) < 2:
        raise PlanError("a target in bits needs at least two schemes to choose from")
    dense = load_model(model, None, device)
    vocab = dense.get_input_embeddings().num_embeddings
    samples = max(1, min(samples, TOKENS // seq_len))
    windows = calibration_windows(
        calibration, model, vocab, samples=samples, seq_len=seq_len, seed=seed
    )
    chosen = _fitting(dense, schemes, skip)
    weights = sum(N * K for N, K in chosen.values())
    smallest = dict.fromkeys(chosen, 1.0)
    flat = choices(chosen, schemes, smallest, dict.fromkeys(schemes, 1.0))
    best_plan(flat, weights, target)  # a target out of reach is refused before the measurement
    measured = sensitivities(dense, list(chosen), windows, seed, progress)
    table = choices(chosen, schemes, measured, scheme_errors(schemes, seed))
    return best_plan(table, weights, target)


def _fitting(model, schemes: Sequence[str], skip) -> dict[str, tuple[int, int]]:
    """Shapes of the layers that at least one of the schemes takes."""
    found, reason = {}, None
    for scheme in schemes:
        try:
            names = plan_layers(model, scheme, skip)
        except PlanError as error:
            reason = error
            continue
        for name in names:
            linear = model.get_submodule(name)
            found[name] = (linear.out_features, linear.in_features)
    if not found:
        raise reason or PlanError("no layer to quantize")
    return found
