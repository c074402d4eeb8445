"""What does each way of tuning a quantized model gain, from the same data, steps and seeds?

Tunes every quantized MODEL by every method against the dense --teacher. The learning rate of values
is chosen for ``continuous`` and is then every method's; code learning rate and limits are chosen by
method; all on the validation tokens (first seed, grids below). Then every seed runs with them, and
the test tokens are read once. Windows are paired between arms: the summary has a bootstrap over
them of each method against ``continuous``. --long trains the best of all for so many steps more.

Jobs are spread over the devices, those of the first model first. What a job found is a line of
--rows at once, and a job whose line is there is not repeated: a command that was cut off goes on,
and --summary makes the tables of whatever is there.
"""

from __future__ import annotations

import argparse
import json
import math
import multiprocessing
import shutil
import time
import traceback
from collections.abc import Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from unittest import mock

import numpy as np
import torch
from bench_quality import with_dense_weights
from torch import nn

from aqlm_infer.bench import append_rows
from aqlm_infer.bench.record import environment
from aqlm_infer.calibration import TuneOptions, quantize_calibrated
from aqlm_infer.evaluation import load_model, read_token_file
from aqlm_infer.training import METHODS, TuneSettings, TuningError, loss, tune_checkpoint
from aqlm_infer.training.job import run_folder
from aqlm_infer.training.loss import hidden_states, labels_of, token_nll

NONE = 0.0
"""Of a trust ratio: no limit."""


def grid(rates: tuple[float, ...], trust: tuple[float, ...] = ()) -> tuple[dict[str, float], ...]:
    """Settings to try: every code learning rate, with every trust ratio where there are some."""
    limits = [{"trust_ratio": t} for t in trust] or [{}]
    return tuple({"code_lr": rate, **limit} for rate in rates for limit in limits)


GRIDS = {
    "continuous": ({"lr": 3e-3}, {"lr": 1e-2}),
    "naive-pv": grid((3e-3,)),
    "pv": grid((0.1, 0.3), (1e-2, 2e-3)),
    "pv-ste": grid((1e-2, 3e-2, 1e-1), (NONE,)),
    "ste": grid((1e-2, 3e-2, 1e-1)),
    "stochastic": grid((3e-3, 1e-2)),
}
"""What is tried by method; a method that is not here has the grid of ste."""

Choice = tuple[tuple[str, float | str], ...]
"""Settings of a run that differ from the arguments', by name."""


@dataclass(frozen=True)
class Job:
    """One thing to do: "quantize" a start, "tune" by settings, or "test" what came of it."""

    kind: str
    model: str
    method: str = "start"
    choice: Choice = ()
    seed: int = 0

    @property
    def name(self) -> str:
        values = "".join(f"-{name}{value}" for name, value in self.choice)
        return f"{Path(self.model).name}-{self.method}{values}-s{self.seed}"


def points(arguments, rows: dict[Job, dict], model: str, method: str) -> list[Choice]:
    """Settings to try of a method; none as long as the learning rate of values is not known."""
    grids = GRIDS | arguments.grid | arguments.grid.get(Path(model).name, {})
    found = [tuple(point.items()) for point in grids.get(method, grids["ste"])]
    if method == "continuous" or "continuous" not in arguments.method:
        return found
    base = chosen(arguments, rows, model, "continuous")
    return [] if base is None else [point + base for point in found]


def trials(arguments, rows: dict[Job, dict], model: str, method: str) -> list[Job]:
    """The runs that choose settings of a method."""
    found = points(arguments, rows, model, method)
    return [Job("tune", model, method, point, arguments.seed[0]) for point in found]


def chosen(arguments, rows: dict[Job, dict], model: str, method: str) -> Choice | None:
    """The best settings on validation, None while some are not tried or where none can be."""
    jobs = trials(arguments, rows, model, method)
    if not jobs or any(job not in rows or "error" in rows[job] for job in jobs):
        return None
    return min(jobs, key=lambda job: rows[job]["best"]["kl"]).choice


def long_run(arguments, rows: dict[Job, dict], model: str) -> Job | None:
    """The longer run of what is best on validation of all methods, once that is known."""
    jobs = [trials(arguments, rows, model, method) for method in arguments.method]
    if not arguments.long or not all(jobs) or any(j not in rows for each in jobs for j in each):
        return None
    good = [job for each in jobs for job in each if "error" not in rows[job]]
    if not good:
        return None
    first = min(good, key=lambda job: rows[job]["best"]["kl"])
    return replace(first, choice=(*first.choice, ("steps", arguments.long)))


