"""Tokens sampled from a model: more data to tune a quantized copy towards it, since KL to a teacher
needs no labels.

Windows of --window tokens begin with <s> and go on through ends of documents, as the token files of
documents one after another do. The file is raw uint16 ids, windows of --data FILE (if given) first.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
import torch

from aqlm_infer.evaluation import load_model


@torch.inference_mode()
def sample(model: torch.nn.Module, windows: int, length: int, seed: int) -> torch.Tensor:
    """[windows, length] ids, at temperature 1 from the whole distribution."""
    device = next(model.parameters()).device
    torch.manual_seed(seed)
    start = torch.full((windows, 1), model.config.bos_token_id, device=device)
    return model.generate(
        start,
        attention_mask=torch.ones_like(start),
        do_sample=True,
        temperature=1.0,
        top_k=0,
        top_p=1.0,
        max_new_tokens=length - 1,
        eos_token_id=None,
        pad_token_id=0,
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", help="dense checkpoint")
    parser.add_argument("--out", type=Path, required=True, help="file to write, .bin")
    parser.add_argument("--data", type=Path, help="tokens to begin with, .bin")
    parser.add_argument("--windows", type=int, default=4096)
    parser.add_argument("--window", type=int, default=512)
    parser.add_argument("--batch", type=int, default=1024, help="windows at once")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="cuda")
    arguments = parser.parse_args()
    dtype = torch.float32 if arguments.device == "cpu" else torch.bfloat16
    model = load_model(arguments.model, dtype, arguments.device)
    parts = []
    if arguments.data is not None:
        ids = np.fromfile(arguments.data, "<u2")
        parts.append(ids[: len(ids) // arguments.window * arguments.window])
    for start in range(0, arguments.windows, arguments.batch):
        count = min(arguments.batch, arguments.windows - start)
        found = sample(model, count, arguments.window, arguments.seed + start)
        parts.append(found.flatten().cpu().numpy().astype("<u2"))
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    np.concatenate(parts).tofile(arguments.out)


if __name__ == "__main__":
    main()
