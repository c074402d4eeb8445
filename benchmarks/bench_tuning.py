"""What does each way of tuning a quantized model gain, from the same data, steps and seeds?

Tunes every quantized MODEL by every method against the dense --teacher. Code learning rate and
trust ratio are chosen by method on the validation tokens (first seed, grids below), then every seed
runs with them, and the test tokens are read once. Windows are paired between arms: the summary has
a bootstrap over them of each method against ``continuous``. Finished runs are kept in --work and
not repeated; an interrupted one goes on.
"""

from __future__ import annotations

import argparse
import json
import math
from dataclasses import asdict
from pathlib import Path

import numpy as np
import torch
from bench_quality import with_dense_weights
from torch import nn

from aqlm_infer.bench.record import environment
from aqlm_infer.evaluation import load_model, read_token_file
from aqlm_infer.training import METHODS, RunFolder, TuneSettings, TuningError, tune_checkpoint
from aqlm_infer.training.job import run_folder
from aqlm_infer.training.loss import score

NONE = 0.0
"""Of a trust ratio: no limit."""


def grid(rates: tuple[float, ...], trust: tuple[float, ...] = ()) -> tuple[dict[str, float], ...]:
    """Settings to try: every code learning rate, with every trust ratio where there are some."""
    limits = [{"trust_ratio": t} for t in trust] or [{}]
    return tuple({"code_lr": rate, **limit} for rate in rates for limit in limits)


GRIDS = {
    "continuous": ({},),
    "naive-pv": grid((3e-3,)),
    "pv": grid((0.1, 0.3, 1.0), (1e-2, NONE)),
    "pv-ste": grid((3e-3, 1e-2, 3e-2), (1e-2, NONE)),
    "ste": grid((1e-3, 3e-3, 1e-2)),
    "stochastic": grid((1e-3, 3e-3, 1e-2)),
}
"""What is tried by method; a method that is not here has the grid of ste."""


def tune(arguments, model: Path, method: str, choice: dict[str, float], seed: int) -> tuple:
    """One run with the settings of a grid's point: (checkpoint folder, report)."""
    lamb = arguments.optimizer == "lamb" and METHODS[method].moves_codes
    settings = TuneSettings(
        method=method,
        steps=arguments.steps,
        batch=arguments.batch,
        microbatch=arguments.microbatch,
        seq_len=arguments.window,
        optimizer=arguments.optimizer,
        lr=arguments.lr,
        warm_up=False if lamb else None,
        beam=arguments.beam,
        ranking=arguments.ranking,
        seed=seed,
        eval_every=arguments.eval_every,
        save_every=100,
        valid_windows=arguments.valid_windows,
        **choice,
    )
    values = "".join(f"-{value:g}" for value in choice.values())
    out = arguments.work / f"{model.name}-{method}{values}-s{seed}-n{arguments.steps}"
    kept = run_folder(out) / "report.json"
    if not kept.is_file():
        report = tune_checkpoint(
            model,
            out,
            arguments.data,
            arguments.valid,
            settings,
            teacher=arguments.teacher,
            device=arguments.device,
            resume=bool(RunFolder(run_folder(out)).checkpoints()),
            progress=True,
        )
        kept.write_text(json.dumps({**asdict(report), "settings": asdict(settings)}, indent=2))
    return out, json.loads(kept.read_text())


@torch.no_grad()
def window_losses(model: nn.Module, arguments, path: Path) -> list[float]:
    """Mean negative log-likelihood of each window of a token file."""
    ids = read_token_file(path, model.get_input_embeddings().num_embeddings)
    count = ids.numel() // arguments.window
    windows = ids[: count * arguments.window].view(count, -1)
    return [round(score(model, None, w[None], 1, 4096)["nll"], 6) for w in windows]


def summary(losses: np.ndarray, baseline: np.ndarray | None, dense: np.ndarray) -> dict:
    """Perplexity of one method, [seeds, windows], and its paired ratios.

    ``ratio`` is to the dense model, ``gain`` to the baseline (below 1 is better), with 95 %
    intervals of 10,000 draws of windows, each the mean over seeds.
    """
    draws = np.random.default_rng(0).integers(0, losses.shape[1], (10_000, losses.shape[1]))
    means = losses.mean(0)
    found = {
        "ppl": math.exp(means.mean()),
        "ppl_by_seed": [math.exp(m) for m in losses.mean(1)],
    }
    pairs = {"ratio": dense} | ({} if baseline is None else {"gain": baseline.mean(0)})
    for name, other in pairs.items():
        difference = means - other
        low, high = np.quantile(difference[draws].mean(1), [0.025, 0.975])
        found[name] = [math.exp(d) for d in (difference.mean(), low, high)]
    return found


