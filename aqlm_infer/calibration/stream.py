"""A model in pieces: its skeleton without weights, and one decoder block at a time from the files.

A 70B model is never whole in memory: embeddings and norms are loaded once, a block's weights when
its turn comes. Blocks are called with the very arguments that the model itself would pass, recorded
once from a run in which every block hands its input through.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import torch
from safetensors import safe_open
from torch import nn
from torch.utils._pytree import tree_map

from ..checkpoint import read_headers
from ..evaluation import load_model, resolve_model
from ..evaluation.loading import ModelError
from ..integrations.moe import LAYOUTS, ExpertLayout, QuantExperts


class Weights:
    """Tensors of a checkpoint by the model's parameter names, read when asked for.

    Files whose names are not the model's own (fused experts, ``.bin``) are loaded whole, by
    transformers, into host memory.
    """

    def __init__(self, model: str | Path, needed: Iterable[str], fused: Mapping[str, ExpertLayout]):
        """``needed`` are the names that will be asked for, ``fused`` the names of fused experts
        modules, whose matrices are asked for one by one. Raises ModelError when one is missing."""
        self._fused = dict(fused)
        source, local = resolve_model(model)
        if not local:
            from huggingface_hub import snapshot_download

            source = snapshot_download(source, allow_patterns=["*.json", "*.safetensors"])
        files = sorted(Path(source).glob("*.safetensors"))
        self.headers = read_headers(files)
        self._files = {}
        for file in files:
            with safe_open(file, "pt") as tensors:
                self._files.update(dict.fromkeys(tensors.keys(), file))
        self._whole: dict[str, torch.Tensor] = {}
        missing = [name for name in needed if name not in self._files]
        if missing:
            whole = load_model(model, None, "cpu")
            self._whole = dict(whole.named_parameters(remove_duplicate=False))
            self._whole |= self._experts()
            missing = [name for name in missing if name not in self._whole]
        if missing:
            raise ModelError(f"{model}: {missing[0]} is in no file ({len(missing)} such tensors)")

    def _experts(self) -> dict[str, torch.Tensor]:
        """The matrices of each expert, as slices of the fused parameters."""
        found = {}
        for prefix, layout in self._fused.items():
            pairs, downs = (self._whole[f"{prefix}.{n}"] for n in ("gate_up_proj", "down_proj"))
            for e, (pair, down) in enumerate(zip(pairs, downs, strict=True)):
                gate, up = pair.chunk(2)
                for part, tensor in ((layout.gate, gate), (layout.up, up), (layout.down, down)):
                    found[f"{prefix}.{e}.{part}.weight"] = tensor
        return found

    def has(self, name: str) -> bool:
        return name in self._whole or name in self._files

    def get(self, name: str) -> torch.Tensor:
        """One tensor, in its own dtype, on the CPU."""
        if name in self._whole:
            return self._whole[name].detach()
        with safe_open(self._files[name], "pt") as file:
            return file.get_tensor(name)


class _StandIn(nn.Module):
    """Takes a block's place in the model and lends its attributes."""

    def __init__(self, block: nn.Module):
        super().__init__()
        self.__dict__["_block"] = block

    def __getattr__(self, name: str):
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(self.__dict__["_block"], name)


class _Recorder(_StandIn):
    """Notes its arguments and returns its input."""

    def __init__(self, block: nn.Module, calls: list):
        super().__init__(block)
        self._calls = calls

    def forward(self, hidden_states: torch.Tensor, *args, **kwargs) -> torch.Tensor:
        self._calls.append((hidden_states, args, kwargs))
        return hidden_states


class _Constant(_StandIn):
    """Returns the outputs of a block that was run elsewhere."""

    def __init__(self, block: nn.Module, outputs: torch.Tensor):
        super().__init__(block)
        self.outputs = outputs

    def forward(self, *args, **kwargs) -> torch.Tensor:
        return self.outputs


