"""The model under training: every quantized layer computes with a dense copy of its weight.

One optimiser step for every layer (docs/notes/tuning.md):

    backward on the copy Wd -> G;  dC, ds by the chain rule, Buf.grad = G;  optimiser;
    V step towards Buf;  Buf <- d What + (1 - d) Buf;  Wd <- What
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import nn

from ..integrations.moe import QuantExperts
from ..layers import quantized_layers
from .layer import TunedLayer, quantized
from .parallel import Parallel
from .representation import TuningError
from .settings import TuneSettings
from .vstep import Choice, Moved


class Student:
    """A transformers model whose quantized layers are ``TunedLinear``, and its masters.

    Args:
        model: with quantized layers, its other parameters float32; changed in place.
        settings: which parameters train, and how codes move.
        dtype: that the quantized layers compute in.
        parallel: the ranks to spread over, or None.

    Attributes:
        layers: every quantized layer; on several ranks only the owner has its ``rep``.
        others: masters of the unquantized parameters that train (and that this rank owns).

    Raises TuningError when the model has nothing that can be tuned so.
    """

    def __init__(
        self,
        model: nn.Module,
        settings: TuneSettings,
        dtype: torch.dtype,
        parallel: Parallel | None = None,
    ):
        self.model, self.settings, self.parallel = model, settings, parallel
        if any(isinstance(m, QuantExperts) for m in model.modules()):
            raise TuningError("quantized experts cannot be tuned: only linear layers")
        found = dict(quantized_layers(model))
        if not found:
            raise TuningError("the model has no quantized layer")
        self.layers = {n: TunedLayer(y, n, settings.rule, dtype) for n, y in found.items()}
        for name, layer in self.layers.items():
            model.set_submodule(name, layer.module)
        self.choice = Choice.of(settings) if settings.rule.moves_codes else None
        self.others = self._trainable()
        for parameter in model.parameters():
            parameter.requires_grad_(False)
        for parameter in [*self.others.values(), *(y.weight for y in self.layers.values())]:
            parameter.requires_grad_(True)
        self.root: Callable | None = None
        if parallel is None:
            several = (settings.microbatch or settings.batch) < settings.batch
            for layer in self.layers.values():
                layer.collect_gradient(several)
        else:
            self._share(parallel)

    def _share(self, parallel: Parallel) -> None:
        """Give every master to one rank, and shard what computes."""
        sizes = {n: y.weight.numel() for n, y in self.layers.items()}
        self.trained = tuple(self.others)
        sizes |= {n: p.numel() for n, p in self.others.items()}
        self.owners = parallel.owners(sizes)
        for name, layer in self.layers.items():
            if self.owners[name] != parallel.rank:
                layer.drop()
            bias = layer.module.bias
            if bias is not None:  # FSDP2 wants one dtype a module; autocast makes it this one
                layer.module.bias = nn.Parameter(
                    bias.detach().to(layer.weight.dtype), requires_grad=bias.requires_grad
                )
        self.others = {
            name: nn.Parameter(parameter.detach().clone())
            for name, parameter in self.others.items()
            if self.owners[name] == parallel.rank
        }
        self.root = parallel.shard(self.model)

    def run(self, function: Callable):
        """``function()`` where the model's weights are there to compute with."""
        return function() if self.root is None else self.root(function)

    # -- parameters --------------------------------------------------------------------------------

    def _trainable(self) -> dict[str, nn.Parameter]:
        """The unquantized parameters to train, by name (a tied one once)."""
        kinds = {n: self._kind(n, p) for n, p in self.model.named_parameters() if self._free(n)}
        if self.tied and ("embeddings" in self.settings.train) != ("head" in self.settings.train):
            raise TuningError(
                f"train={','.join(self.settings.train)}: this model's head is its embeddings,"
                " name both or neither"
            )
        held = dict(self.model.named_parameters())
        return {n: held[n] for n, kind in kinds.items() if kind in self.settings.train}

    def _free(self, name: str) -> bool:
        """Whether this parameter is none of a quantized layer's own, but for its bias."""
        module, _, tensor = name.rpartition(".")
        return module not in self.layers or tensor == "bias"

    @property
    def tied(self) -> bool:
        head = self.model.get_output_embeddings()
        return head is not None and head.weight is self.model.get_input_embeddings().weight

    def _kind(self, name: str, parameter: nn.Parameter) -> str:
        if name.endswith(".bias"):
            return "biases"
        if parameter is self.model.get_input_embeddings().weight:
            return "embeddings"
        head = self.model.get_output_embeddings()
        if head is not None and parameter is head.weight:
            return "head"
        return "norms" if parameter.dim() == 1 else "linears"

    def parameters(self) -> Iterator[tuple[str, nn.Parameter, bool]]:
        """Every float32 master of this rank: (name, parameter, is it a buffer?)."""
        for name, layer in self.layers.items():
            if layer.rep is None:
                continue
            for value, parameter in layer.rep.values.items():
                yield f"{name}.{value}", parameter, False
            if layer.buffer is not None:
                yield f"{name}.buffer", layer.buffer, True
        for name, parameter in self.others.items():
            yield name, parameter, False

    # -- one step ----------------------------------------------------------------------------------

    def spread_gradients(self) -> None:
        """``.grad`` of every master, once the microbatches are through."""
        if self.parallel is not None:
            self._gather_gradients()
        for layer in self.layers.values():
            if layer.rep is None:
                continue
            if layer.gradient is None:
                raise TuningError(f"{layer.name} got no gradient: the model did not use it")
            layer.spread_gradient(self.settings.sigmoid_temperature)

    def _gather_gradients(self) -> None:
        held = dict(self.model.named_parameters())
        for layer in self.layers.values():
            full = layer.weight.grad.full_tensor()
            layer.weight.grad = None
            if layer.rep is not None:
                layer.gradient = full
        for name in self.trained:
            full = held[name].grad.full_tensor()
            held[name].grad = None
            if name in self.others:
                self.others[name].grad = full.float()

    def choose_codes(self, step: int) -> dict[str, Moved]:
        """V steps of this rank's layers after the optimiser's step number ``step``, then Wd anew.

        Returns what each did.
        """
        if self.settings.poison:
            with torch.no_grad():
                for layer in self.layers.values():
                    layer.weight.fill_(torch.nan)
        moved = {}
        for number, (name, layer) in enumerate(self.layers.items()):
            if self.choice is not None and layer.rep is not None:
                seed = (self.settings.seed, step, number)
                moved[name] = layer.choose_codes(self.choice, seed)
        self.refresh()
        for _, parameter, _ in self.parameters():
            parameter.grad = None
        return moved

    @torch.no_grad()
    def refresh(self) -> None:
        """What computes <- the masters."""
        if self.parallel is None:
            for layer in self.layers.values():
                layer.weight.copy_(layer.rep.weight())
            return
        held = dict(self.model.named_parameters())
        for name, layer in self.layers.items():
            full = None if layer.rep is None else layer.rep.weight()
            self._broadcast(name, layer.weight, full)
        for name in self.trained:
            full = self.others[name].detach() if name in self.others else None
            self._broadcast(name, held[name], full)

    def _broadcast(self, name: str, parameter: nn.Parameter, full: torch.Tensor | None) -> None:
        owner = self.owners[name]
        if owner != self.parallel.rank:
            local = parameter.to_local()
            full = torch.empty(parameter.shape, dtype=local.dtype, device=local.device)
        full = full.to(parameter.dtype).contiguous()
        self.parallel.spread(parameter, full, owner)

    # -- the result --------------------------------------------------------------------------------

    def export(self, dtype: torch.dtype) -> nn.Module:
        """The model with quantized layers again, every parameter in ``dtype``: ends the training.

        Buffers such as rotary frequencies keep their dtype, as after ``from_pretrained``. Only for
        a student on one rank.
        """
        for parameter in self.model.parameters():
            parameter.requires_grad_(False)
            parameter.grad = None
        for name, layer in self.layers.items():
            self.model.set_submodule(name, quantized(layer, dtype))
        for name, parameter in self.model.named_parameters():
            if name.rpartition(".")[0] not in self.layers:
                parameter.data = parameter.data.to(dtype)
        self.model.config.dtype = dtype
        return self.model.eval()
