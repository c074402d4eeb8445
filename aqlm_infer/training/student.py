"""The model under training: every quantized layer computes with a dense copy of its weight.

One optimiser step (docs/notes/tuning.md), stack of layers by stack of layers:

    backward on the copy Wd -> G;  dC, ds by the chain rule, Buf.grad = G;  optimiser;
    V step towards Buf;  Buf <- d What + (1 - d) Buf;  Wd <- What
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace

import torch
from torch import nn
from torch.optim import Optimizer

from ..integrations.moe import QuantExperts
from ..layers import quantized_layers
from .layer import Gathered, Master, TunedLayer, TunedStack, quantized, stacked
from .parallel import Parallel
from .representation import TuningError
from .settings import TuneSettings
from .vstep import Choice, Moved


class Student:
    """A transformers model whose quantized layers are ``TunedLinear``, and its masters.

    Args:
        model: with quantized layers, its other parameters float32; changed in place.
        settings: which parameters train, and how codes move.
        dtype: that the model computes in; masters are float32.
        parallel: the ranks to spread over, or None.

    Attributes:
        layers: every quantized layer by name; on several ranks only the owner has its ``stack``.
        stacks: those that are updated together, of all ranks.
        others: masters of the unquantized parameters that train (and that this rank owns).
        fixed: float32 values of the unquantized parameters that do not.

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
        found = enumerate(quantized_layers(model))
        self.layers = {n: TunedLayer(n, number, y) for number, (n, y) in found}
        if not self.layers:
            raise TuningError("the model has no quantized layer")
        self.choice = Choice.of(settings) if settings.rule.moves_codes else None
        free = {n: p for n, p in model.named_parameters() if self._free(n)}
        names = self._trainable(free)
        self.owners = self._owners({n: free[n].numel() for n in names})
        apart = settings.optimizer != "lamb"
        self.stacks = [
            TunedStack(group, settings.rule, dtype, apart)
            for group in stacked(list(self.layers.values()))
        ]
        for name, layer in self.layers.items():
            model.set_submodule(name, layer.module)
        self._split(free, names, dtype)
        for parameter in model.parameters():
            parameter.requires_grad_(False)
        for parameter in [*self.copies.values(), *(y.weight for y in self.layers.values())]:
            parameter.requires_grad_(True)
        self.root: Callable | None = None
        if parallel is None:
            several = (settings.microbatch or settings.batch) < settings.batch
            for layer in self.layers.values():
                layer.gathered = Gathered(layer.weight, several)
            self.gathered = {
                n: Gathered(p, several) for n, p in self.copies.items() if p is not self.others[n]
            }
        else:
            for stack in self.stacks:
                if stack.owner != parallel.rank:
                    stack.drop()
                stack.weights = None
            self.others = {n: p for n, p in self.others.items() if self._mine(n)}
            self.root = parallel.shard(model)

    def _owners(self, others: dict[str, int]) -> dict[str, int]:
        """The rank that has the masters of each layer and of ``others`` (sizes by name)."""
        sizes = {n: y.layer.in_features * y.layer.out_features for n, y in self.layers.items()}
        if self.parallel is None:
            return dict.fromkeys(sizes | others, 0)
        owners = self.parallel.owners(sizes | others)
        for name, layer in self.layers.items():
            layer.owner = owners[name]
        return owners

    def _mine(self, name: str) -> bool:
        return self.parallel is None or self.owners[name] == self.parallel.rank

    def _split(self, free: dict[str, nn.Parameter], names: list[str], dtype: torch.dtype) -> None:
        """Masters apart from what computes, where that is not float32 on one rank."""
        self.others: dict[str, nn.Parameter] = {}
        self.copies = {name: free[name] for name in names}
        self.fixed: dict[str, torch.Tensor] = {}
        for name, parameter in free.items():
            whole = parameter.detach().float()
            if name not in self.copies:
                self.fixed[name] = whole
            elif self.parallel is None and dtype == torch.float32:
                self.others[name] = parameter
                continue
            else:
                self.others[name] = nn.Parameter(whole.clone())
            parameter.data = whole.to(dtype)

    def run(self, function: Callable):
        """``function()`` where the model's weights are there to compute with."""
        return function() if self.root is None else self.root(function)

    # -- parameters --------------------------------------------------------------------------------

    def _trainable(self, free: dict[str, nn.Parameter]) -> list[str]:
        """Names of the unquantized parameters to train (a tied one once)."""
        if self.tied and ("embeddings" in self.settings.train) != ("head" in self.settings.train):
            raise TuningError(
                f"train={','.join(self.settings.train)}: this model's head is its embeddings,"
                " name both or neither"
            )
        return [n for n, p in free.items() if self._kind(n, p) in self.settings.train]

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

    def masters(self) -> list[Master]:
        """Every float32 master of this rank."""
        found = [m for stack in self.stacks for m in stack.masters]
        return found + [Master((name,), p) for name, p in self.others.items()]

    def parameters(self) -> Iterator[tuple[str, torch.Tensor, bool]]:
        """Every master of this rank by name: (name, tensor, is it a buffer?)."""
        for master in self.masters():
            for name, tensor in master.slices().items():
                yield name, tensor, master.buffer

    # -- one step ----------------------------------------------------------------------------------

    def gradients(self) -> dict[str, torch.Tensor]:
        """G of this rank's layers and of what else it trains, once the microbatches are through.

        They are given away: the student keeps none.
        """
        if self.parallel is not None:
            return self._gather_gradients()
        found = {name: layer.gathered.take() for name, layer in self.layers.items()}
        for name in self.others:
            if name in self.gathered:
                found[name] = self.gathered[name].take()
            else:
                found[name] = self.others[name].grad
        return self._checked(found)

    def _checked(self, found: dict[str, torch.Tensor | None]) -> dict[str, torch.Tensor]:
        for name in self.layers:
            if name in found and found[name] is None:
                raise TuningError(f"{name} got no gradient: the model did not use it")
        return {name: gradient for name, gradient in found.items() if gradient is not None}

    def _gather_gradients(self) -> dict[str, torch.Tensor]:
        found: dict[str, torch.Tensor | None] = {}
        held = {n: y.weight for n, y in self.layers.items()} | self._sharded()
        for name, parameter in held.items():
            full = None if parameter.grad is None else parameter.grad.full_tensor()
            parameter.grad = None
            if self._mine(name):
                found[name] = full
        return self._checked(found)

    def _sharded(self) -> dict[str, nn.Parameter]:
        """The sharded parameters behind ``copies``."""
        held = dict(self.model.named_parameters())
        return {name: held[name] for name in self.copies}

    def spread(self, gradients: dict[str, torch.Tensor], stack: TunedStack | None) -> None:
        """``.grad`` of the masters of a stack, or (None) of the unquantized parameters."""
        if stack is None:
            for name, master in self.others.items():
                found = gradients.pop(name, None)
                master.grad = None if found is None else found.float()
            return
        each = [gradients.pop(name) for name in stack.names]
        stack.spread_gradients(each, self.settings.sigmoid_temperature)

    def update(
        self, gradients: dict[str, torch.Tensor], optimizer: Optimizer, step: int
    ) -> list[Moved]:
        """The optimiser's step number ``step``, V steps, and what computes anew.

        Takes ``gradients`` apart on the way, so that those of one stack are float32 at a time.
        Returns what the V steps of this rank did, without their words.
        """
        if self.settings.poison:
            with torch.no_grad():
                for layer in self.layers.values():
                    layer.weight.fill_(torch.nan)
        self.spread(gradients, None)
        optimizer.step()
        for master in self.others.values():
            master.grad = None
        moved = []
        for stack in self.stacks:
            if stack.rep is None:
                continue
            self.spread(gradients, stack)
            optimizer.step()
            words = None
            if self.choice is not None:
                seeds = [(self.settings.seed, step, layer.number) for layer in stack.layers]
                done = stack.choose_codes(self.choice, seeds)
                words = done.words
                moved.append(replace(done, words=None))
            stack.forget_gradients()
            if self.parallel is None:
                stack.refresh(words)
        self._refresh_others()
        if self.parallel is not None:
            self._refresh_sharded()
        return moved

    @torch.no_grad()
    def refresh(self) -> None:
        """What computes <- the masters."""
        if self.parallel is None:
            for stack in self.stacks:
                stack.refresh()
        else:
            self._refresh_sharded()
        self._refresh_others()

    @torch.no_grad()
    def _refresh_others(self) -> None:
        if self.parallel is None:
            for name in self.gathered:
                self.copies[name].copy_(self.others[name])

    @torch.no_grad()
    def _refresh_sharded(self) -> None:
        for stack in self.stacks:
            full = [None] * len(stack.names) if stack.rep is None else stack.rep.weight()
            for layer, weight in zip(stack.layers, full, strict=True):
                self._broadcast(layer.name, layer.weight, weight)
        for name, parameter in self._sharded().items():
            full = self.others[name].detach() if name in self.others else None
            self._broadcast(name, parameter, full)

    def _broadcast(self, name: str, parameter: nn.Parameter, full: torch.Tensor | None) -> None:
        if full is None:
            local = parameter.to_local()
            full = torch.empty(parameter.shape, dtype=local.dtype, device=local.device)
        full = full.to(parameter.dtype).contiguous()
        self.parallel.spread(parameter, full, self.owners[name])

    # -- the result --------------------------------------------------------------------------------

    def export(self, dtype: torch.dtype) -> nn.Module:
        """The model with quantized layers again, every parameter in ``dtype``: ends the training.

        Buffers such as rotary frequencies keep their dtype, as after ``from_pretrained``. Only for
        a student on one rank.
        """
        for parameter in self.model.parameters():
            parameter.requires_grad_(False)
            parameter.grad = None
        whole = self.fixed | self.others
        for name, layer in self.layers.items():
            bias = whole.pop(f"{name}.bias", None)
            self.model.set_submodule(name, quantized(layer, bias, dtype))
        held = dict(self.model.named_parameters())
        for name, tensor in whole.items():
            held[name].data = tensor.detach().to(dtype)
        self.model.config.dtype = dtype
        return self.model.eval()
