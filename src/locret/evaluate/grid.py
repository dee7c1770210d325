"""What is run: tasks x methods x budgets x lengths x seeds, from TOML or flags, checked before anything is computed."""

from __future__ import annotations

import dataclasses
import tomllib
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from locret.config import CacheConfig, parse_budget, strict, toml_value
from locret.errors import ConfigError, unknown
from locret.evaluate.oracle import REFERENCES
from locret.methods import list_methods

MODES = ("hardened", "official")
TURNS = ("conversation", "separate")
AS_IT_IS = 0  # the length of a public set's samples: nobody chose it
_AXES = ("tasks", "methods", "budgets", "lengths", "seeds", "samples")
_KINDS: dict[str, tuple[type, str]] = {  # of the keys that no other check looks at
    "query_aware": (bool, "true or false"), "even_lengths": (bool, "true or false"),
    "answer_prefix": (bool, "true or false"), "model": (str, "a text"), "heads": (str, "a text"),
    "dtype": (str, "a text"), "text": (str, "a text"), "cache": (dict, "a table"), "public": (dict, "a table"),
}  # fmt: skip
_PUBLIC = ("path", "hub_id", "revision", "limit")


@dataclass(frozen=True)
class Variant:
    """One way to run a sample: a column of the tables.

    Attributes:
        method: as it is written in the grid, options included: "snapkv:window=64:kernel_size=5".
        budget: as it is written in the grid; None: the method keeps everything.
        samples: how many of a seed's samples it is run on: the first ones.
    """

    method: str
    budget: int | str | None
    samples: int

    @property
    def name(self) -> str:
        return self.method.partition(":")[0]


@dataclass(frozen=True)
class Block:
    """Samples that several variants share.

    Attributes:
        cuts: all numbers of samples that a part of the grid asks for, ascending: no batch goes across one.
    """

    task: str
    length: int
    seed: int
    variants: tuple[Variant, ...]
    cuts: tuple[int, ...]

    @property
    def key(self) -> tuple[str, int, int]:
        return self.task, self.length, self.seed

    @property
    def samples(self) -> int:
        return self.cuts[-1]


@dataclass(frozen=True)
class Stage:
    """What one part of a grid wants of a block. The variants' numbers of samples are the part's."""

    block: Block
    variants: tuple[Variant, ...]


