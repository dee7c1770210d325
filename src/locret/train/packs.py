"""Short samples side by side in one forward pass: what works on tokens runs once, attention runs by samples.

    tokens      [ sample 0 | sample 1 | ... ]      one row; MLPs, norms, projections and heads see all of it
    attention   every sample over itself, from position 0; nothing of size tokens x tokens is made
    labels      every sample's own

Loss and gradient of a sample are those that it has alone, so packing is a matter of speed.

Shapes: T tokens of the whole pack, Hq / Hkv query / KV heads, D head dim.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Iterator, Sequence

import torch
from torch import Tensor

from locret.backbone import AttentionCall
from locret.data import Sample
from locret.heads import HeadInput
from locret.train.passes import Done, LabelContext, LabelPass, Visit

Pieces = list[tuple[int, Tensor]]  # by sample: its first token in the pack, its labels [1, Hkv, P]
PackVisit = Callable[[int, HeadInput, Pieces], None]


def length_of(sample: Sample) -> int:
    """Tokens of prompt and answer."""
    return len(sample.prompt_ids) + len(sample.answer_ids)


def in_packs(samples: Iterable[Sample], limit: int | None) -> Iterator[list[Sample]]:
    """Runs of neighbours of at most `limit` tokens together, longer samples alone; None: every sample alone."""
    pack: list[Sample] = []
    total = 0
    for sample in samples:
        if pack and (limit is None or total + length_of(sample) > limit):
            yield pack
            pack, total = [], 0
        pack.append(sample)
        total += length_of(sample)
    if pack:
        yield pack


class PackContext:
    """A `LayerContext` for several samples in one row: each has a `LabelContext` of its own.

    Args:
        contexts, lengths: by sample, in order; the lengths add up to T.
        visit: called in each learned layer as visit(layer, inputs of all T tokens, (start, labels) by sample).
        stop: raise `Done` once the last learned layer was visited.
    """

    def __init__(
        self, contexts: Sequence[LabelContext], lengths: Sequence[int], visit: PackVisit, *, stop: bool
    ) -> None:
        self.contexts, self.lengths, self.visit = contexts, lengths, visit
        self.layers, self.wants_hidden = contexts[0].layers, contexts[0].wants_hidden
        self.last = max(self.layers) if stop else None

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor, call: AttentionCall) -> Tensor:
        """q [1, Hq, T, D], k, v [1, Hkv, T, D] before RoPE -> [1, Hq, T, D]."""
        out = torch.empty_like(q)
        found: Pieces = []
        start = 0
        for context, length in zip(self.contexts, self.lengths, strict=True):
            here = slice(start, start + length)
            context.visit = functools.partial(_keep, found, start)
            out[:, :, here] = context.attend(layer, q[:, :, here], k[:, :, here], v[:, :, here], _part(call, here))
            start += length
        if layer in self.layers:
            self.visit(layer, HeadInput(q, k, v, call.hidden), found)
            if layer == self.last:
                raise Done
        return out


def _keep(found: Pieces, start: int, layer: int, inputs: HeadInput, labels: Tensor) -> None:
    found.append((start, labels))


def _part(call: AttentionCall, here: slice) -> AttentionCall:
    return call if call.hidden is None else call._replace(hidden=call.hidden[:, here])


def run_pack(run: LabelPass, samples: Sequence[Sample], visit: PackVisit) -> None:
    """One forward pass of several samples. Raises: DataError: they do not fit in the device's memory."""
    rows = [run.ids(sample) for sample in samples]
    lengths = [len(row) for row in rows]
    nothing: Visit = functools.partial(_keep, [], 0)  # the pack puts its own there
    contexts = [run.context(s, n, nothing, stop=False) for s, n in zip(samples, lengths, strict=True)]
    names = f"{samples[0].name} and {len(samples) - 1} more"
    run.run([token for row in rows for token in row], PackContext(contexts, lengths, visit, stop=run.stops), names)
