"""One rank of several processes: a JSON list of {"folder", settings of ``make_trainer``}, and a
device."""

import json
import sys
from pathlib import Path

import torch
from tuning_cases import make_trainer, quantized_model

from aqlm_infer.training.parallel import Parallel


def prepared(changes: dict, parallel: Parallel | None = None):
    """The trainer of one entry, and whether it resumes; "tied" ties the model's embeddings."""
    fields = dict(changes)
    folder, resume = Path(fields.pop("folder")), fields.pop("resume", False)
    if fields.pop("tied", False):
        fields["model"] = quantized_model(fields["scheme"], tie_word_embeddings=True)
    return make_trainer(folder, parallel=parallel, **fields), resume


def main(runs: str, device: str) -> None:
    torch.set_num_threads(1)
    parallel = Parallel(device)
    for changes in json.loads(runs):
        trainer, resume = prepared({**changes, "device": parallel.device}, parallel)
        trainer.run(resume)
    parallel.stop()


if __name__ == "__main__":
    main(*sys.argv[1:])
