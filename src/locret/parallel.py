"""One model on several processes: joining them, shares of a layer's heads, weights that are gathered when needed.

tensor parallel   transformers' `tp_plan="auto"` (or torch's `parallelize_module`): every process runs every token with
                  its own share of each layer's heads. The seam then shows local heads, a `Shard` says which.
FSDP2             torch's `fully_shard`: every process keeps a share of the backbone's weights, gathers those of a layer
                  that runs, and reads samples of its own. Heads of all processes are whole and equal in both.

`torchrun` starts the processes and sets their environment.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from locret.errors import ConfigError


def joined() -> bool:
    """Whether this process belongs to a group of several."""
    return dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1


def join() -> bool:
    """Join the group of `torchrun` unless somebody did before; whether there is one.

    Tensors on a GPU then go over NCCL, everything else over gloo.
    """
    if not dist.is_available():
        return False
    if not dist.is_initialized():
        if int(os.environ.get("WORLD_SIZE", "1")) == 1:
            return False
        device = local_device()
        if device is not None:
            torch.cuda.set_device(device)
        dist.init_process_group("cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo")
    return True


def leave() -> None:
    """At the end of a process that joined: NCCL complains about groups that are never left."""
    if dist.is_available() and dist.is_initialized():
        dist.destroy_process_group()


def local_device() -> str | None:
    """The GPU that `torchrun` means for this process, "cuda:2"; None without it."""
    rank = os.environ.get("LOCAL_RANK")
    return None if rank is None or not torch.cuda.is_available() else f"cuda:{rank}"


# ---------------------------------------------------------------------- tensor parallel


@dataclass(frozen=True)
class Shard:
    """Part `rank` of `size` equal parts of every layer's heads; the whole where size is 1."""

    rank: int = 0
    size: int = 1

    @classmethod
    def of(cls, config: Any, num_q_heads: int, num_kv_heads: int) -> Shard:
        """From the heads that a model's configuration names and those that its attention was given here.

        Raises: ConfigError: they are no equal share of this group.
        """
        if not joined():
            return cls()
        whole_q = config.num_attention_heads
        whole_kv = getattr(config, "num_key_value_heads", None) or whole_q
        if (num_q_heads, num_kv_heads) == (whole_q, whole_kv):
            return cls()
        size = dist.get_world_size()
        if (num_q_heads * size, num_kv_heads * size) != (whole_q, whole_kv):
            raise ConfigError(
                f"this process has {num_q_heads} of {whole_q} query heads and {num_kv_heads} of {whole_kv} KV heads, "
                f"but there are {size} processes; use as many as divide both, and one tensor-parallel group"
            )
        return cls(dist.get_rank(), size)

    def part(self, x: Tensor, dim: int) -> Tensor:
        """This process's part of `x` along `dim`; a view."""
        return x if self.size == 1 else x.chunk(self.size, dim)[self.rank]

    def sum(self, x: Tensor) -> Tensor:
        """The sum of everybody's `x`, and of everybody's gradient in the backward pass; `x` itself may be changed."""
        if self.size == 1:
            return x
        if x.requires_grad:
            total: Tensor = _Sum.apply(x)
            return total
        dist.all_reduce(x)
        return x

    def least(self, number: int, device: torch.device) -> int:
        """The smallest of everybody's numbers; `device`: where the group's tensors lie."""
        if self.size == 1:
            return number
        found = torch.tensor(number, device=device)
        dist.all_reduce(found, dist.ReduceOp.MIN)
        return int(found)

    def join(self, x: Tensor, whole: bool = False) -> Tensor:
        """Everybody's `x` side by side along the last dimension; `whole`: it is that already."""
        if self.size == 1 or whole:
            return x
        parts = [torch.empty_like(x) for _ in range(self.size)]
        dist.all_gather(parts, x.contiguous())
        return torch.cat(parts, -1)


def local_part(weight: Tensor) -> Tensor | None:
    """What this process holds of a tensor-parallel weight; None: it is something else."""
    if not joined():
        return None
    from torch.distributed.tensor import DTensor

    return weight.to_local() if isinstance(weight, DTensor) else None


class _Sum(torch.autograd.Function):
    """Everybody goes on with the whole sum, so everybody's gradient belongs to each addend."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        total = x.clone(memory_format=torch.contiguous_format)
        dist.all_reduce(total)
        return total

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:
        total = gradients[0].clone(memory_format=torch.contiguous_format)
        dist.all_reduce(total)
        return total


# ---------------------------------------------------------------------- FSDP2


def shard_weights(model: Any, layers: list[nn.Module]) -> None:
    """Spread the weights of a causal language model over the group, its decoder `layers` one by one (FSDP2).

    Before a `Backbone` is made of it on a GPU, which may keep whole weights. They go to this process's GPU where there
    is one. The output matrix stays where it is and whole: passes that make no logits do not read it.
    Raises: ConfigError: there is no group.
    """
    if not join():
        raise ConfigError("weights are spread over processes: start several with torchrun --nproc-per-node")
    from torch.distributed.fsdp import fully_shard

    mesh = dist.init_device_mesh("cuda" if torch.cuda.is_available() else "cpu", (dist.get_world_size(),))
    for layer in layers:
        fully_shard(layer, mesh=mesh)
    fully_shard(model.base_model, mesh=mesh)


def gathers_weights(model: Any) -> bool:
    """Whether a forward pass of `model` needs all processes (`shard_weights`)."""
    if not joined():
        return False
    from torch.distributed.fsdp import FSDPModule

    return isinstance(model.base_model, FSDPModule)
