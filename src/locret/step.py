"""One decode step of B rows whose units lie anywhere, as a replayed CUDA graph: nothing in it is decided on the host.

In a cache of fixed size every decode step is the same work at the same addresses; only how many units a layer holds
differs, and that is read on the device. So a step is captured once and then replayed: one launch for the whole model.
It appends k and v behind the units, attends over the slots in use, and counts up.

Whose units it reads may change: readers take a step and give it back (`take`), and the next one replays what was
captured for the last, if its slabs are found by address (`Scattered`, or the table of `Codes`).

Codes (`storage.Affine`) are written and read as such. A step encodes its unit first and attends to it as it is stored,
as every later step does; an ordinary step sees the newest unit, one of all, as it came. Scores are made from exact keys
and values in both, so these are stashed too.

Shapes: B rows, L layers, Hq/Hkv heads, R stashed steps, D head dim, V vocabulary.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from locret.backbone import AttentionCall, Backbone, Rope
from locret.kernels.append import append
from locret.kernels.append_codes import append_codes
from locret.kernels.decode_attention import MOST_ROWS, Angles, Codes, Slab, Span, decode_attention
from locret.kernels.switch import use_triton
from locret.memory import forget_workspaces
from locret.storage import Affine, Stored

Slabs = Callable[[int], "tuple[Slab, Slab]"]  # K and V of a layer, [B, Hkv, S, D] each
Kind = tuple[int, int, "Affine | None"]  # rows, stashed steps, codec
_KEPT_BYTES = 64 << 20  # of a step's stash, up to which it waits for the next reader
_KEPT = 8  # steps that wait at most


@dataclass(frozen=True)
class Stash:
    """What the scores of units that steps added are made from, until somebody asks for them."""

    q: Tensor  # [L, B, Hq, R, D]
    k: Tensor | None = None  # [L, B, Hkv, R, D]; None: the slabs have K and V as they are
    v: Tensor | None = None

    @classmethod
    def empty(cls, backbone: Backbone, rows: int, steps: int, *, coded: bool) -> Stash:
        """Room for R = `steps`. coded: the slabs hold codes."""

        def make(heads: int) -> Tensor:
            shape = (backbone.num_layers, rows, heads, steps, backbone.head_dim)
            return torch.zeros(shape, dtype=backbone.dtype, device=backbone.device)

        q = make(backbone.num_q_heads)
        return cls(q, make(backbone.num_kv_heads), make(backbone.num_kv_heads)) if coded else cls(q)

    def __len__(self) -> int:
        return self.q.shape[3]

    @property
    def tensors(self) -> list[Tensor]:
        """Those that there are: q, or q, k and v."""
        return [x for x in (self.q, self.k, self.v) if x is not None]

    @property
    def nbytes(self) -> int:
        return sum(x.nbytes for x in self.tensors)

    def row(self, i: int) -> Stash:
        """Of one row, a view."""
        return Stash(*(x[:, i : i + 1] for x in self.tensors))

    def layer(self, i: int) -> list[Tensor]:
        """q, or q, k and v, of a layer."""
        return [x[i] for x in self.tensors]


class Step:
    """One decode step of B rows, in buffers whose addresses never change.

    Everything that differs from step to step and from row to row is in `state`, int64 [(2 P + 2) L + 2, B, Hkv]:

        tables [2 L P]  addresses of the heads' slabs, K of all layers and then V; P parts, of codes 3 and else 1
        at       [L]    the slot of the next unit
        stop     [L]    the one behind it
        slot            of the stash
        advance         what a step adds to at, stop and slot: 1; 0 for a row that stands idle

    Args:
        stashed: R; 0: nothing is scored.
        codec: of the slabs; None: they hold numbers.
        capture: replay a CUDA graph; False: run the same step kernel by kernel (on a CPU, and for tests).
    """

    def __init__(
        self, backbone: Backbone, rows: int, stashed: int, codec: Affine | None = None, *, capture: bool
    ) -> None:
        layers, heads, device = backbone.num_layers, backbone.num_kv_heads, backbone.device
        self._backbone: Backbone | None = backbone
        self._slabs: Slabs | None = None
        self._codec, self._capture = codec, capture
        self._tokens = torch.zeros(rows, 1, dtype=torch.int64, device=device)
        sizes = [2 * layers * (1 if codec is None else 3), 2 * layers + 1, 1]
        self.state = torch.zeros(sum(sizes), rows, heads, dtype=torch.int64, device=device)
        self.tables, self._counters, self._advance = self.state.split(sizes)
        self._at, self._stop, slot = self._counters.split([layers, layers, 1])
        self._slot = slot[0]
        self.stash = Stash.empty(backbone, rows, stashed, coded=codec is not None) if stashed else None
        self._rope: Rope | None = None  # held, so that whoever comes next is given the same tables (`Backbone.rope`)
        self._angles: list[Angles | None] = []
        self._seen: list[int] = []  # addresses and sizes that the captured graph has in it
        self._graph: torch.cuda.CUDAGraph | None = None
        self._logits: Tensor | None = None

    def prepare(self, backbone: Backbone, rope: Rope, slabs: Slabs, seen: Sequence[int]) -> None:
        """A new capture if the rotation tables, or what the caller has `seen`, are not what they were.

        Args:
            slabs: of all rows.
            seen: what of the slabs a capture has in it.
        """
        self._backbone, self._slabs, self._rope = backbone, slabs, rope
        self._angles = [rope.angles(layer) for layer in range(backbone.num_layers)]
        now = [*seen, *(angles.cos.data_ptr() for angles in self._angles if angles is not None)]
        if self._capture and now != self._seen:
            self._record()
        self._seen = now

    def let_go(self) -> None:
        """Hold on to what was captured, and to nothing of whom it was captured for."""
        self._backbone = self._slabs = None

    def run(self, tokens: Tensor) -> Tensor:
        """Read one token a row, [B] on the device; returns logits [B, V] in memory that the next run may write over.

        Below 0 there is no token (`sampling.NO_TOKEN`): the host may not know yet that the row has failed.
        """
        torch.clamp(tokens[:, None], min=0, out=self._tokens)
        if self._graph is not None:
            self._graph.replay()
        else:
            self._logits = self._forward()
        assert self._logits is not None
        return self._logits

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor, call: AttentionCall) -> Tensor:
        """The `LayerContext` of a step."""
        assert self._slabs is not None
        keys, values = self._slabs(layer)
        self._append(layer, (q, k, v), keys, values)
        return decode_attention(
            q, keys, values, scale=call.scale, span=Span(stop=self._stop[layer]), angles=self._angles[layer],
            softcap=call.softcap,
        )  # fmt: skip

    def _append(self, layer: int, new: tuple[Tensor, Tensor, Tensor], keys: Slab, values: Slab) -> None:
        at, stash = self._at[layer], None if self.stash is None else self.stash.layer(layer)
        if isinstance(keys, Codes):
            assert isinstance(values, Codes)
            append_codes(*new, keys, values, at, stash, self._slot, self._encode)
            return
        assert not isinstance(values, Codes)
        append(*new, keys, values, at, None if stash is None else stash[0], self._slot)

    def _encode(self, x: Tensor) -> Codes:
        assert self._codec is not None, "slabs of codes have a codec"
        return codes(self._codec.encode(x), self._codec)

    def _forward(self) -> Tensor:
        assert self._backbone is not None
        logits = self._backbone.run(self._tokens, self)
        self._counters.add_(self._advance)
        assert logits is not None
        return logits[:, -1]

    def _record(self) -> None:
        before = self._counters.clone()
        forget_workspaces()
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            self._forward()  # compiles; what it writes, the first replay writes over
        torch.cuda.current_stream().wait_stream(side)
        self._counters.copy_(before)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            self._logits = self._forward()
        forget_workspaces()
        self._graph = graph  # only now: a capture that fails, such as for want of memory, leaves the old one


def take(backbone: Backbone, kind: Kind, *, owner: object) -> Step:
    """A step that waits, or a new one; it is given back when `owner` is gone."""
    idle = _IDLE.get(backbone, {})
    step = idle.pop(kind, None) or Step(backbone, *kind, capture=True)
    weakref.finalize(owner, _give, step, weakref.ref(backbone), kind).atexit = False
    return step


# Steps that nobody has at the moment.
_IDLE: WeakKeyDictionary[Backbone, dict[Kind, Step]] = WeakKeyDictionary()


def _give(step: Step, backbone: weakref.ref[Backbone], kind: Kind) -> None:
    step.let_go()  # not the model either, which would never be freed
    owner = backbone()
    if owner is not None and (step.stash is None or step.stash.nbytes <= _KEPT_BYTES):
        idle = _IDLE.setdefault(owner, {})
        idle.pop(kind, None)
        idle[kind] = step
        if len(idle) > _KEPT:
            del idle[next(iter(idle))]  # the one that has waited longest


def can_capture(backbone: Backbone) -> bool:
    """Under tensor parallelism a step talks to other processes; transformers' modules may wait for the device."""
    return backbone.fused is not None and backbone.device.type == "cuda" and backbone.shard.size == 1


def reads_tables(backbone: Backbone) -> bool:
    """Whether kernels find the rows. The torch paths go by the list of slabs: a capture would never see it change."""
    like = torch.empty(0, dtype=backbone.dtype, device=backbone.device)
    groups = backbone.num_q_heads // backbone.num_kv_heads
    fits = groups <= MOST_ROWS and backbone.dtype != torch.float64
    return fits and use_triton("append", like) and use_triton("decode_attention", like)


def codes(stored: Stored, codec: Affine) -> Codes:
    """Stored units, [B, Hkv, S, D], as attention reads them."""
    return Codes(stored.parts["codes"], stored.parts["scale"], stored.parts["zero"], codec.bits)
