"""Where units begin, in Triton: at strides, or at addresses that a table holds. Meaning: scattered.py."""

# mypy: disable-error-code="no-untyped-def"
# a kernel's parameters are pointers, numbers and compile-time constants

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def pointer_at(entry, like, ALIGNED: tl.constexpr):
    """The pointer that a table holds, to numbers of `like`'s type; what is known to be aligned is loaded in one go."""
    pointer = tl.load(entry).to(tl.pointer_type(like.dtype.element_ty))
    if ALIGNED:
        pointer = tl.multiple_of(pointer, 16)
    return pointer


@triton.jit
def first_codes(codes, scale, zero, table, row, rows, heads, codes_b, codes_h, scale_b, scale_h):
    """Pointers to codes, scale and zero of a head's first unit: at strides, or what a table [3, rows] says."""
    if table is None:
        level = row // heads * scale_b + row % heads * scale_h
        return codes + row // heads * codes_b + row % heads * codes_h, scale + level, zero + level
    else:
        return (
            pointer_at(table + row, codes, False),
            pointer_at(table + rows + row, scale, False),
            pointer_at(table + 2 * rows + row, zero, False),
        )  # fmt: skip
