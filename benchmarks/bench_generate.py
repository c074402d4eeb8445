"""How fast does a quantized model write, beside the dense one?

Quantizes the dense MODEL to each scheme in memory, generates greedily from both in the same
process, and writes JSON lines to --out (see README.md).
"""

from __future__ import annotations

import argparse
from pathlib import Path

from tqdm import tqdm

from aqlm_infer.bench import append_rows
from aqlm_infer.bench.generate import bench_generate, quantized_copy
from aqlm_infer.evaluation import DTYPES, load_model

ROOT = Path(__file__).parents[1]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", nargs="?", default=str(ROOT / "examples" / "lm7"))
    parser.add_argument("--out", type=Path, required=True, help="JSON-lines file to append to")
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    parser.add_argument("--scheme", nargs="+", default=["aqlm-2x8-g8", "aqlm-1x8-g4"])
    parser.add_argument("--batch", nargs="+", type=int, default=[1, 4, 16])
    parser.add_argument("--new-tokens", type=int, default=64)
    parser.add_argument("--threads", nargs="+", type=int, default=[1, 2])
    parser.add_argument("--dtype", nargs="+", default=["float32", "bfloat16"], choices=DTYPES)
    arguments = parser.parse_args()
    name = Path(arguments.model).name
    for dtype in arguments.dtype:
        dense = load_model(arguments.model, DTYPES[dtype], arguments.device)
        for scheme in arguments.scheme:
            quantized = quantized_copy(dense, scheme, "exact", progress=True)
            rows = bench_generate(
                name,
                quantized,
                dense,
                batches=arguments.batch,
                new_tokens=arguments.new_tokens,
                threads=arguments.threads,
            )
            for row in tqdm(rows, total=len(arguments.batch) * len(arguments.threads), desc=scheme):
                append_rows(arguments.out, [row])


if __name__ == "__main__":
    main()
