"""``aqlm-infer eval``: perplexity over non-overlapping windows."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

from .options import (
    Debug,
    Device,
    Dtype,
    Json,
    Model,
    OptionError,
    Precision,
    parse_device,
    parse_dtype,
)
from .output import emit, pairs, working


def eval_(
    model: Model,
    tokens: Annotated[
        Path | None, typer.Option(help="Raw little-endian uint16 token ids.", metavar="FILE.bin")
    ] = None,
    text: Annotated[
        Path | None,
        typer.Option(
            help="UTF-8 text, encoded with the model's tokenizer; a line <|endoftext|> separates"
            " documents.",
            metavar="FILE.txt",
        ),
    ] = None,
    window: Annotated[int, typer.Option(help="Tokens a window.")] = 512,
    windows: Annotated[
        int | None, typer.Option(help="Score only the first so many windows.")
    ] = None,
    batch: Annotated[int, typer.Option(help="Windows run at once.")] = 8,
    dtype: Dtype = None,
    precision: Precision = "exact",
    device: Device = "cpu",
    json: Json = False,
    debug: Debug = False,
) -> None:
    """Perplexity of MODEL over non-overlapping windows of a token file or a text file.

    Every token but the first of a window is scored; the tail is dropped.
    """
    from ..evaluation import (
        load_model,
        load_tokenizer,
        perplexity,
        read_text_file,
        read_token_file,
        resolve_model,
        set_precision,
    )
    from ..layers import quantized_cost, quantized_layers

    if (tokens is None) == (text is None):
        raise OptionError("give either --tokens FILE.bin or --text FILE.txt")
    data = tokens or text
    torch_dtype, device = parse_dtype(dtype), parse_device(device)
    resolve_model(model)
    if not data.is_file():
        raise FileNotFoundError(2, "no such file", str(data))
    with working(json):
        loaded = load_model(model, torch_dtype, device)
        quantized = any(True for _ in quantized_layers(loaded))
        if quantized or precision != "exact":
            set_precision(loaded, precision)
        if tokens is not None:
            ids = read_token_file(tokens, loaded.get_input_embeddings().num_embeddings)
        else:
            ids = read_text_file(text, load_tokenizer(model))
        result = perplexity(loaded, ids, window=window, windows=windows, batch=batch, progress=True)
    bits = quantized_cost(loaded).bits_per_weight if quantized else None
    record = {
        "model": model,
        "data": str(data),
        **asdict(result),
        "bits_per_weight": bits,
        "dtype": str(loaded.dtype).removeprefix("torch."),
        "precision": precision,
    }
    rows = [
        ("perplexity", f"{result.ppl:.4f}"),
        ("scored tokens", f"{result.tokens:,} in {result.windows} windows of {result.window}"),
        ("seconds", f"{result.seconds:.1f}"),
        ("bits a weight", f"{bits:.3f}" if bits else "dense"),
    ]
    emit(record, json, pairs(rows))