def plan(arguments, rows: dict[Job, dict]) -> Iterator[Job]:
    """Everything that could be done now, the most wanted first, done or not. Without test files
    nothing is tested: settings can be chosen first, and the test tokens read when they stand."""
    if arguments.test:
        yield Job("test", str(arguments.teacher))
    for model in map(str, arguments.model):
        made = Job("quantize", model)
        if not (Path(model) / "config.json").is_file() and made not in rows:
            yield made
            continue
        if "error" in rows.get(made, {}):
            continue
        if arguments.test:
            yield Job("test", model)
        for method in arguments.method:
            yield from trials(arguments, rows, model, method)
        runs = [long_run(arguments, rows, model)]
        for seed in arguments.seed:
            for method in arguments.method:
                best = chosen(arguments, rows, model, method)
                runs.append(best and Job("tune", model, method, best, seed))
        for run in runs:
            if run is not None and run not in rows:
                yield run
            elif run is not None and arguments.test:
                yield replace(run, kind="test")


# -- one job ---------------------------------------------------------------------------------------


class Remembered:
    """``hidden_states`` of the teacher, made once: every epoch and run asks for the same ones, a
    quarter of a step's work. Kept by batch size, so that no kernel is another one's."""

    def __init__(self):
        self.known: dict[tuple[int, bytes], torch.Tensor] = {}

    def __call__(self, model: nn.Module, ids: torch.Tensor) -> torch.Tensor:
        if any(p.requires_grad for p in model.parameters()):  # a student
            return hidden_states(model, ids)
        keys = [(len(ids), window.tobytes()) for window in ids.cpu().numpy()]
        if not all(key in self.known for key in keys):
            found = hidden_states(model, ids)
            self.known |= zip(keys, found.view(*ids.shape, -1), strict=True)
            return found
        return torch.cat([self.known[key] for key in keys])


def tune(arguments, job: Job, device: str) -> dict:
    """One run; its checkpoint stays in --work."""
    lamb = arguments.optimizer == "lamb" and METHODS[job.method].moves_codes
    choice = {"steps": arguments.steps, "lr": arguments.lr, "ranking": arguments.ranking}
    choice |= dict(job.choice)
    settings = TuneSettings(
        method=job.method,
        batch=arguments.batch,
        microbatch=arguments.microbatch,
        seq_len=arguments.window,
        optimizer=arguments.optimizer,
        final_lr=arguments.final_lr,
        warm_up=False if lamb else None,
        beam=arguments.beam,
        seed=job.seed,
        eval_every=arguments.eval_every,
        save_every=choice["steps"] + 1,
        valid_windows=arguments.valid_windows,
        **choice,
    )
    out = arguments.work / job.name
    shutil.rmtree(run_folder(out), ignore_errors=True)  # of a run that was cut off
    long = choice["steps"] != arguments.steps and arguments.long_data is not None
    report = tune_checkpoint(
        job.model,
        out,
        arguments.long_data if long else arguments.data,
        arguments.valid,
        settings,
        teacher=arguments.teacher,
        device=device,
    )
    log = [json.loads(line) for line in Path(report.log).read_text().splitlines()]
    return {
        "bits": report.bits_per_weight,
        "first": report.run.first,
        "best": report.run.best,
        "flips": report.run.flips,
        "seconds": report.run.seconds,
        "valid_kl": [row["kl"] for row in log if row["kind"] == "eval"],
        "train_loss": [row["loss"] for row in log if row["kind"] == "step"][
            :: arguments.eval_every
        ],
        "settings": asdict(settings),
    }


@torch.no_grad()
def window_losses(model: nn.Module, arguments, path: Path) -> list[float]:
    """Mean negative log-likelihood of each window of a token file."""
    device = next(model.parameters()).device
    ids = read_token_file(path, model.get_input_embeddings().num_embeddings)
    count = ids.numel() // arguments.window
    found = []
    for windows in ids[: count * arguments.window].view(count, -1).split(16):
        logits = model(input_ids=windows.to(device), use_cache=False).logits
        pairs = zip(logits, labels_of(windows.to(device)).view(windows.shape), strict=True)
        sums = torch.stack([token_nll(one, labels) for one, labels in pairs])
        found += (sums / (arguments.window - 1)).tolist()
    return [round(x, 6) for x in found]


def test(arguments, job: Job, device: str) -> dict:
    """Losses on the test files of what a run wrote; of the model itself, or the teacher."""
    folder = arguments.work / job.name
    if job.method == "start":
        folder = Path(job.model)
    model = with_dense_weights(load_model(folder, torch.float32)).to(device)
    return {"losses": {p.name: window_losses(model, arguments, p) for p in arguments.test}}


def quantize(arguments, job: Job, device: str) -> dict:
    """A start of the scheme that the folder is named after, with block fine-tuning."""
    out = Path(job.model)
    report = quantize_calibrated(
        arguments.teacher,
        out,
        out.name,
        arguments.data,
        samples=arguments.samples,
        seq_len=arguments.window,
        device=device,
        tune=TuneOptions(),
    )
    return {
        "bits": report.bits_per_weight,
        "relative_error": report.relative_error,
        "seconds": report.seconds,
    }


