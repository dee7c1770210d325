"""What an eviction method is: a score per unit, and where its paper has them, budgets and a selection of its own.

Pins, positions and bytes are not its job. Every slot besides the score has a default:

    score    how valuable is a unit?          each method's own
    budgets  how many stay in each layer?     the same number everywhere
    select   which stay?                      the best scores of each KV head
    reduce   what becomes of the others?      nothing: they are gone

Shapes: B batch, C new units (a chunk), P units cached before it, S = P + C, Hq/Hkv heads, D head dim, L layers.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import MISSING, Field, dataclass, fields
from typing import Any, ClassVar, TypeVar

from torch import Tensor

from locret.cache import Units
from locret.config import CachePlan
from locret.errors import ConfigError, unknown
from locret.heads import RetainingHeads
from locret.observe import AttentionProbe
from locret.reduce import Merged
from locret.select import select


@dataclass(frozen=True)
class ChunkView:
    """What a method may look at when a chunk has been appended to a layer, and no longer: queries are overwritten."""

    layer: int
    q: Tensor  # the chunk's queries before RoPE, [B, Hq, C, D]
    k: Tensor  # the chunk's keys before RoPE, [B, Hkv, C, D]
    v: Tensor  # [B, Hkv, C, D]
    start: int  # original position of the chunk's first token
    scale: float  # of the attention logits
    hidden: Tensor | None = None  # what the layer's projections read, [B, C, E]; for methods that want it
    joined: Joined | None = None  # for methods that score again what is cached

    @property
    def all(self) -> Joined:
        """All units, old and new; only for methods that set `rescoring`."""
        assert self.joined is not None, "the method does not say rescoring = True, nor reduces = True"
        return self.joined


@dataclass(frozen=True)
class Joined:
    """All units of a layer, the chunk's last: what a method sees that scores cached units again, or merges them."""

    units: Units  # k (before RoPE), v, score (of the P old units; 0 for new ones), position, state: [B, Hkv, S, ...]
    keys: Tensor  # rotated, [B, Hkv, S, D]
    attention: AttentionProbe  # of the chunk's queries over all units
    ahead: Callable[[Tensor], Tensor]  # x [B, H, T, D] at the angles of the T positions that follow


