"""Training on several devices of one host under ``torchrun``: FSDP2 for what computes, and one
owner for every master.

Each rank runs its share of a batch. Weights and gradients are sharded by FSDP2 (the teacher too).
Codes, values, buffers and optimiser state of a tensor live whole on one rank, as in the published
trainer: its gradient is gathered there, the optimiser and the V step run there, and the new weight
is broadcast. Codes are therefore chosen as on one device, rotated formats included, and checkpoints
load on any number of ranks.
"""

from __future__ import annotations

import os
from collections.abc import Mapping

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

from .representation import TuningError


class Whole(nn.Module):
    """A model as the root of FSDP2: whatever runs inside ``forward`` finds its weights whole."""

    def __init__(self, model: nn.Module):
        super().__init__()
        self.model = model

    def forward(self, function):
        return function()


class Parallel:
    """The process group of a run.

    Args:
        device: "cpu" (gloo) or "cuda" (NCCL); each rank takes its own GPU.

    Needs the environment of ``torchrun``; see ``wanted``.
    """

    def __init__(self, device: str = "cuda"):
        self.rank, self.size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
        kind = torch.device(device).type
        self.device = kind
        if kind == "cuda":
            local = int(os.environ["LOCAL_RANK"])
            torch.cuda.set_device(local)
            self.device = f"cuda:{local}"
        if not dist.is_initialized():
            dist.init_process_group("nccl" if kind == "cuda" else "gloo")
        self.mesh = init_device_mesh(kind, (self.size,))

    @staticmethod
    def wanted() -> bool:
        """Whether ``torchrun`` started this process as one of several."""
        return int(os.environ.get("WORLD_SIZE", "1")) > 1

    def stop(self) -> None:
        """End the process group."""
        dist.destroy_process_group()

    # -- collectives -------------------------------------------------------------------------------

    def sum(self, values: torch.Tensor) -> torch.Tensor:
        """The sum over ranks, the same on all."""
        dist.all_reduce(values)
        return values

    def barrier(self) -> None:
        dist.barrier()

    def gather_text(self, text: str) -> list[str]:
        """The texts of all ranks."""
        found: list[str] = [""] * self.size
        dist.all_gather_object(found, text)
        return found

    def owners(self, sizes: Mapping[str, int]) -> dict[str, int]:
        """The rank that owns each tensor: the largest first, to the rank with the least so far."""
        load, found = [0] * self.size, {}
        for name in sorted(sizes, key=lambda n: (-sizes[n], n)):
            found[name] = load.index(min(load))
            load[found[name]] += sizes[name]
        return found

    # -- models ------------------------------------------------------------------------------------

    def shard(self, model: nn.Module) -> Whole:
        """Shard a model by rows: its tuned layers, its blocks, and the rest as the root."""
        for block in blocks(model):
            for module in list(block.modules()):
                if hasattr(module, "compute_copy"):
                    self._fully_shard(module)
            self._fully_shard(block)
        return self._fully_shard(Whole(model))

    def shard_blocks(self, model: nn.Module) -> None:
        """Shard the blocks of a model that does not train; embeddings, norm and head stay whole."""
        for block in blocks(model):
            self._fully_shard(block)

    def _fully_shard(self, module: nn.Module) -> nn.Module:
        policy = MixedPrecisionPolicy(reduce_dtype=torch.float32)
        return fully_shard(module, mesh=self.mesh, reshard_after_forward=True, mp_policy=policy)

    def spread(self, parameter: torch.Tensor, full: torch.Tensor, owner: int) -> None:
        """Put the owner's ``full`` tensor into a sharded parameter (others pass an empty one)."""
        dist.broadcast(full, owner)
        local = parameter.to_local()
        parts = full.chunk(self.size)
        if self.rank < len(parts):
            local.copy_(parts[self.rank])


def blocks(model: nn.Module) -> nn.ModuleList:
    """The decoder blocks of a causal language model."""
    found = getattr(model.get_decoder(), "layers", None)
    if not isinstance(found, nn.ModuleList):
        raise TuningError(f"{type(model).__name__} has no list of decoder blocks to shard")
    return found