def work(arguments, job: Job, device: str, remembered: Remembered) -> dict:
    """Do the job; its row. A job that fails is told in its row and not tried again."""
    start = time.time()
    try:
        with mock.patch.object(loss, "hidden_states", remembered):
            does = {"quantize": quantize, "tune": tune, "test": test}[job.kind]
            found = does(arguments, job, device)
    except TuningError as error:
        found = {"error": str(error)}
    except Exception as error:
        traceback.print_exc()
        found = {"error": repr(error)}
    return {**asdict(job), **found, "device": device, "wall": round(time.time() - start, 2)}


_device: str = "cpu"
_remembered: Remembered | None = None


def _take_device(devices) -> None:
    """Of a worker process, when it starts."""
    global _device, _remembered
    _device, _remembered = devices.get(), Remembered()
    torch.set_num_threads(4)


def _work(arguments, job: Job) -> dict:
    return work(arguments, job, _device, _remembered)


# -- all of them -----------------------------------------------------------------------------------


def read_rows(path: Path) -> dict[Job, dict]:
    """What is known, by job; a last line that was cut off counts as nothing."""
    found = {}
    for line in path.read_text().splitlines() if path.is_file() else ():
        try:
            row = json.loads(line)
        except json.JSONDecodeError:
            continue
        choice = tuple((name, value) for name, value in row["choice"])
        found[Job(row["kind"], row["model"], row["method"], choice, row["seed"])] = row
    return found


def perform(arguments) -> None:
    """Do every job that has no row yet, as many at a time as there are devices."""
    rows = read_rows(arguments.rows)

    def keep(job: Job, row: dict) -> None:
        rows[job] = row
        with arguments.rows.open("a") as file:
            file.write(json.dumps(row) + "\n")
        brief = {k: row[k] for k in ("best", "error", "wall", "device") if k in row}
        print(f"{job.kind} {job.name}: {brief}", flush=True)

    if len(arguments.device) == 1:
        remembered = Remembered()
        while job := next((j for j in plan(arguments, rows) if j not in rows), None):
            keep(job, work(arguments, job, arguments.device[0], remembered))
        return
    context = multiprocessing.get_context("spawn")
    devices = context.Queue()
    for device in arguments.device:
        devices.put(device)
    running: dict[Future, Job] = {}
    with ProcessPoolExecutor(
        len(arguments.device), context, initializer=_take_device, initargs=(devices,)
    ) as pool:
        while True:
            busy = set(running.values())
            making = {job.model for job in busy if job.kind == "quantize"}  # half written
            free = [j for j in plan(arguments, rows) if j not in rows and j not in busy]
            free = [j for j in free if j.model not in making]
            free.sort(key=lambda j: j.kind != "test")  # what was trained is lost with the machine
            for job in dict.fromkeys(free[: len(arguments.device) - len(running)]):
                running[pool.submit(_work, arguments, job)] = job
            if not running:
                return
            done, _ = wait(running, return_when=FIRST_COMPLETED)
            for future in done:
                keep(running.pop(future), future.result())


