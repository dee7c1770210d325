"""Options, checked once when they are made. Defaults are the paper's where it has one (arXiv:2410.01805, Table 4)."""

from __future__ import annotations

import math
import numbers
import operator
import re
import tomllib
from collections.abc import Iterable
from dataclasses import dataclass, fields
from typing import Any, SupportsIndex, TypeVar

from locret.errors import ConfigError, unknown

T = TypeVar("T")
POSITIONS = ("compact", "original")
STORAGE = (
    "dense", "int8", "int4", "int2", "quanto4", "quanto2", "hqq8", "hqq4", "hqq2", "kivi4", "kivi2", "minikv", "think",
    "think-int4", "lorc",
)  # fmt: skip  # of `stores`
LARGEST_CHUNK = 3072  # the paper's; longer only if asked for
SEEDS = (-(2**63), 2**64 - 1)  # what torch's generators take
_BYTE_UNITS = {"B": 1, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30, "KB": 10**3, "MB": 10**6, "GB": 10**9}


@dataclass(frozen=True)
class CacheConfig:
    """What may stay in the KV cache, as the user writes it.

    Attributes:
        budget: units kept per layer and KV head (`6000`), bytes of the whole cache (`"2GiB"`), or a share of the
            prompt (`"5%"`). Sinks, stabilizers, the local window and decoded tokens all count inside it.
        chunk_size: prompt tokens per prefill step; default: the budget, at most 3072 (the paper's), at least 256, and
            on a GPU with less memory left than such a chunk takes, the largest multiple of 256 that fits. Where chunks
            end decides what is evicted: a warning names the number, which gives the same results wherever it is given.
        num_sinks: first units, pinned. The paper pins none.
        num_stabilizers: newest units, pinned while prefill goes on; default: a quarter of the budget, at most 2500.
        local_window: last prompt tokens, prefilled after the loop and not evicted; default 100, less for tiny budgets.
        positions: "compact" re-numbers kept units 0, 1, 2 ... (the released Locret code, and what lets inputs exceed
            the trained window); "original" leaves every unit at the position it was read at.
        decode_interval: decode steps between two evictions once the budget is full; default an eighth of the budget,
            at most 128. The cache is compacted to budget - decode_interval units, so it never exceeds the budget.
        storage: how K and V are held, one of STORAGE (docs/storage.md): as they are, in codes of 8, 4 or 2 bits, with
            fewer key channels, or at low rank. Each unit is encoded once; a budget in bytes then holds more units.
    """

    budget: int | str = 16384
    chunk_size: int | None = None
    num_sinks: int = 4
    num_stabilizers: int | None = None
    local_window: int | None = None
    positions: str = "compact"
    decode_interval: int | None = None
    storage: str = "dense"

    def __post_init__(self) -> None:
        parse_budget(self.budget)
        if self.positions not in POSITIONS:
            raise unknown("positions", str(self.positions), POSITIONS)
        if self.storage not in STORAGE:
            raise unknown("storage", str(self.storage), STORAGE)
        for name, low in (("chunk_size", 1), ("num_sinks", 0), ("num_stabilizers", 0), ("local_window", 0),
                          ("decode_interval", 1)):  # fmt: skip
            value = getattr(self, name)
            if value is not None and (not isinstance(value, int) or isinstance(value, bool) or value < low):
                raise ConfigError(f"{name} is {value!r}; it must be a whole number >= {low}")

    @classmethod
    def from_dict(cls, options: dict[str, Any]) -> CacheConfig:
        """Strict: an unknown key is an error that names the nearest."""
        return strict(cls, options)

    def resolve(
        self, *, prompt_len: int | None, unit_bytes: int, fixed_bytes: int = 0, num_protected: int = 0
    ) -> CachePlan:
        """Fill in what depends on the prompt and the model.

        Args:
            prompt_len: tokens; None when the input has no known end (then a share cannot be a budget).
            unit_bytes: bytes that one unit in every budgeted layer and KV head takes, metadata included.
            fixed_bytes: bytes that the budget does not change: layers with a sliding window, room for a chunk where
                a method evicts after the forward pass, lengths of ragged heads.
            num_protected: units that the caller marked as protected.
        Raises: ConfigError: the budget cannot hold what is pinned; the message names the numbers.
        """
        budget = _units(parse_budget(self.budget), self.budget, prompt_len, unit_bytes, fixed_bytes)
        chunk = min(LARGEST_CHUNK, max(256, budget)) if self.chunk_size is None else self.chunk_size
        stabilizers, local, interval = self._shares(budget)
        pinned = self.num_sinks + num_protected + max(stabilizers, local)
        if pinned + min(interval, budget) > budget:
            protected = f" + protected {num_protected}" if num_protected else ""
            raise ConfigError(
                f"budget {self._said(budget, prompt_len)} cannot hold its pinned units: "
                f"num_sinks {self.num_sinks}{protected} + "
                f"max(num_stabilizers {stabilizers}, local_window {local}) + decode_interval {interval} = "
                f"{pinned + interval}; raise the budget to at least {self._least(budget, num_protected)} units or "
                "lower one of them"
            )
        return CachePlan(budget, chunk, self.num_sinks, stabilizers, local, self.positions, interval, self.storage)

    def _shares(self, budget: int) -> tuple[int, int, int]:
        """(stabilizers, local window, decode interval) of a budget."""
        stabilizers = min(2500, budget // 4) if self.num_stabilizers is None else self.num_stabilizers
        local = min(100, budget // 4) if self.local_window is None else self.local_window
        interval = max(1, min(128, budget // 8)) if self.decode_interval is None else self.decode_interval
        return stabilizers, local, interval

    def _said(self, budget: int, prompt_len: int | None) -> str:
        """As the user wrote it, and in units."""
        kind = parse_budget(self.budget)[1]
        written = {"units": "", "bytes": f"{self.budget} = ", "share": f"{self.budget} of {prompt_len} tokens = "}[kind]
        return f"{written}{budget}" + (" units" if written else "")

    def _least(self, budget: int, num_protected: int) -> int:
        """The least budget that holds what is pinned, above one that does not: defaults grow with the budget."""
        while True:
            stabilizers, local, interval = self._shares(budget)
            needed = self.num_sinks + num_protected + max(stabilizers, local) + interval
            if needed <= budget:
                return budget
            budget = needed  # none between holds it: what is needed never falls as the budget rises


@dataclass(frozen=True)
class CachePlan:
    """`CacheConfig` with every number known; `budget` None means nothing is ever evicted."""

    budget: int | None
    chunk_size: int
    num_sinks: int
    num_stabilizers: int
    local_window: int
    positions: str
    decode_interval: int
    storage: str = "dense"

    @property
    def decode_target(self) -> int | None:
        """Units left by an eviction during decoding."""
        return None if self.budget is None else self.budget - self.decode_interval + 1


@dataclass(frozen=True)
class Sampling:
    """How the next token is chosen and when to stop. Defaults: greedy, 256 tokens.

    Attributes:
        max_new_tokens: tokens at most.
        temperature: 0 is greedy; otherwise logits are divided by it.
        top_k, top_p, min_p: keep the k likeliest tokens, the smallest set with probability p, tokens with at least
            min_p times the likeliest one's probability. 0, 1.0 and 0.0 switch them off.
        repetition_penalty: above 1 makes tokens of the prompt and the answer less likely (CTRL, arXiv:1909.05858).
        seed: of the random numbers, -2^63 to 2^64 - 1; None draws a new one each time.
        stop: strings that end the answer and are not part of it.
    """

    max_new_tokens: int = 256
    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    seed: int | None = None
    stop: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        for name in ("max_new_tokens", "top_k"):
            object.__setattr__(self, name, _whole(name, getattr(self, name)))
        for name in ("temperature", "top_p", "min_p", "repetition_penalty"):
            object.__setattr__(self, name, _real(name, getattr(self, name)))
        if self.seed is not None:
            object.__setattr__(self, "seed", _whole("seed", self.seed))
            _check("seed", self.seed, SEEDS[0] <= self.seed <= SEEDS[1], "from -2^63 to 2^64 - 1")
        object.__setattr__(self, "stop", _texts("stop", self.stop))
        _check("max_new_tokens", self.max_new_tokens, self.max_new_tokens >= 1, ">= 1")
        _check("temperature", self.temperature, 0 <= self.temperature < math.inf, ">= 0")
        _check("top_k", self.top_k, self.top_k >= 0, ">= 0")
        _check("top_p", self.top_p, 0 < self.top_p <= 1, "in (0, 1]")
        _check("min_p", self.min_p, 0 <= self.min_p < 1, "in [0, 1)")
        _check("repetition_penalty", self.repetition_penalty, 0 < self.repetition_penalty < math.inf, "> 0")
        if any(not text for text in self.stop):
            raise ConfigError("an empty stop string would end every answer at once; remove it")

    @classmethod
    def of(cls, sampling: Sampling | None, options: dict[str, Any]) -> Sampling:
        """What a caller gave: a whole Sampling, or some of its fields as keywords."""
        if sampling is not None and options:
            raise ConfigError(
                f"give either sampling=Sampling(...) or its fields as keywords, not both ({', '.join(options)})"
            )
        return sampling or cls.from_dict(options)

    @classmethod
    def from_dict(cls, options: dict[str, Any]) -> Sampling:
        """Strict: an unknown key is an error that names the nearest."""
        return strict(cls, options)


def strict(cls: type[T], options: dict[str, Any]) -> T:
    """Make a dataclass from a dict; unknown keys are errors, because a typo would run another experiment."""
    names = [field.name for field in fields(cls)]  # type: ignore[arg-type]
    for key in options:
        if key not in names:
            raise unknown("option", key, names)
    return cls(**options)


def parse_budget(budget: int | str) -> tuple[float, str]:
    """A budget as (number, kind), kind one of "units", "bytes", "share".

    >>> parse_budget(6000), parse_budget("2GiB"), parse_budget("5%")
    ((6000, 'units'), (2147483648.0, 'bytes'), (0.05, 'share'))
    """
    if isinstance(budget, int) and not isinstance(budget, bool):
        number: tuple[float, str] = (budget, "units")
    else:
        match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([A-Za-z%]*)\s*", str(budget))
        unit = match[2].upper() if match else ""
        if match and unit == "%":
            number = (float(match[1]) / 100, "share")
        elif match and unit in _BYTE_UNITS:
            number = (float(match[1]) * _BYTE_UNITS[unit], "bytes")
        elif match and unit == "" and "." not in match[1]:
            number = (int(match[1]), "units")
        else:
            raise ConfigError(f'budget {budget!r} is not understood; write units ("6000"), bytes ("2GiB", "500MB") '
                              'or a share of the prompt ("5%")')  # fmt: skip
    if number[0] <= 0:
        raise ConfigError(f"budget {budget!r} keeps nothing; it must be positive")
    return number


def _units(
    parsed: tuple[float, str], text: int | str, prompt_len: int | None, unit_bytes: int, fixed_bytes: int
) -> int:
    number, kind = parsed
    if kind == "units":
        return int(number)
    if kind == "share":
        if prompt_len is None:
            raise ConfigError(f"budget {text!r} is a share of a prompt of unknown length; give units or bytes")
        return max(1, math.ceil(number * prompt_len - 1e-9))
    units = int(number - fixed_bytes) // unit_bytes
    if units < 1:
        raise ConfigError(f"budget {text!r} is less than one unit: {fixed_bytes} bytes are taken whatever it is "
                          "(sliding windows, room for a chunk, lengths of heads), a unit takes "
                          f"{unit_bytes} bytes over all layers and KV heads; raise it")  # fmt: skip
    return units


def _check(name: str, value: float, good: bool, allowed: str) -> None:
    if not good:
        raise ConfigError(f"{name} is {value}; it must be {allowed}")


def _whole(name: str, value: Any) -> int:
    """An int; numpy's are converted."""
    try:
        if isinstance(value, SupportsIndex) and not isinstance(value, bool):
            return operator.index(value)
    except TypeError:  # arrays and tensors have the method, whatever they hold
        pass
    raise ConfigError(f"{name} is {value!r}; it must be a whole number")


def _real(name: str, value: Any) -> float:
    """A float, which is what transformers' filters insist on."""
    try:
        if isinstance(value, numbers.Real) and not isinstance(value, bool):
            return float(value)
    except OverflowError:  # an int of more than 308 digits
        pass
    raise ConfigError(f"{name} is {value!r}; it must be a number")


def _texts(name: str, value: Any) -> tuple[str, ...]:
    """Strings; a single one may be given bare."""
    if isinstance(value, str):
        return (value,)
    texts = tuple(value) if isinstance(value, Iterable) else (value,)
    if not all(isinstance(text, str) for text in texts):
        raise ConfigError(f"{name} is {value!r}; it must be a string or several, () for none")
    return texts


def toml_value(text: str) -> Any:
    """A value as TOML writes it; what is no TOML value is text.

    >>> toml_value("64"), toml_value("[1, 2]"), toml_value("max")
    (64, [1, 2], 'max')
    """
    try:
        return tomllib.loads(f"value = {text}")["value"]
    except tomllib.TOMLDecodeError:
        return text
