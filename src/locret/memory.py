"""Memory of a device: how long a chunk may be, what its activations take, and what is free for them.

    bytes a token = SLACK * bytes of a number * (4 E + max(3 I, 4 Hq D + 3 Hkv D))

That is what transformers' modules hold at the peak of a layer: embeddings, the layer's input, the residual and the
normed input (4 E), beside them gate, up and their product (3 I), or in attention the queries four times over while
they are rotated and attended with, and the chunk's keys, rotated keys and values. Our own walk (`fused`) holds half of
it or less. One H200, three layers of Llama-3.1-8B's shape, a chunk of 3,072: 365 MB by the modules, 154 by the walk;
the formula without SLACK gives 365.

Shapes: E hidden size, I inner size of the MLP, Hq/Hkv heads, D head dim.
"""

from __future__ import annotations

from typing import Any

import torch

STEP = 256  # chunks that are made shorter are multiples of it, and no shorter than it
SLACK = 1.2  # the allocator's: blocks rounded up, and holes that nothing fits into
# bytes that a chunk of any length needs besides: cuBLAS's workspaces (70 MB), blocks of a second look at attention and
# of rotations that no kernel knows (up to 140 MB measured at a chunk of 256), a captured step
RESERVE = 256 * 2**20


def token_bytes(config: Any, q_heads: int, kv_heads: int, head_dim: int, itemsize: int) -> int:
    """Of the activations of one token of a chunk, see above. config: transformers', for E and I."""
    inner = max(3 * mlp_width(config), (4 * q_heads + 3 * kv_heads) * head_dim)
    return int(SLACK * itemsize * (4 * config.hidden_size + inner))


def mlp_width(config: Any) -> int:
    """I. In a mixture every expert that a token meets has numbers of its own, and a copy of the hidden states."""
    found = getattr(config, "intermediate_size", None) or 4 * config.hidden_size
    width = max(found) if isinstance(found, list | tuple) else found  # one a layer
    experts = getattr(config, "num_experts_per_tok", None) or 0
    own = getattr(config, "moe_intermediate_size", None) or width
    return int(max(width, experts * (own + config.hidden_size)))


def longest_chunk(free: int, each: int, most: int) -> int:
    """`most` tokens of `each` bytes if they fit, otherwise the largest multiple of STEP that does, at least STEP.

    >>> longest_chunk(10_000_000, 1000, 3072), longest_chunk(1_000_000, 1000, 3072), longest_chunk(-5, 1000, 3072)
    (3072, 768, 256)
    """
    if most * each <= free:
        return most
    return min(most, max(STEP, free // each // STEP * STEP))


def free_bytes(device: torch.device) -> int | None:
    """What this process may still allocate, what torch holds for whoever asks next included; None: not on a GPU."""
    if device.type != "cuda":
        return None
    free, total = torch.cuda.mem_get_info(device)
    reserved = torch.cuda.memory_reserved(device)
    allowed = int(torch.cuda.get_per_process_memory_fraction(device) * total) - reserved
    return min(free, allowed) + reserved - torch.cuda.memory_allocated(device)


def forget_workspaces() -> None:
    """cuBLAS has a workspace for every stream that it ever ran on, 32 MiB on Hopper; whoever comes next gets a new one.

    Around a capture: its workspace lies in the graph's own memory.
    """
    torch._C._cuda_clearCublasWorkspaces()