class Method:
    """A preset of the eviction slots; subclasses are frozen dataclasses whose fields are the method's options."""

    name: ClassVar[str]
    paper: ClassVar[str] = ""
    summary: ClassVar[str]
    variant: ClassVar[str] = ""  # how it differs from the paper, in a few words; chunked prefill makes many differ
    query_aware: ClassVar[bool] = False  # queries vote, the question's too where it is part of the prompt
    bounded_prefill: ClassVar[bool] = True
    trained: ClassVar[bool] = False
    evicts: ClassVar[bool] = True
    per_token: ClassVar[bool] = False  # True: a unit's score depends on its own token's q, k, v and position only
    replayable: ClassVar[bool] = False  # True: `score` launches the same for every chunk: it does not read `view.start`
    wants_hidden: ClassVar[bool] = False  # True: `ChunkView.hidden` is filled in
    wants_surprisal: ClassVar[bool] = False  # True: `score_tokens` is asked after the forward pass, `score` never
    rescoring: ClassVar[bool] = False  # True: `score` returns new scores for cached units too
    memoryless: ClassVar[bool] = (
        False  # True: and from what is there at the moment, so it is asked before evictions only
    )
    ragged: ClassVar[bool] = False  # True: `select` shares a layer's budget among its KV heads
    reduces: ClassVar[bool] = False  # True: `reduce` is asked instead of `select`
    state: ClassVar[
        tuple[str, ...]
    ] = ()  # numbers of its own that move with every unit: `view.all.units.state[..., i]`; BIAS is added to its logits

    def score(self, view: ChunkView) -> Tensor:
        """Scores of the new units, fp32 [B, Hkv, C], or of all S units when `rescoring`; higher is kept."""
        raise NotImplementedError

    def score_layers(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor | None:
        """`score` of all layers at once, for methods that are `per_token` and do not read `start`; None: one by one.

        q [L, B, Hq, T, D], k and v [L, B, Hkv, T, D], before RoPE. Returns: fp32 [L, B, Hkv, T].
        """
        return None

    def score_tokens(self, old: Tensor, surprisal: Tensor, *, evicting: bool) -> Tensor:
        """Scores of all units from what the model made of the chunk's tokens. old [B, Hkv, P]; surprisal [B, C], nats.

        Returns: fp32 [B, Hkv, S].
        """
        raise NotImplementedError

    def budgets(self, free: int, layers: int) -> list[int]:
        """How many units that are not pinned each layer may hold, where `free` would be the same everywhere.

        The sum must be free * layers: methods are compared at equal bytes.
        """
        return [free] * layers

    def select(self, scores: Tensor, budget: int, pinned: Tensor, view: ChunkView) -> Tensor:
        """Indices of what stays, ascending: [B, Hkv, budget], or flat [B, Hkv * budget] when `ragged`.

        scores: [B, Hkv, S], finite, -inf only where a ragged head is padded; pinned: bool, [B, Hkv, S].
        """
        return select(scores, budget, pinned)

    def reduce(self, scores: Tensor, budget: int, pinned: Tensor, view: ChunkView) -> tuple[Tensor, Merged]:
        """What stays, and what all S units become before the others are dropped. For methods that set `reduces`.

        A unit that takes over what others held has another key and value, and where `state` names BIAS another number
        added to its logits (-inf: no unit any more). Position and score stay its own. Pinned units must stay as they
        are, and so should all that represent themselves only: they are encoded once.

        Returns: indices as `select` gives them, and k, v [B, Hkv, S, D], bias [B, Hkv, S].
        """
        raise NotImplementedError

    def check(self, plan: CachePlan) -> None:
        """Raise a ConfigError when the options do not go with the cache's."""

    def check_free(self, free: int) -> None:
        """Raise a ConfigError when so many units per layer and KV head, all that are not pinned, are too few."""

    @property
    def made_for(self) -> dict[str, Any] | None:
        """`Backbone.fingerprint()` of the model that the method's files were made on; None: they do not say."""
        return None

    def describe(self) -> dict[str, Any]:
        """The options, for files: JSON values by name. Weights are not among them; files hold a digest of those."""
        return {field.name: _plain(getattr(self, field.name)) for field in option_fields(type(self))}


def option_fields(cls: type[Method]) -> list[Field[Any]]:
    """The fields that are options: not heads, which are files, nor what a method works out from its options."""
    return [field for field in fields(cls) if field.init and field.name != "heads"]  # type: ignore[arg-type]


def _plain(value: Any) -> Any:
    return list(value) if isinstance(value, tuple) else value


@dataclass(frozen=True)
class MethodInfo:
    """One line of `locret methods`."""

    name: str
    paper: str
    summary: str
    query_aware: bool
    bounded_prefill: bool
    trained: bool
    variant: str


BIAS = "bias"  # of `Method.state`: the number that attention adds to a unit's logits
M = TypeVar("M", bound=type[Method])
_METHODS: dict[str, type[Method]] = {}


def register(name: str) -> Callable[[M], M]:
    """Class decorator: makes a method known under `name` to the CLI, the docs table and the contract tests."""

    def add(cls: M) -> M:
        assert name not in _METHODS, f"two methods named {name}"
        cls.name = name
        _METHODS[name] = cls
        return cls

    return add


def find_method(name: str) -> type[Method]:
    """The class of a method; a ConfigError that names the nearest for unknown names."""
    if name not in _METHODS:
        raise unknown("method", name, _METHODS)
    return _METHODS[name]


def wants_heads(name: str, base: str | Method | None = None) -> bool:
    """Whether a method scores with retaining heads, by itself or through the method that it is told to score as."""
    cls = find_method(name)
    if issubclass(cls, Wrapped):
        chosen = cls.base if base is None else base
        return isinstance(chosen, str) and chosen != "" and wants_heads(chosen)
    return "heads" in [field.name for field in fields(cls)]  # type: ignore[arg-type]


def get_method(name: str, *, heads: RetainingHeads | None = None, **options: Any) -> Method:
    """The method called `name`, with its options; `base.x` is option x of the method that it scores as.

    Raises: ConfigError: unknown name or option (the nearest is named), or a trained method without heads.
    """
    cls = find_method(name)
    if issubclass(cls, Wrapped):
        options = _with_base(cls, heads, options)
    names = [field.name for field in option_fields(cls)]
    for key in options:
        if key not in names:
            raise unknown(f"option of method {name}", key, names)
    if wants_heads(name):
        if heads is None:
            raise ConfigError(f"method {name!r} needs heads trained for this model; give --heads FOLDER, train some "
                              "with `locret train`, or choose a training-free method: "
                              + ", ".join(sorted(n for n, c in _METHODS.items() if not c.trained)))  # fmt: skip
        options = {**options, "heads": heads}
    return cls(**options)


def list_methods() -> list[MethodInfo]:
    """All methods, by name."""
    return [
        MethodInfo(*(getattr(cls, field.name) for field in fields(MethodInfo))) for _, cls in sorted(_METHODS.items())
    ]


def method_options(name: str) -> dict[str, Any]:
    """The options of a method and their defaults, in order; without heads, which are files."""
    return {field.name: field.default for field in option_fields(find_method(name)) if field.default is not MISSING}


def method_slots(name: str) -> dict[str, str]:
    """What a method puts into each slot, in words."""
    cls = find_method(name)

    def own(slot: str) -> bool:
        return getattr(cls, slot) is not getattr(Method, slot)

    shared = " and ".join(["per layer"] * own("budgets") + ["per KV head"] * cls.ragged)
    reads = "the logits of every token, after the forward pass" if cls.wants_surprisal else (
        "all units after every chunk" if cls.rescoring else "new units, once")  # fmt: skip
    return {
        "score": "none: nothing is evicted" if not cls.evicts else reads,
        "budget": shared + ", same total" if shared else "uniform",
        "select": "its own" if cls.reduces or (own("select") and not cls.ragged) else "best scores",
        "reduce": "dropped units are merged into others" if cls.reduces else "none: what is dropped is gone",
        "state": ", ".join(cls.state) or "none",
    }


def positive(method: str, **options: int) -> None:
    """Raise a ConfigError for an option that is not a whole number above 0."""
    for name, value in options.items():
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            raise ConfigError(f"{method}: {name} is {value!r}; it must be a whole number >= 1")


def within(method: str, low: float, high: float, **options: float) -> None:
    """Raise a ConfigError for an option outside low .. high."""
    for name, value in options.items():
        if isinstance(value, bool) or not isinstance(value, int | float) or not low <= value <= high:
            raise ConfigError(f"{method}: {name} is {value!r}; it must be a number from {low:g} to {high:g}")


def one_of(method: str, allowed: tuple[str, ...], **options: str) -> None:
    """Raise a ConfigError for an option that is none of the allowed names."""
    for name, value in options.items():
        if value not in allowed:
            raise unknown(f"{method}: {name}", str(value), allowed)


def window_fits(method: str, window: int, plan: CachePlan) -> None:
    """Raise a ConfigError for a window of queries that no chunk is long enough for."""
    if window > plan.chunk_size:
        raise ConfigError(f"{method}: window {window} is larger than the chunk ({plan.chunk_size} tokens); "
                          f"allowed are 1 to {plan.chunk_size}, or raise chunk_size")  # fmt: skip


BASE = "base."  # before the options of a method that another one scores as


class Wrapped(Method):
    """A method that scores as another one does and has a slot of its own besides.

    Its dataclass has a field `base`: a method's name, or a `Method` with options (and heads).
    """

    base: str | Method
    scores: Method  # the one that does
    heads: Any  # its weights, None for most; by this name a saved context knows whose weights it was made with

    def __post_init__(self) -> None:
        scores = self._scores()
        if (
            not scores.evicts
            or scores.ragged
            or scores.wants_surprisal
            or scores.reduces
            or isinstance(scores, Wrapped)
        ):
            raise ConfigError(f"{self.name}: base {scores.name!r} does not score units by itself")
        object.__setattr__(self, "scores", scores)
        for slot in ("rescoring", "memoryless", "state", "wants_hidden", "query_aware", "trained"):
            object.__setattr__(self, slot, getattr(scores, slot))
        object.__setattr__(self, "heads", getattr(scores, "heads", None))

    def _scores(self) -> Method:
        return get_method(self.base) if isinstance(self.base, str) else self.base

    def describe(self) -> dict[str, Any]:
        return {**super().describe(), "base": {"method": self.scores.name, **self.scores.describe()}}

    def check(self, plan: CachePlan) -> None:
        self.scores.check(plan)

    def score(self, view: ChunkView) -> Tensor:
        return self.scores.score(view)

    def score_layers(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor | None:
        return self.scores.score_layers(q, k, v)


def _with_base(cls: type[Wrapped], heads: RetainingHeads | None, options: dict[str, Any]) -> dict[str, Any]:
    """`base` made into a method with its own options (`base.window`) and the heads, where it is a name."""
    own = {key: value for key, value in options.items() if not key.startswith(BASE)}
    inner = {key.removeprefix(BASE): value for key, value in options.items() if key.startswith(BASE)}
    base = own.get("base", cls.base)
    if isinstance(base, str) and base:
        return {**own, "base": get_method(base, heads=heads, **inner)}
    if inner:
        raise ConfigError(f"{cls.name}: base is {base!r}, so {BASE}{next(iter(inner))} belongs to no method; give base "
                          "a method's name")  # fmt: skip
    return own