class BlockStream:
    """The skeleton of a transformers causal language model, its blocks filled one by one.

    Args:
        model: checkpoint folder or hub id.
        dtype, device: of the computation.
    """

    def __init__(self, model: str | Path, dtype: torch.dtype, device: str):
        from accelerate import init_empty_weights
        from transformers import AutoConfig, AutoModelForCausalLM

        self.source, self.dtype, self.device = model, dtype, device
        name, local = resolve_model(model)
        config = AutoConfig.from_pretrained(name, local_files_only=local)
        with init_empty_weights(include_buffers=False):
            self.model = AutoModelForCausalLM.from_config(config, dtype=dtype).eval()
        self.model.requires_grad_(False)
        fused = separate_experts(self.model)
        self.prefix = block_prefix(self.model)
        self.blocks: nn.ModuleList = self.model.get_submodule(self.prefix)
        self.weights = Weights(model, self._stored(), fused)
        self._arguments: list[tuple] = []
        self._recorded = 0

    def _stored(self) -> list[str]:
        """Names of the parameters that the files must hold: each tied one once."""
        return [name for name, _ in self.model.named_parameters()]

    @property
    def vocab_size(self) -> int:
        return self.model.get_input_embeddings().num_embeddings

    def block_name(self, index: int) -> str:
        return f"{self.prefix}.{index}"

    def fill(self, module: nn.Module, prefix: str, dtype: torch.dtype, device: str) -> None:
        """Load every parameter of ``module``, called ``prefix`` in the files."""
        for name, parameter in list(module.named_parameters()):
            tensor = self.weights.get(f"{prefix}.{name}" if prefix else name)
            if tensor.shape != parameter.shape:
                raise ModelError(
                    f"{prefix}.{name} has shape {list(tensor.shape)}, expected"
                    f" {list(parameter.shape)}"
                )
            set_parameter(module, name, tensor.to(device=device, dtype=dtype))
        for buffer_name, buffer in list(module.named_buffers()):
            owner, _, leaf = buffer_name.rpartition(".")
            module.get_submodule(owner)._buffers[leaf] = buffer.to(device)

    @contextmanager
    def block(self, index: int) -> Iterator[nn.Module]:
        """Block ``index`` with its weights on the device; they are dropped afterwards."""
        block = self.blocks[index]
        self.fill(block, self.block_name(index), self.dtype, self.device)
        try:
            yield block
        finally:
            block.to("meta")

    @torch.no_grad()
    def embed(self, windows: torch.Tensor, batch: int) -> torch.Tensor:
        """Inputs of the first block, [windows, tokens, D] on the CPU; records the arguments of all
        blocks on the way."""
        base = self.model.base_model
        head = self.model.get_output_embeddings()
        for name, child in self.model.named_modules():
            inside = name.startswith(self.prefix + ".") or child is head
            if not inside and next(child.parameters(recurse=False), None) is not None:
                self.fill(_own(child), name, self.dtype, self.device)
        for module in base.modules():
            for leaf, buffer in module._buffers.items():
                if buffer is not None:
                    module._buffers[leaf] = buffer.to(self.device)
        kept = list(self.blocks)
        hidden = []
        try:
            for group in windows.split(batch):
                calls: list = []
                for index, block in enumerate(kept):
                    self.blocks[index] = _Recorder(block, calls)
                base(input_ids=group.to(self.device), use_cache=False)
                hidden.append(calls[0][0].cpu())
                if not self._arguments:
                    self._arguments = [(args, kw) for _, args, kw in calls]
                    self._recorded = len(group)
        finally:
            for index, block in enumerate(kept):
                self.blocks[index] = block
        return torch.cat(hidden)

    def run(self, index: int, block, hidden: torch.Tensor) -> torch.Tensor:
        """Output of a block for at most as many windows as :meth:`embed` ran at once.

        ``block`` is the module, or a function that is called in its place. Windows are alike but
        for their tokens, so the recorded arguments are cut to fewer windows, and follow the dtype.
        """

        def fit(value):
            if not isinstance(value, torch.Tensor):
                return value
            if value.dim() and value.shape[0] == self._recorded > 1:
                value = value[: len(hidden)]
            return value.to(hidden.dtype) if value.is_floating_point() else value

        args, kwargs = tree_map(fit, self._arguments[index])
        out = block(hidden, *args, **kwargs)
        return out[0] if isinstance(out, tuple) else out

    @torch.no_grad()
    def last_hidden(self, windows: torch.Tensor, outputs: torch.Tensor) -> torch.Tensor:
        """What the output head sees, given the last block's ``outputs`` for a few windows."""
        kept = list(self.blocks)
        try:
            for index, block in enumerate(kept):
                self.blocks[index] = _Constant(block, outputs)
            base = self.model.base_model
            return base(input_ids=windows.to(self.device), use_cache=False).last_hidden_state
        finally:
            for index, block in enumerate(kept):
                self.blocks[index] = block

    def head(self) -> tuple[str, nn.Linear | None]:
        """The output head and its name; None where the model has none."""
        head = self.model.get_output_embeddings()
        names = [name for name, module in self.model.named_modules() if module is head]
        return (names[0], head) if head is not None else ("", None)

    def head_weight(self) -> torch.Tensor:
        """The output head's weight; a tied one is the embedding's."""
        name, _ = self.head()
        if self.weights.has(f"{name}.weight"):
            return self.weights.get(f"{name}.weight")
        embedding = self.model.get_input_embeddings()
        owner = next(n for n, m in self.model.named_modules() if m is embedding)
        return self.weights.get(f"{owner}.weight")


def separate_experts(model: nn.Module) -> dict[str, ExpertLayout]:
    """Give every fused experts module of a skeleton one linear layer a matrix, on the meta device;
    returns the names of the modules."""
    found = {}
    for name, module in list(model.named_modules()):
        layout = LAYOUTS.get(type(module).__name__)
        if layout is None:
            continue
        layers = {
            expert: nn.Linear(shape.K, shape.N, bias=False, device="meta")
            for expert, shape in layout.shapes(module).items()
        }
        model.set_submodule(name, QuantExperts(module, layers).eval().requires_grad_(False))
        found[name] = layout
    return found


def _own(module: nn.Module) -> nn.Module:
    """A module with only the parameters and buffers that ``module`` itself holds."""
    holder = nn.Module()
    holder.__dict__["_parameters"] = module._parameters
    holder.__dict__["_buffers"] = module._buffers
    return holder


def set_parameter(module: nn.Module, name: str, tensor: torch.Tensor) -> None:
    """Put ``tensor`` in the place of the parameter ``name``, without gradient."""
    owner, _, leaf = name.rpartition(".")
    parameter = nn.Parameter(tensor, requires_grad=False)
    module.get_submodule(owner)._parameters[leaf] = parameter


def block_prefix(model: nn.Module) -> str:
    """Name of the list of decoder blocks: the module list with the most linear layers."""
    counts: dict[str, int] = {}
    for name, module in model.named_modules():
        match = re.match(r"(.*?)\.\d+\.", name)
        if match and isinstance(module, nn.Linear):
            counts[match[1]] = counts.get(match[1], 0) + 1
    if not counts:
        raise ModelError(f"{type(model).__name__} has no list of blocks with linear layers")
    return max(counts, key=counts.get)
