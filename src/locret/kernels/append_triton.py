"""`append` in Triton: a program a row and KV head copies its key, its value and its group's queries."""

# mypy: disable-error-code="no-untyped-def"
# a kernel's parameters are pointers, numbers and compile-time constants

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from locret.kernels.scattered import Scattered
from locret.kernels.scattered_triton import pointer_at
from locret.kernels.sizes import next_power_of_2


@triton.jit
def _append(
    q_ptr, k_ptr, v_ptr, k_slab, v_slab, at_ptr, stash_ptr, slot_ptr, heads,
    q_b, q_h, k_b, k_h, v_b, v_h, ks_b, ks_h, ks_t, vs_b, vs_h, vs_t, st_b, st_h, st_t,
    G: tl.constexpr, DIM: tl.constexpr, BLOCK: tl.constexpr, STASH: tl.constexpr, SCATTERED: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    batch, head = row // heads, row % heads
    at = tl.load(at_ptr + row)
    d = tl.arange(0, BLOCK)
    real = d < DIM
    key = tl.load(k_ptr + batch * k_b + head * k_h + d, mask=real, other=0.0)
    value = tl.load(v_ptr + batch * v_b + head * v_h + d, mask=real, other=0.0)
    if SCATTERED:  # the slabs are tables of addresses
        k_slab = pointer_at(k_slab + row, k_ptr, False)
        v_slab = pointer_at(v_slab + row, v_ptr, False)
    else:
        k_slab += batch * ks_b + head * ks_h
        v_slab += batch * vs_b + head * vs_h
    tl.store(k_slab + at * ks_t + d, key, mask=real)
    tl.store(v_slab + at * vs_t + d, value, mask=real)
    if STASH:
        slot = tl.load(slot_ptr + row)
        for g in range(G):
            query = tl.load(q_ptr + batch * q_b + (head * G + g) * q_h + d, mask=real, other=0.0)
            tl.store(stash_ptr + batch * st_b + (head * G + g) * st_h + slot * st_t + d, query, mask=real)


def append_triton(
    q: Tensor, k: Tensor, v: Tensor, k_slab: Tensor | Scattered, v_slab: Tensor | Scattered, at: Tensor,
    stash: Tensor | None, slot: Tensor,
) -> None:  # fmt: skip
    """`append` in one launch; every tensor's last dimension is contiguous."""
    batch, heads, _, dim = k.shape
    place = q if stash is None else stash
    scattered = isinstance(k_slab, Scattered)
    (k_slab, k_steps), (v_slab, v_steps) = (
        (x.table, (0, 0, dim)) if isinstance(x, Scattered) else (x, x.stride()[:3]) for x in (k_slab, v_slab)
    )
    _append[(batch * heads,)](
        q, k, v, k_slab, v_slab, at, place, slot, heads,
        *q.stride()[:2], *k.stride()[:2], *v.stride()[:2], *k_steps, *v_steps, *place.stride()[:3],
        G=q.shape[1] // heads, DIM=dim, BLOCK=next_power_of_2(dim), STASH=stash is not None,
        SCATTERED=scattered, num_warps=1,
    )  # fmt: skip
