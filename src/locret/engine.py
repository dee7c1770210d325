"""The public surface: load a model, generate, and ask compressed contexts.

A batch is run in groups of equally long prompts: within a group every tensor has one shape and no row is padded, so a
row gets exactly what it gets alone.

Shapes: B rows, T prompt tokens, V vocabulary.
"""

from __future__ import annotations

import numbers
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor

from locret import chat
from locret.assets import ContextStore
from locret.backbone import EMBEDDED, Backbone
from locret.config import CacheConfig, Sampling
from locret.context import Context
from locret.decode import Decoder, Output, Stream
from locret.errors import ConfigError
from locret.heads import RetainingHeads
from locret.methods import Method, get_method, wants_heads
from locret.prefill import Progress, Reader
from locret.scheduler import Scheduler

Messages = list[dict[str, Any]]
Prompt = str | Messages | list[int]


def load(
    model: str | Path | None = None, *, heads: str | Path | RetainingHeads | None = None, method: str = "locret",
    method_options: dict[str, Any] | None = None, device: str = "auto",
    dtype: str | torch.dtype = "auto", **cache_options: Any,
) -> LLM:  # fmt: skip
    """Load a model and its retaining heads.

    Args:
        model: a folder or a hub id; none: the small model that ships with locret, with its heads.
        heads: a folder, a hub id, or a loaded `RetainingHeads`; only the method "locret" reads them, by
            itself or as the `base` of another.
        method: see `locret methods`.
        method_options: options of the method, e.g. {"window": 64} for snapkv, {"base": "locret"} for pyramidkv,
            {"base": "snapkv", "base.window": 64} for options of the base.
        device, dtype: see `Backbone.load`.
        **cache_options: the fields of `CacheConfig`: budget, chunk_size, num_sinks, ...

    Raises: ConfigError, BackboneError, HeadsError.
    """
    config = CacheConfig.from_dict(cache_options)
    backbone = Backbone.load(model, device=device, dtype=dtype)
    if heads is None and model is None:
        heads = EMBEDDED / "heads"
    return LLM.build(backbone, heads=heads, method=method, method_options=method_options, config=config)