@dataclass(frozen=True)
class Grid:
    """A grid. The first six fields are its axes; a `[[part]]` table replaces some of them for a grid of its own.

    Attributes:
        tasks: names of generated tasks or groups of them ("ruler"), or keys of `public`.
        methods: see `locret methods`; options after colons, "snapkv:window=64". "full" keeps everything, so it has
            no budget and is run once; it is also what the continuous measures compare with. "oracle_gold",
            "oracle_cis" and "oracle_mass" are rows that know what will be asked (`oracle`).
        budgets: as in `CacheConfig`: units, bytes, or a share of the context (of the prompt if `query_aware`).
        lengths: tokens of a generated sample; samples of public sets are as long as they are.
        seeds: each gives `samples` samples of a task and length.
        mode: "hardened" (random details, short answers) or "official" (the published generators and limits).
        query_aware: False: the context is compressed before its question is known, once for all of its questions.
            True: every question gets a compression of its own, of context and question together.
        answer_prefix: whether generated tasks begin the answer with the published words ("The pass key is"); default:
            not for the embedded model, which was never trained to go on behind any and stops there.
        sentence_tokens: without those words, answers may have so many tokens more, for models that say them by
            themselves; 0 for the embedded model saves time: it does not.
        turns: several questions of one context are asked one after the other ("conversation", each sees the answers
            before it) or each of the context as it was compressed ("separate").
        even_lengths: blank lines make all samples of a generated task and length equally long, so that they run as
            batches (not for official mode).
        batch_size: samples of equal length that run together ...
        batch_tokens: ... or as many as have so many context tokens together.
        max_context: longer contexts lose their middle, as InfiniteBench's published runs do.
        tail_tokens: also measure the perplexity of the last so many context tokens after compressing what is before
            them; 0: do not.
        model, heads, dtype: as in `locret.load`.
        text: folder of natural text that generated tasks take their filler from; none: prose of our own.
        cache: other fields of `CacheConfig`: positions, num_sinks ...
        public: public sets, name -> {"path": ..., "hub_id": ..., "limit": ...}; the name is what `load_public` knows.
    """

    tasks: tuple[str, ...]
    methods: tuple[str, ...] = ("full", "locret", "recency")
    budgets: tuple[int | str, ...] = ("5%",)
    lengths: tuple[int, ...] = (4096,)
    seeds: tuple[int, ...] = (0,)
    samples: int = 50
    mode: str = "hardened"
    query_aware: bool = False
    answer_prefix: bool | None = None
    sentence_tokens: int = 32
    turns: str = "conversation"
    even_lengths: bool = False
    batch_size: int = 8
    batch_tokens: int | None = None
    max_context: int | None = None
    tail_tokens: int = 0
    model: str | None = None
    heads: str | None = None
    dtype: str = "auto"
    text: str | None = None
    cache: dict[str, Any] = field(default_factory=dict)
    public: dict[str, dict[str, Any]] = field(default_factory=dict)
    part: tuple[dict[str, Any], ...] = ()

    def __post_init__(self) -> None:
        for name in ("tasks", "methods", "budgets", "lengths", "seeds", "part"):
            value = getattr(self, name)
            if isinstance(value, (str, int, dict)) or not isinstance(value, Collection):
                raise ConfigError(f"{name} is {value!r}; it must be a list")
            object.__setattr__(self, name, tuple(value))
        self._check_kinds()
        for axes in self._parts():
            _check_axes(axes)
        if self.answer_prefix is None:
            object.__setattr__(self, "answer_prefix", self.model is not None)
        if self.mode not in MODES:
            raise unknown("mode", str(self.mode), MODES)
        if self.turns not in TURNS:
            raise unknown("turns", str(self.turns), TURNS)
        if self.even_lengths and self.mode == "official":
            raise ConfigError('even_lengths changes samples, and official ones are as published; use mode = "hardened"')
        for name, low in (
            ("batch_size", 1),
            ("batch_tokens", 1),
            ("sentence_tokens", 0),
            ("tail_tokens", 0),
            ("max_context", 1),
        ):
            value = getattr(self, name)
            if value is not None and not _whole(value, low):
                raise ConfigError(f"{name} is {value!r}; it must be a whole number >= {low}")
        if "budget" in self.cache:
            raise ConfigError("[cache] holds no budget; write budgets = [...] beside it")
        CacheConfig.from_dict(self.cache)

    @classmethod
    def from_dict(cls, options: dict[str, Any]) -> Grid:
        """Strict: an unknown key is an error that names the nearest."""
        if "tasks" not in options:
            raise ConfigError('a grid names its tasks: tasks = ["niah_single_1", ...]')
        return strict(cls, options)

    @classmethod
    def from_toml(cls, path: str | Path, **changes: Any) -> Grid:
        """Read a grid; `changes` replace keys of the file."""
        try:
            options = tomllib.loads(Path(path).read_text(encoding="utf-8"))
        except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
            raise ConfigError(f"cannot read the grid {path}: {error}") from error
        return cls.from_dict({**options, **changes})

    def to_dict(self) -> dict[str, Any]:
        """Plain lists and dicts, for JSON."""
        return {name: list(value) if isinstance(value, tuple) else value
                for name, value in dataclasses.asdict(self).items()}  # fmt: skip

    def expanded(self, groups: Mapping[str, Sequence[str]]) -> Grid:
        """The names of groups of tasks replaced by their tasks."""

        def expand(names: Iterable[str]) -> list[str]:
            return list(dict.fromkeys(task for name in names for task in groups.get(name, [name])))

        parts = [{**part, "tasks": expand(part["tasks"])} if "tasks" in part else part for part in self.part]
        return dataclasses.replace(self, tasks=tuple(expand(self.tasks)), part=tuple(parts))

    def blocks(self) -> list[Block]:
        """Everything to run, one block per (task, length, seed), "full" first in each."""
        found: dict[tuple[str, int, int], dict[tuple[str, Any], Variant]] = {}
        cuts: dict[tuple[str, int, int], set[int]] = {}
        for axes in self._parts():
            for key in self._keys(axes):
                block = found.setdefault(key, {})
                cuts.setdefault(key, set()).add(axes["samples"])
                for variant in _variants(axes):
                    name = (variant.method, variant.budget)
                    if name not in block or block[name].samples < variant.samples:
                        block[name] = variant
        return [
            Block(*key, _full_first(variants.values()), tuple(sorted(cuts[key]))) for key, variants in found.items()
        ]

    def stages(self) -> Iterator[Stage]:
        """What to run in which order: part after part, so that a run that is cut off has done the first ones."""
        blocks = {block.key: block for block in self.blocks()}
        for axes in self._parts():
            for key in self._keys(axes):
                yield Stage(blocks[key], _full_first(_variants(axes)))

    def rows(self, context: int) -> int:
        """How many samples with so many context tokens run together."""
        return self.batch_size if self.batch_tokens is None else max(1, self.batch_tokens // context)

    def _keys(self, axes: Mapping[str, Any]) -> Iterator[tuple[str, int, int]]:
        for task in axes["tasks"]:
            lengths, seeds = ((AS_IT_IS,), (0,)) if task in self.public else (axes["lengths"], axes["seeds"])
            for length in lengths:
                for seed in seeds:
                    yield task, length, seed

    def check_names(self, tasks: Collection[str], groups: Iterable[str] = ()) -> None:
        """Every task is one of the generated `tasks` or a public set.

        Raises: ConfigError naming the nearest, also of the `groups` that might have been meant.
        """
        for axes in self._parts():
            for name in axes["tasks"]:
                if name in tasks or name in self.public:
                    continue
                if "/" in name:
                    raise ConfigError(
                        f"task {name!r} is none that is generated; a public set has a table in the grid's file that "
                        f'says where it is: [public."{name}"] with path = "..." or hub_id = "..."'
                    )
                raise unknown("task", name, [*tasks, *groups, *self.public])

    def _check_kinds(self) -> None:
        for name, (kind, wanted) in _KINDS.items():
            value = getattr(self, name)
            if not isinstance(value, kind) and value is not None:
                raise ConfigError(f"{name} is {value!r}; it must be {wanted}")
        for name, options in self.public.items():
            if not isinstance(options, dict):
                raise ConfigError(f'[public] holds a table a set, [public."{name}"]; {name} is {options!r}')
            for key in options:
                if key not in _PUBLIC:
                    raise unknown(f'key of [public."{name}"]', key, _PUBLIC)

    def _parts(self) -> Iterator[dict[str, Any]]:
        """The axes of every part; without parts, the grid's own."""
        own = {name: getattr(self, name) for name in _AXES}
        for part in self.part or ({},):
            for key in part:
                if key not in _AXES:
                    raise unknown("key of [[part]]", key, _AXES)
            yield {**own, **part}


def parse_method(text: str) -> tuple[str, dict[str, Any]]:
    """A method and its options.

    >>> parse_method("snapkv:window=64:kernel_size=5")
    ('snapkv', {'window': 64, 'kernel_size': 5})
    """
    name, *items = text.split(":")
    options: dict[str, Any] = {}
    for item in items:
        key, equals, value = item.partition("=")
        if not equals:
            raise ConfigError(f"method {text!r}: options are written name:option=value:option=value")
        options[key.strip()] = toml_value(value.strip())
    return name, options


def _variants(axes: Mapping[str, Any]) -> Iterator[Variant]:
    for method in axes["methods"]:
        for budget in (None,) if parse_method(method)[0] == "full" else axes["budgets"]:
            yield Variant(method, budget, axes["samples"])


def _full_first(variants: Iterable[Variant]) -> tuple[Variant, ...]:
    return tuple(sorted(variants, key=lambda variant: variant.budget is not None))


def _check_axes(axes: Mapping[str, Any]) -> None:
    names = [*(info.name for info in list_methods()), *REFERENCES]
    for key in ("tasks", "methods", "budgets", "lengths", "seeds"):
        values = axes[key]
        if isinstance(values, (str, int)) or not values:
            raise ConfigError(f"{key} is {values!r}; it must be a list with at least one entry")
        if key in ("tasks", "methods") and not all(isinstance(value, str) for value in values):
            raise ConfigError(f"{key} is {list(values)}; it must be a list of names")
        if len(set(values)) != len(values):
            raise ConfigError(f"{key} names something twice: {list(values)}")
    for method in axes["methods"]:
        name, options = parse_method(method)
        if name not in names:
            raise unknown("method", name, names)
        if name in REFERENCES and options:
            raise ConfigError(f"{name} is a reference row and has no options; write {name!r} instead of {method!r}")
    for budget in axes["budgets"]:
        parse_budget(budget)
    for length in axes["lengths"]:
        if not _whole(length, 1):
            raise ConfigError(f"length {length!r} is no number of tokens; lengths are whole numbers >= 1")
    for seed in axes["seeds"]:
        if not _whole(seed, 0):
            raise ConfigError(f"seed {seed!r} is no whole number >= 0")
    if not _whole(axes["samples"], 1):
        raise ConfigError(f"samples is {axes['samples']!r}; it must be a whole number >= 1")


def _whole(value: Any, low: int) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= low
