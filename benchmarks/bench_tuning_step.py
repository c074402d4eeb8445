"""How long is a tuning step beside a plain bf16 training step, and how much memory does it take?

A model of the shape in MODEL/config.json with random weights, so nothing is downloaded: the time of
a step does not depend on them. The plain step is the same model in bfloat16, cross-entropy, AdamW
(fused, foreach on the CPU). One JSON line per scheme and method goes to --out.
"""

from __future__ import annotations

import argparse
import gc
import statistics
import tempfile
import time
from pathlib import Path

import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM

from aqlm_infer import QuantLinear
from aqlm_infer.bench import append_rows
from aqlm_infer.bench.layers import random_tensors
from aqlm_infer.bench.record import environment, rounded
from aqlm_infer.formats import parse_scheme
from aqlm_infer.training import METHODS, RunFolder, TuneSettings
from aqlm_infer.training.student import Student
from aqlm_infer.training.trainer import Trainer


def random_model(folder: Path, dtype: torch.dtype, device: str) -> nn.Module:
    torch.manual_seed(0)
    config = AutoConfig.from_pretrained(folder)
    model = AutoModelForCausalLM.from_config(config, dtype=dtype, attn_implementation="sdpa")
    return model.to(device)


def quantize_blocks(model: nn.Module, scheme: str, device: str) -> None:
    """Put random layers of ``scheme`` in the places of the decoder's linear layers."""
    format = parse_scheme(scheme)
    for name, linear in list(model.get_decoder().named_modules()):
        if isinstance(linear, nn.Linear):
            N, K = linear.weight.shape
            tensors = random_tensors(format, N, K, torch.float32, 0, device)
            layer = QuantLinear.from_tensors(format, tensors, K, None, name=name)
            model.get_decoder().set_submodule(name, layer)


def timed(step, count: int, cuda: bool) -> tuple[float, int]:
    """Median seconds of a step after two that warm up, and the peak memory of all, bytes."""
    if cuda:
        torch.cuda.reset_peak_memory_stats()
    times = []
    for _ in range(count + 2):
        start = time.perf_counter()
        step()
        if cuda:
            torch.cuda.synchronize()
        times.append(time.perf_counter() - start)
    return statistics.median(times[2:]), torch.cuda.max_memory_allocated() if cuda else 0


def plain(arguments: argparse.Namespace, windows: torch.Tensor, micro: int) -> tuple[float, int]:
    model = random_model(arguments.model, torch.bfloat16, arguments.device)
    cuda = arguments.device != "cpu"
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5, fused=cuda)

    def step() -> None:
        for ids in windows.split(micro):
            ids = ids.to(arguments.device)
            loss = model(input_ids=ids, labels=ids, use_cache=False).loss
            (loss * len(ids) / len(windows)).backward()
        optimizer.step()
        optimizer.zero_grad()

    return timed(step, arguments.steps, cuda)


def tuning(
    arguments: argparse.Namespace, windows: torch.Tensor, micro: int, scheme: str, method: str
) -> tuple[float, int, int]:
    """Seconds and peak bytes of a step, and bytes held between steps."""
    device, cuda = arguments.device, arguments.device != "cpu"
    gc.collect()  # models hold cycles: what is left of the one before would count as held
    before = torch.cuda.memory_allocated() if cuda else 0
    model = random_model(arguments.model, torch.float32, device)
    quantize_blocks(model, scheme, device)
    teacher = random_model(arguments.model, torch.bfloat16, device)
    settings = TuneSettings(
        method=method, steps=1000, batch=len(windows), microbatch=micro, seq_len=windows.shape[1]
    )
    with tempfile.TemporaryDirectory() as folder:
        student = Student(model, settings, torch.bfloat16)
        run = RunFolder(Path(folder) / "run")
        trainer = Trainer(student, teacher, windows, windows[:1], settings, run)
        count = iter(range(1000))
        seconds, peak = timed(lambda: trainer._step(next(count)), arguments.steps, cuda)
        held = torch.cuda.memory_allocated() - before if cuda else 0
    return seconds, peak, held


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", type=Path, help="folder with a config.json")
    parser.add_argument("--out", type=Path, required=True, help="JSON-lines file to append to")
    parser.add_argument("--scheme", nargs="+", default=["aqlm-2x8-g8"])
    parser.add_argument("--method", nargs="+", default=["pv-ste"], choices=METHODS)
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--microbatch", type=int)
    parser.add_argument("--seq-len", type=int, default=512)
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--device", default="cuda")
    arguments = parser.parse_args()
    micro = arguments.microbatch or arguments.batch
    vocabulary = AutoConfig.from_pretrained(arguments.model).vocab_size
    generator = torch.Generator().manual_seed(0)
    shape = (arguments.batch, arguments.seq_len)
    windows = torch.randint(0, vocabulary, shape, generator=generator)
    dense_seconds, dense_peak = plain(arguments, windows, micro)
    parameters = sum(
        p.numel() for p in random_model(arguments.model, torch.bfloat16, "cpu").parameters()
    )
    for scheme in arguments.scheme:
        for method in arguments.method:
            seconds, peak, held = tuning(arguments, windows, micro, scheme, method)
            row = {
                **environment("tuning-step", arguments.device),
                "model": arguments.model.name,
                "scheme": scheme,
                "method": method,
                "batch": arguments.batch,
                "microbatch": micro,
                "seq_len": arguments.seq_len,
                "seconds": seconds,
                "plain_seconds": dense_seconds,
                "ratio": seconds / dense_seconds,
                "peak_bytes": peak,
                "plain_peak_bytes": dense_peak,
                "held_bytes": held,
                "held_per_parameter": held / parameters,
            }
            append_rows(arguments.out, [rounded(row)])
            print(f"{scheme} {method}: {seconds:.4f} s, plain {dense_seconds:.4f}", flush=True)


if __name__ == "__main__":
    main()