@dataclass
class LLM:
    """A model, an eviction method and a cache budget."""

    backbone: Backbone
    method: Method
    config: CacheConfig = field(default_factory=CacheConfig)

    @classmethod
    def build(
        cls, backbone: Backbone, *, heads: str | Path | RetainingHeads | None = None, method: str = "locret",
        method_options: dict[str, Any] | None = None, config: CacheConfig | None = None,
    ) -> LLM:  # fmt: skip
        """From a backbone that is already there. Heads are checked against it."""
        loaded: RetainingHeads | None = None
        chosen = method_options or {}
        if heads is not None and wants_heads(method, chosen.get("base")):
            loaded = heads if isinstance(heads, RetainingHeads) else RetainingHeads.from_pretrained(heads)
            loaded.check(backbone)
            loaded = loaded.to(device=backbone.device, dtype=backbone.dtype).eval().join_layers()
        return cls(backbone, get_method(method, heads=loaded, **chosen), config or CacheConfig())

    def generate(
        self, prompt: Prompt | Sequence[Prompt], *, sampling: Sampling | None = None, protect: Sequence[str] = (),
        on_progress: Progress | None = None, **options: Any,
    ) -> Output | list[Output]:  # fmt: skip
        """Answer one prompt, or several (a list of prompts gives a list of outputs, in the same order).

        Args:
            prompt: text (one user turn in the model's chat template), messages, or token ids (taken as they are).
            sampling: or its fields as keywords: max_new_tokens, temperature, top_p, stop, seed ...
            protect: pieces of the prompt's text whose units are never evicted.
            on_progress: called with (prompt tokens read, prompt tokens in all).
        """
        chosen = Sampling.of(sampling, options)
        many = _is_batch(prompt)
        prompts = [
            self._encode(p, protect) for p in (cast(Sequence[Prompt], prompt) if many else [cast(Prompt, prompt)])
        ]
        outputs: list[Output | None] = [None] * len(prompts)
        done, total = 0, sum(len(p.ids) for p in prompts)
        for rows in _equal_lengths(prompts):
            group = [prompts[i] for i in rows]
            progress = None if on_progress is None else _offset(on_progress, done, len(group), total)
            for i, output in zip(rows, self._run(group, rows, chosen, progress), strict=True):
                outputs[i] = output
            done += sum(len(p.ids) for p in group)
        finished = cast(list[Output], outputs)
        return finished if many else finished[0]

    def stream(
        self, prompt: Prompt, *, sampling: Sampling | None = None, protect: Sequence[str] = (),
        on_progress: Progress | None = None, **options: Any,
    ) -> Stream:  # fmt: skip
        """`generate` for one prompt, as an iterator over pieces of text; `.output` holds the result after the end."""
        encoded = self._encode(prompt, protect)
        return Stream(self._decoder([encoded], [0], Sampling.of(sampling, options), on_progress))

    def compress(
        self, document: Prompt, *, protect: Sequence[str] = (), on_progress: Progress | None = None,
        store: ContextStore | str | Path | None = None,
    ) -> Context:  # fmt: skip
        """Read a document once, into the budget; ask it as many questions as you like.

        Args:
            document: text (the beginning of a user turn that the questions complete), messages (earlier turns), or
                token ids.
            protect: pieces of the document's text whose units are never evicted.
            store: a folder; the context is taken from there if it has been saved, and saved there otherwise.
        """
        if store is not None:
            found = store if isinstance(store, ContextStore) else ContextStore(store)
            return found.compress(self, document, protect=protect, on_progress=on_progress).context
        return Context.compress(self, document, protect=protect, on_progress=on_progress)

    def open(self) -> Context:
        """A context that has read nothing yet: for conversations and for input without end (`Context.append`)."""
        return Context.open(self)

    def scheduler(self, **options: Any) -> Scheduler:
        """Many requests at once, each with its own sampling and stream; options: see `Scheduler`."""
        return Scheduler(self, **options)

    def _encode(self, prompt: Prompt, protect: Sequence[str]) -> _Encoded:
        if _is_ids(prompt):
            if protect:
                raise ConfigError("protect names pieces of text; a prompt of token ids has none")
            ids = chat.token_ids(cast(list[int], prompt), self.backbone.vocab_size)
            return _Encoded(ids, None, templated=False)
        tokenizer = self.backbone.need_tokenizer()
        if isinstance(prompt, str):
            if not prompt.strip():
                raise ConfigError("the prompt is empty; give some text")
            turns = chat.Turns.of(tokenizer)
            text, templated = turns.begin + prompt + turns.end, turns.templated
        else:
            if not isinstance(prompt, list) or not prompt:
                raise ConfigError(f"a prompt is text, a list of messages or token ids; this is {prompt!r}")
            text, templated = chat.render(tokenizer, cast(Messages, prompt)), True
        return _Encoded(chat.encode(tokenizer, text), chat.protected_mask(tokenizer, text, protect), templated)

    def _run(
        self, group: list[_Encoded], rows: list[int], sampling: Sampling, on_progress: Progress | None
    ) -> list[Output]:
        decoder = self._decoder(group, rows, sampling, on_progress)
        for _ in decoder.pieces():
            pass
        return decoder.outputs()

    def _decoder(
        self, group: list[_Encoded], rows: list[int], sampling: Sampling, on_progress: Progress | None
    ) -> Decoder:
        """rows: which of the prompts these are."""
        length = len(group[0].ids)
        if length == 0:
            raise ConfigError("the prompt has no tokens; give at least one")
        ids = torch.tensor([p.ids for p in group])
        mask = group[0].protected  # a group with protected spans is one prompt: see _equal_lengths
        reader = Reader.start(
            self.backbone, self.method, self.config, batch=len(group), prompt_len=length,
            new_tokens=sampling.max_new_tokens, num_protected=0 if mask is None else int(mask.sum()),
        )  # fmt: skip

        def prefill() -> Tensor:
            return reader.read(ids, protected=mask, on_progress=on_progress)

        return Decoder(reader, prefill, ids, sampling, strip_start=group[0].templated, numbers=rows)


@dataclass
class _Encoded:
    ids: list[int]
    protected: Tensor | None
    templated: bool


def _is_ids(prompt: Any) -> bool:
    return isinstance(prompt, list | tuple) and len(prompt) > 0 and all(isinstance(x, numbers.Integral) for x in prompt)


def _is_batch(prompt: Any) -> bool:
    if isinstance(prompt, str):
        return False
    if not isinstance(prompt, Sequence) or len(prompt) == 0:
        raise ConfigError(f"a prompt is text, messages or token ids, or a list of those; this is {prompt!r}")
    return not (_is_ids(list(prompt)) or isinstance(prompt[0], dict))


def _equal_lengths(prompts: list[_Encoded]) -> Iterator[list[int]]:
    """Indices of prompts that can run together: same length, same kind, nothing protected."""
    groups: dict[tuple[Any, ...], list[int]] = {}
    for i, p in enumerate(prompts):
        alone = i if p.protected is not None else None
        groups.setdefault((len(p.ids), p.templated, alone), []).append(i)
    yield from groups.values()


def _offset(on_progress: Progress, done: int, rows: int, total: int) -> Callable[[int, int], object]:
    return lambda read, _: on_progress(done + read * rows, total)
