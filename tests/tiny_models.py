"""Tiny transformers models, and checkpoints of them in the published layout, with a dense twin."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path

import torch
from cases import random_layer
from safetensors.torch import save_file
from torch import nn
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedConfig, PreTrainedModel

from aqlm_infer.checkpoint import describe

IDS = torch.tensor([[1, 5, 9, 33, 60, 2, 17], [3, 3, 8, 40, 1, 0, 63]])


def tiny_config(**changes) -> LlamaConfig:
    """A Llama with O = I in k_proj and v_proj (4 groups of 8 inputs), O > I in the other layers."""
    fields = {
        "vocab_size": 64,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "head_dim": 4,
        "max_position_embeddings": 64,
        "bos_token_id": 1,
        "eos_token_id": 2,
    }
    return LlamaConfig(**{**fields, **changes})


def tiny_model(
    config: PreTrainedConfig | None = None, dtype: torch.dtype = torch.float32, seed: int = 0
) -> PreTrainedModel:
    """A dense model, its values exact in float16."""
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(config or tiny_config(), dtype=dtype)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_((parameter + 0.02 * torch.randn_like(parameter)).half())
    return model.eval()


@dataclass(frozen=True)
class Written:
    """A checkpoint folder, the float32 model it stands for, and the tensors in it."""

    folder: Path
    dense: PreTrainedModel
    state: dict[str, torch.Tensor]

    def logits(self) -> torch.Tensor:
        return logits(self.dense)


@torch.no_grad()
def logits(model: PreTrainedModel) -> torch.Tensor:
    return model(IDS).logits


def write_checkpoint(
    folder: Path,
    plan: str | Mapping[str, str] = "aqlm-2x8-g8",
    config: PreTrainedConfig | None = None,
    edit: Callable[[dict], None] | None = None,
    kind: str = "safetensors",
    block: Mapping | None = None,
) -> Written:
    """Write a float16 checkpoint with random codes, as the published converter lays it out.

    ``plan`` maps globs of decoder layers to schemes (no match: dense); ``edit`` changes the tensors
    before they are written; ``block`` replaces fields of the quantization_config; ``kind`` is
    "safetensors", "sharded" or "bin".
    """
    dense = tiny_model(config)
    rules = {"*": plan} if isinstance(plan, str) else plan
    tied = dense.config.tie_word_embeddings
    state = {n: p.detach().half() for n, p in dense.named_parameters(remove_duplicate=tied)}
    for seed, (name, linear) in enumerate(dense.model.layers.named_modules(prefix="model.layers")):
        scheme = next((s for p, s in rules.items() if fnmatchcase(name, p)), None)
        if not isinstance(linear, nn.Linear) or scheme is None:
            continue
        layer = random_layer(scheme, *linear.weight.shape, seed=seed)
        values = {n: (0.2 * layer.tensors[n]).half() for n in ("codebooks", "scales")}
        tensors = {**layer.tensors, **values}
        del state[f"{name}.weight"]
        state.update({f"{name}.{n}": t for n, t in tensors.items()})
        with torch.no_grad():
            linear.weight.copy_(layer.format.dequantize(tensors, torch.float32))
    fields = describe(state)
    fields.pop("layer_schemes", None)
    if tied:
        fields["linear_weights_not_to_quantize"].append("lm_head.weight")
    if edit:
        edit(state)
    folder.mkdir()
    body = json.loads(dense.config.to_json_string(use_diff=False))
    body |= {"dtype": "float16", "architectures": [type(dense).__name__]}
    body["quantization_config"] = {"quant_method": "aqlm", **fields, **(block or {})}
    (folder / "config.json").write_text(json.dumps(body))
    _write_tensors(folder, state, kind)
    return Written(folder, dense, state)


def _write_tensors(folder: Path, state: dict[str, torch.Tensor], kind: str) -> None:
    state = {n: t.contiguous() for n, t in state.items()}
    if kind == "bin":
        torch.save(state, folder / "pytorch_model.bin")
    elif kind == "safetensors":
        save_file(state, folder / "model.safetensors", metadata={"format": "pt"})
    else:
        # Every other tensor: a layer's codes and codebooks land in different files.
        files = {n: f"model-{1 + i % 2:05}-of-00002.safetensors" for i, n in enumerate(state)}
        for file in set(files.values()):
            part = {n: t for n, t in state.items() if files[n] == file}
            save_file(part, folder / file, metadata={"format": "pt"})
        index = {"metadata": {}, "weight_map": files}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def relative_error(y: torch.Tensor, expected: torch.Tensor) -> float:
    return float((y.double() - expected.double()).norm() / expected.double().norm())


def wide_config(**changes):
    """Sizes that every scheme and rotation takes."""
    fields = {"hidden_size": 128, "intermediate_size": 256, "num_attention_heads": 4,
              "num_key_value_heads": 2, "head_dim": 32, "eos_token_id": None,
              "max_position_embeddings": 512, "vocab_size": 97}  # fmt: skip
    return tiny_config(**{**fields, **changes})