def compare(arguments, model: Path, dense: dict[str, list[float]]) -> list[dict]:
    """All methods on one quantized model: a row each."""
    rows, baseline = [], {}
    for method in arguments.method:
        points = GRIDS.get(method, GRIDS["ste"])
        try:
            tried = [tune(arguments, model, method, one, arguments.seed[0])[1] for one in points]
        except TuningError as error:
            print(f"{model.name} {method}: not run, {error}", flush=True)
            continue
        found = [t["run"]["best"]["kl"] for t in tried]
        best = points[found.index(min(found))]
        runs = [tune(arguments, model, method, best, seed) for seed in arguments.seed]
        row = {
            "model": model.name,
            "method": method,
            "bits": runs[0][1]["bits_per_weight"],
            "settings": best,
            "tried": [{**one, "valid_kl": kl} for one, kl in zip(points, found, strict=True)],
            "valid_kl": [r["run"]["best"]["kl"] for _, r in runs],
            "first_kl": runs[0][1]["run"]["first"]["kl"],
            "flips": [r["run"]["flips"] for _, r in runs],
            "best_step": [r["run"]["best"]["step"] for _, r in runs],
            "seconds": [r["run"]["seconds"] for _, r in runs],
            "test": {},
        }
        models = [with_dense_weights(load_model(out)).to(arguments.device) for out, _ in runs]
        for path in arguments.test:
            losses = np.array([window_losses(m, arguments, path) for m in models])
            if method == "continuous":
                baseline[path.name] = losses
            row["test"][path.name] = summary(losses, baseline.get(path.name), dense[path.name])
            print(f"{model.name} {method} {path.name}: {row['test'][path.name]}", flush=True)
        rows.append(row)
    return rows


def plot(rows: list[dict], path: Path) -> None:
    """Perplexity over the dense one by method, a group of bars a model and test file."""
    from aqlm_infer.training.curves import plotting

    pyplot = plotting()
    cases = sorted({(r["model"], name) for r in rows for name in r["test"]})
    methods = list(dict.fromkeys(r["method"] for r in rows))
    figure, axes = pyplot.subplots(figsize=(2 + 2.5 * len(cases), 5))
    width = 0.8 / len(methods)
    for place, method in enumerate(methods):
        for x, (model, name) in enumerate(cases):
            found = [r for r in rows if (r["model"], r["method"]) == (model, method)]
            if not found or name not in found[0]["test"]:
                continue
            ratio, low, high = found[0]["test"][name]["ratio"]
            axes.bar(
                x + place * width, ratio - 1, width, bottom=1, color=f"C{place}",
                yerr=[[ratio - low], [high - ratio]], label=None if x else method,
            )  # fmt: skip
    axes.set_xticks([x + 0.4 for x in range(len(cases))], [f"{m}\n{n}" for m, n in cases])
    axes.set_ylabel("perplexity over the dense model's")
    axes.legend()
    figure.tight_layout()
    figure.savefig(path, dpi=120)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", type=Path, nargs="+", help="quantized checkpoint folders")
    parser.add_argument("--teacher", type=Path, required=True, help="the dense checkpoint")
    parser.add_argument("--data", type=Path, required=True, help="training tokens, .bin")
    parser.add_argument("--valid", type=Path, required=True, help="tokens to choose by, .bin")
    parser.add_argument("--test", type=Path, nargs="*", default=[], help="tokens to report, .bin")
    parser.add_argument("--out", type=Path, required=True, help="JSON file, and FILE.png beside it")
    parser.add_argument("--work", type=Path, required=True, help="folder for runs")
    parser.add_argument("--method", nargs="+", choices=list(METHODS), default=list(GRIDS))
    parser.add_argument("--seed", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--batch", type=int, default=64, help="windows a step")
    parser.add_argument("--microbatch", type=int, help="windows at once")
    parser.add_argument("--window", type=int, default=512)
    parser.add_argument("--optimizer", default="lamb")
    parser.add_argument("--lr", type=float, default=3e-4)
    parser.add_argument("--beam", type=int, default=4)
    parser.add_argument("--ranking", default="residual")
    parser.add_argument("--eval-every", type=int, default=25)
    parser.add_argument("--valid-windows", type=int)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--plot", action="store_true", help="needs matplotlib")
    arguments = parser.parse_args()
    arguments.work.mkdir(parents=True, exist_ok=True)
    arguments.method.sort(key=lambda m: m != "continuous")  # the baseline first
    teacher = load_model(arguments.teacher, torch.float32, arguments.device)
    losses = {p.name: np.array(window_losses(teacher, arguments, p)) for p in arguments.test}
    del teacher
    rows = [row for model in arguments.model for row in compare(arguments, model, losses)]
    body = {
        **environment("tuning", arguments.device),
        "arguments": {k: str(v) for k, v in vars(arguments).items()},
        "dense": {name: math.exp(nll.mean()) for name, nll in losses.items()},
        "rows": rows,
    }
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    arguments.out.write_text(json.dumps(body, indent=2) + "\n")
    if arguments.plot:
        plot(rows, arguments.out.with_suffix(".png"))


if __name__ == "__main__":
    main()
