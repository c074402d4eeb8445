"""How fast does a quantized model write, beside the dense one and the ``aqlm`` package?

Quantizes the dense MODEL to each scheme in memory, or makes random models of a published --shape,
generates greedily from both in the same process, and writes JSON lines to --out (see README.md).
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from pathlib import Path

import torch
from tqdm import tqdm

from aqlm_infer.bench import append_rows
from aqlm_infer.bench.generate import MODES, Dense, bench_generate, quantized_copy
from aqlm_infer.bench.record import Row
from aqlm_infer.bench.shapes import random_model, shape_config
from aqlm_infer.evaluation import DTYPES, load_model

ROOT = Path(__file__).parents[1]


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", nargs="?", default=str(ROOT / "examples" / "lm7"))
    parser.add_argument("--shape", help="random weights of this shape, instead of MODEL")
    parser.add_argument("--layers", type=int, help="with --shape, only this many blocks")
    parser.add_argument("--out", type=Path, required=True, help="JSON-lines file to append to")
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    parser.add_argument("--scheme", nargs="+", default=["aqlm-2x8-g8", "aqlm-1x8-g4"])
    parser.add_argument("--batch", nargs="+", type=int, default=[1, 4, 16])
    parser.add_argument("--prompt-tokens", nargs="+", type=int, default=[32])
    parser.add_argument("--new-tokens", type=int, default=64)
    parser.add_argument("--mode", nargs="+", default=["prepared"], choices=MODES)
    parser.add_argument("--lm-head", nargs="+", default=["none"], help="schemes, or none")
    parser.add_argument("--threads", nargs="+", type=int, default=[1, 2])
    parser.add_argument("--dtype", nargs="+", default=["float32", "bfloat16"], choices=DTYPES)
    parser.add_argument("--precision", default="exact", help="of the kernels, with --shape")
    parser.add_argument("--skip-dense", action="store_true")
    parser.add_argument("--peer", choices=("aqlm",), help="time this package's layers as well")
    parser.add_argument("--aqlm-extension", type=Path, help="aqlm's CUDA kernels, built: a .so")
    return parser.parse_args()


def pairs(given, dtype: torch.dtype) -> Iterator[tuple[str, str, torch.nn.Module, Dense | None]]:
    """(name, scheme, quantized, dense), a scheme at a time."""
    if given.shape is None:
        name, loaded = Path(given.model).name, load_model(given.model, dtype, given.device)
        dense = None if given.skip_dense else Dense(loaded)
        for scheme in given.scheme:
            yield name, scheme, quantized_copy(loaded, scheme, "exact", progress=True), dense
        return
    config = shape_config(given.shape, given.layers)
    name = given.shape if given.layers is None else f"{given.shape}, {given.layers} blocks"
    dense = None
    if not given.skip_dense:
        dense = Dense(random_model(config, None, dtype, given.device))
    for scheme in given.scheme:
        model = random_model(config, scheme, dtype, given.device, precision=given.precision)
        yield name, scheme, model, dense


def rows(given, dtype: torch.dtype) -> Iterator[Row]:
    """All rows of a dtype."""
    sizes = {"batches": given.batch, "prompt_tokens": given.prompt_tokens,
             "new_tokens": given.new_tokens}  # fmt: skip
    for name, scheme, quantized, dense in pairs(given, dtype):
        for head in given.lm_head:
            head = None if head == "none" else head
            modes = [mode for mode in given.mode if head is None or mode != "eager"]
            yield from bench_generate(
                name, quantized, dense, **sizes, threads=given.threads, modes=modes, lm_head=head
            )
        if given.peer is not None and scheme.startswith("aqlm-"):
            from peer_models import peer_rows
            from peers import use_built_extension

            if given.aqlm_extension is not None:
                use_built_extension(given.aqlm_extension)
            yield from peer_rows(name, quantized, scheme, dense, **sizes)


def main() -> None:
    given = arguments()
    for dtype in given.dtype:
        for row in tqdm(rows(given, DTYPES[dtype]), desc=dtype, unit="row"):
            append_rows(given.out, [row])
            tqdm.write(
                f"{row['backend']} {row['scheme']} {row['mode']} head {row['lm_head']} batch"
                f" {row['batch']} prompt {row['prompt_tokens']}: {row['tokens_per_s']} tokens/s"
                f" (dense {row['dense_tokens_per_s']}, compiled"
                f" {row['dense_compiled_tokens_per_s']}, in turns {row.get('times_dense')}),"
                f" first token {row['ttft_ms']} ms"
                f" ({row['dense_ttft_ms']}), step {row['step_us']} us"
            )


if __name__ == "__main__":
    main()
