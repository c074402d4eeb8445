"""What precision int8 costs in perplexity: one quantized model, exact and int8.

    python3 benchmarks/ladder/cuda/int8_quality.py CHECKPOINT TOKENS.bin --out ROWS.jsonl

Windows are fed through the key-value cache ``--chunk`` tokens at a time, because the int8 bodies
run for few tokens only (csrc/cuda/tune.h): in larger calls both precisions run the same code.
"""

from __future__ import annotations

import argparse
import math
from pathlib import Path

import torch
import torch.nn.functional as F

from aqlm_infer.bench import append_rows, environment
from aqlm_infer.evaluation import load_model, read_token_file, set_precision
from aqlm_infer.layers import quantized_layers


@torch.inference_mode()
def chunked_nll(model, ids: torch.Tensor, window: int, chunk: int) -> float:
    """Mean negative log-likelihood of every token but the first of each window, in nats."""
    total, scored = 0.0, 0
    for row in ids.view(-1, window):
        past, logits = None, []
        for piece in row.split(chunk):
            done = model(input_ids=piece[None], past_key_values=past, use_cache=True)
            past = done.past_key_values
            logits.append(done.logits[0])
        losses = F.cross_entropy(torch.cat(logits)[:-1].float(), row[1:], reduction="none")
        total, scored = total + losses.double().sum().item(), scored + losses.numel()
    return total / scored


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("tokens", type=Path)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--window", type=int, default=256)
    parser.add_argument("--windows", type=int, default=60)
    parser.add_argument("--chunk", type=int, default=8)
    arguments = parser.parse_args()
    model = load_model(arguments.checkpoint, device="cuda")
    ids = read_token_file(arguments.tokens, model.config.vocab_size)
    ids = ids[: arguments.window * arguments.windows].cuda()
    rows = []
    for precision in ("exact", "int8"):
        set_precision(model, precision)
        nll = chunked_nll(model, ids, arguments.window, arguments.chunk)
        layer = next(layer for _, layer in quantized_layers(model))
        rows.append(
            {
                **environment("quality", "cuda"),
                "model": arguments.checkpoint.name,
                "scheme": layer.format.id,
                "kernel": layer.kernel_id,
                "precision": precision,
                "dtype": str(model.dtype).removeprefix("torch."),
                "tokens_file": arguments.tokens.name,
                "window": arguments.window,
                "windows": arguments.windows,
                "chunk": arguments.chunk,
                "nll": nll,
                "ppl": math.exp(nll),
            }
        )
        print(precision, nll, math.exp(nll), flush=True)
    append_rows(arguments.out, rows)


if __name__ == "__main__":
    main()