def summary(losses: np.ndarray, baseline: np.ndarray | None, dense: np.ndarray) -> dict:
    """Perplexity of one method, [seeds, windows], and its paired ratios.

    ``ratio`` is to the dense model, ``gain`` to the baseline with the same seeds (below 1 is
    better), with 95 % intervals of 10,000 draws of windows, each the mean over seeds.
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


def summarise(arguments) -> dict:
    """The tables of what is known: a row for each model and method that was tested."""
    rows, table = read_rows(arguments.rows), []
    teacher = rows.get(Job("test", str(arguments.teacher)))
    dense = {
        name: np.array(losses) for name, losses in (teacher or {"losses": {}})["losses"].items()
    }
    for model in map(str, arguments.model):
        baseline: dict[str, dict[int, list[float]]] = {}
        long = long_run(arguments, rows, model)
        arms = [("start", "start", ())]
        arms += [(m, m, chosen(arguments, rows, model, m)) for m in arguments.method]
        arms += [] if long is None else [("long", long.method, long.choice)]
        for arm, method, best in arms:
            if best is None:
                continue
            seeds = [0] if method == "start" else arguments.seed
            tested = [rows.get(Job("test", model, method, best, seed)) for seed in seeds]
            tested = [row for row in tested if row is not None and "error" not in row]
            if not tested:
                continue
            row = {"model": Path(model).name, "method": arm, "settings": dict(best), "test": {}}
            if method == "start":
                made = rows.get(Job("quantize", model), {})
                known = (r["bits"] for j, r in rows.items() if j.model == model and "bits" in r)
                row |= {"bits": next(known, None), "seconds": [made.get("seconds", 0.0)]}
            else:
                runs = [rows[Job("tune", model, method, best, r["seed"])] for r in tested]
                tried = trials(arguments, rows, model, method)
                row |= {
                    "of": method,
                    "bits": runs[0]["bits"],
                    "tried": [{**dict(j.choice), "valid_kl": rows[j]["best"]["kl"]} for j in tried],
                    "first_kl": runs[0]["first"]["kl"],
                    "valid_kl": [r["best"]["kl"] for r in runs],
                    "valid_ppl": [r["best"]["ppl"] for r in runs],
                    "flips": [r["flips"] for r in runs],
                    "best_step": [r["best"]["step"] for r in runs],
                    "seconds": [r["seconds"] for r in runs],
                }
            for name, reference in dense.items():
                losses = {r["seed"]: r["losses"][name] for r in tested}
                if arm == "continuous":
                    baseline[name] = losses
                base = [baseline[name].get(s) for s in losses] if name in baseline else [None]
                row["test"][name] = summary(
                    np.array(list(losses.values())),
                    None if None in base else np.array(base),
                    reference,
                )
                print(f"{row['model']} {arm} {name}: {row['test'][name]}", flush=True)
            table.append(row)
    return {
        **environment("tuning", arguments.device[0]),
        "arguments": {k: str(v) for k, v in vars(arguments).items()},
        "dense": {name: math.exp(losses.mean()) for name, losses in dense.items()},
        "rows": table,
    }


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
    parser.add_argument("model", type=Path, nargs="+", help="quantized checkpoint folders; one that"
                        " is not there is made, of the scheme that it is named after")  # fmt: skip
    parser.add_argument("--teacher", type=Path, required=True, help="the dense checkpoint")
    parser.add_argument("--data", type=Path, required=True, help="training tokens, .bin")
    parser.add_argument("--valid", type=Path, required=True, help="tokens to choose by, .bin")
    parser.add_argument("--test", type=Path, nargs="*", default=[], help="tokens to report, .bin")
    parser.add_argument("--out", type=Path, required=True, help="JSON file, and FILE.png beside it")
    parser.add_argument("--results", type=Path, help="JSON-lines file to append the tables to")
    parser.add_argument("--rows", type=Path, help="JSON lines of finished jobs (--out .jsonl)")
    parser.add_argument("--work", type=Path, required=True, help="folder for checkpoints")
    parser.add_argument("--method", nargs="+", choices=list(METHODS), default=list(GRIDS))
    parser.add_argument("--seed", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--long", type=int, default=0, help="steps of one more run of the best")
    parser.add_argument("--long-data", type=Path, help="its training tokens, .bin")
    parser.add_argument("--batch", type=int, default=64, help="windows a step")
    parser.add_argument("--microbatch", type=int, help="windows at once")
    parser.add_argument("--window", type=int, default=512)
    parser.add_argument("--samples", type=int, default=256, help="windows to quantize with")
    parser.add_argument("--optimizer", default="lamb")
    parser.add_argument("--lr", type=float, default=3e-4)
    parser.add_argument("--final-lr", type=float, default=1.0)
    parser.add_argument("--grid", type=json.loads, default={}, help="JSON {method: [settings]}, and"
                        " {start: {method: [settings]}} for one start alone")  # fmt: skip
    parser.add_argument("--beam", type=int, default=4)
    parser.add_argument("--ranking", default="residual")
    parser.add_argument("--eval-every", type=int, default=25)
    parser.add_argument("--valid-windows", type=int)
    parser.add_argument("--device", nargs="+", default=["cpu"], help="a job at a time on each")
    parser.add_argument("--summary", action="store_true", help="do nothing new")
    parser.add_argument("--plot", action="store_true", help="needs matplotlib")
    arguments = parser.parse_args()
    arguments.rows = arguments.rows or arguments.out.with_suffix(".jsonl")
    for folder in (arguments.work, arguments.out.parent, arguments.rows.parent):
        folder.mkdir(parents=True, exist_ok=True)
    arguments.method.sort(key=lambda m: m != "continuous")  # the baseline first
    if not arguments.summary:
        perform(arguments)
    body = summarise(arguments)
    arguments.out.write_text(json.dumps(body, indent=2) + "\n")
    if arguments.results:
        about = {k: v for k, v in body.items() if k not in ("rows", "arguments")}
        given = {
            k: body["arguments"][k] for k in ("teacher", "steps", "batch", "window", "final_lr")
        }
        append_rows(arguments.results, [{**about, **given, **row} for row in body["rows"]])
    if arguments.plot:
        plot(body["rows"], arguments.out.with_suffix(".png"))


if __name__ == "__main__":
    main()
