"""``aqlm-infer generate``: stream a continuation and time it."""

from __future__ import annotations

import sys
from dataclasses import asdict
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
from .output import emit, working


def generate(
    model: Model,
    prompt: Annotated[str, typer.Option(help="Text to continue.")],
    max_new_tokens: Annotated[int, typer.Option(help="Tokens to write at most.")] = 128,
    temperature: Annotated[
        float, typer.Option(help="0 takes the most likely token every time.")
    ] = 0.0,
    top_p: Annotated[
        float, typer.Option(help="Sample from the likeliest tokens with this total probability.")
    ] = 1.0,
    seed: Annotated[int, typer.Option(help="Of the sampling.")] = 0,
    dtype: Dtype = None,
    precision: Precision = "exact",
    lm_head: Annotated[
        str | None, typer.Option(help="Quantize the output head, to rtn-int8-g128 for instance.")
    ] = None,
    prepare: Annotated[
        bool, typer.Option(help="Stack layers and, on a GPU, capture decode steps.")
    ] = True,
    device: Device = "cpu",
    json: Json = False,
    debug: Debug = False,
) -> None:
    """Stream MODEL's continuation of a prompt to stdout.

    Ends with the decode rate (tokens after the first) and the time to the first token, on stderr.
    """
    from ..evaluation import load_model, load_tokenizer, resolve_model, set_precision
    from ..generation import prepare_for_generation
    from ..layers import quantized_layers

    if lm_head is not None and not prepare:
        raise OptionError(f"--lm-head {lm_head} needs --prepare")
    torch_dtype, device = parse_dtype(dtype), parse_device(device)
    resolve_model(model)
    from ..evaluation.generation import generate as run

    with working(json):
        tokenizer = load_tokenizer(model)
        loaded = load_model(model, torch_dtype, device)
        if precision != "exact":
            set_precision(loaded, precision)
        if lm_head is not None or (prepare and any(True for _ in quantized_layers(loaded))):
            prepare_for_generation(loaded, lm_head=lm_head)
        result = run(
            loaded,
            tokenizer,
            prompt,
            max_new_tokens=max_new_tokens,
            temperature=temperature,
            top_p=top_p,
            seed=seed,
            stream=sys.stderr if json else sys.stdout,
        )
    if json:
        emit({"model": model, "prompt": prompt, **asdict(result)}, json)
        return
    rate = result.decode_tokens_per_s
    speed = "no decode step" if rate is None else f"{rate:.1f} tokens/s"
    first = f"first token after {1e3 * result.ttft_s:.0f} ms"
    print(f"\n{result.new_tokens} tokens, {speed}, {first}", file=sys.stderr)
