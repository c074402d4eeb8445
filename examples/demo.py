"""A 2-bit Llama in two minutes: calibrate, quantize, swap the layers, write, compare.

    python examples/demo.py        (make demo sets everything up first)

Uses only this repository: the model is ``examples/lm7``, the text ``examples/text``. On a GPU where
there is one. The quantized checkpoint stays in ``out/``, for ``aqlm-infer generate`` and the like.
"""

from __future__ import annotations

import sys
import time
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table
from transformers.utils import logging

from aqlm_infer import prepare_for_generation, quantized_cost
from aqlm_infer.calibration import quantize_calibrated
from aqlm_infer.evaluation import load_model, load_tokenizer, perplexity, read_token_file
from aqlm_infer.evaluation.generation import Generation, generate

ROOT = Path(__file__).resolve().parents[1]
MODEL = ROOT / "examples" / "lm7"
TEXT = ROOT / "examples" / "text"
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"

SCHEME = "aqlm-1x8-g4"
"""About 2.2 bits a weight on this model, codebooks and scales counted."""

PROMPT = "The old house stood at the end of the lane, and"
NEW_TOKENS = 120
SAMPLES, SEQ_LEN = 64, 256
"""Calibration windows: a tenth of what a model of this size deserves, for the demo's sake."""
WINDOWS = 64
"""Of 512 tokens, a third of the text: all of it takes three times as long."""

console = Console()


def write(title: str, model: torch.nn.Module, tokenizer) -> Generation:
    """Stream a paragraph to the terminal."""
    generate(model, tokenizer, PROMPT, max_new_tokens=2)  # the first call is never timed
    console.print(f"[bold]{title}[/bold]")
    print(PROMPT, end="")
    written = generate(
        model,
        tokenizer,
        PROMPT,
        max_new_tokens=NEW_TOKENS,
        temperature=0.7,
        top_p=0.9,
        seed=1,
        stream=sys.stdout,
    )
    print()
    return written


def file_bytes(folder: Path) -> int:
    return sum(file.stat().st_size for file in folder.glob("*.safetensors"))


def main() -> None:
    start = time.perf_counter()
    logging.disable_progress_bar()
    torch.manual_seed(0)
    out = ROOT / "out" / f"lm7-{SCHEME}"
    tokenizer = load_tokenizer(MODEL)

    console.print(f"quantizing {MODEL.name} to {SCHEME}, from {SAMPLES * SEQ_LEN:,} tokens of text")
    quantize_calibrated(
        MODEL, out, SCHEME, TEXT / "calib.bin",
        samples=SAMPLES, seq_len=SEQ_LEN, device=DEVICE, progress=True,
    )  # fmt: skip
    dense = load_model(MODEL, device=DEVICE)
    reloaded = load_model(out, device=DEVICE)  # from_pretrained with its linear layers swapped
    cost = quantized_cost(reloaded)
    prepare_for_generation(reloaded)
    ids = read_token_file(TEXT / "valid.bin", dense.get_input_embeddings().num_embeddings)

    texts = [
        write("dense", dense, tokenizer),
        write(f"quantized, {cost.bits_per_weight:.2f} bits a weight", reloaded, tokenizer),
    ]
    scores = [perplexity(model, ids, windows=WINDOWS, progress=True) for model in (dense, reloaded)]

    table = Table("", "dense", SCHEME, title=f"{MODEL.name}: {cost.layers} layers quantized")
    table.columns[1].justify = table.columns[2].justify = "right"
    bytes_row = (cost.dense_bytes, cost.quantized_bytes)
    for name, *cells in (
        ("size of these layers", *(f"{count / 1e6:.2f} MB" for count in bytes_row)),
        ("checkpoint file", *(f"{file_bytes(f) / 1e6:.2f} MB" for f in (MODEL, out))),
        ("bits a weight (all counted)", "16", f"{cost.bits_per_weight:.3f}"),
        (f"perplexity ({scores[0].tokens:,} tokens)", *(f"{s.ppl:.2f}" for s in scores)),
        ("tokens/s (decode)", *(f"{t.decode_tokens_per_s:.1f}" for t in texts)),
        ("first token", *(f"{1e3 * t.ttft_s:.0f} ms" for t in texts)),
    ):
        table.add_row(name, *cells)
    console.print(table)
    seconds = time.perf_counter() - start
    console.print(
        f"{seconds:.0f} s in all. The embedding, tied to the output head, stays dense: 4.2 MB of"
        f" the file.\nGo on with:  aqlm-infer generate {out.relative_to(ROOT)} --prompt '...'"
    )


if __name__ == "__main__":
    main()
