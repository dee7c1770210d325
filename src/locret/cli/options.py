"""Groups of flags that several verbs share: a frozen dataclass per group, spread into a verb's signature.

A verb takes its groups as arguments and `with_options` gives typer one flag per field of theirs:

    @with_options
    def generate(model: ModelOptions, sampling: SamplingOptions, *, file: ... = None) -> None
"""

from __future__ import annotations

import dataclasses
import functools
import inspect
import os
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, get_type_hints

from typer import Option

from locret.errors import ConfigError

_MODEL, _CACHE, _SAMPLING, _OUTPUT = "Model", "Cache", "Sampling", "Output"


@dataclass(frozen=True)
class ModelOptions:
    """Which model, and the cache it runs in. A flag that is not given takes the default of `locret.load`."""

    model: Annotated[
        str | None,
        Option("--model", help="Folder or Hugging Face id. (default: the embedded model)", rich_help_panel=_MODEL),
    ] = None
    heads: Annotated[
        str | None, Option("--heads", help="Folder or id of trained retaining heads.", rich_help_panel=_MODEL)
    ] = None
    device: Annotated[
        str, Option("--device", help="auto, cpu, cuda, cuda:1, ...", rich_help_panel=_MODEL)
    ] = "auto"  # fmt: skip
    dtype: Annotated[
        str, Option("--dtype", help="auto, float32, bfloat16 or float16.", rich_help_panel=_MODEL)
    ] = "auto"  # fmt: skip
    method: Annotated[
        str | None,
        Option(
            "--method", help="Eviction method; `locret methods` lists them (default: locret).", rich_help_panel=_CACHE
        ),
    ] = None
    method_option: Annotated[
        list[str] | None,
        Option(
            "--method-option",
            help="Option of the method as key=value; may be repeated. `locret methods show NAME` lists them.",
            rich_help_panel=_CACHE,
        ),
    ] = None
    budget: Annotated[
        str | None,
        Option(
            "--budget",
            help="Units per layer and KV head (6000), bytes (2GiB) or a share of the prompt (5%) (default: 16384).",
            rich_help_panel=_CACHE,
        ),
    ] = None
    chunk_size: Annotated[
        int | None,
        Option(
            "--chunk-size",
            help="Prompt tokens per prefill step (default: the budget, within 256 to 3072; less on a full GPU).",
            rich_help_panel=_CACHE,
        ),
    ] = None
    stabilizers: Annotated[
        int | None,
        Option(
            "--stabilizers",
            help="Newest units pinned during prefill (default: budget / 4, at most 2500).",
            rich_help_panel=_CACHE,
        ),
    ] = None
    local_window: Annotated[
        int | None,
        Option(
            "--local-window",
            help="Last prompt tokens, never evicted (default: 100, or budget / 4).",
            rich_help_panel=_CACHE,
        ),
    ] = None
    sinks: Annotated[
        int | None, Option("--sinks", help="First units, never evicted (default: 4).", rich_help_panel=_CACHE)
    ] = None  # fmt: skip
    positions: Annotated[
        str | None,
        Option(
            "--positions",
            help="compact (renumber what is kept) or original (default: compact).",
            rich_help_panel=_CACHE,
        ),
    ] = None

    storage: Annotated[
        str | None,
        Option(
            "--storage",
            help="How units are held: dense, int8, int4, int2, quanto4, hqq4, kivi2, minikv, think, lorc, ...; "
            "docs/storage.md lists them (default: dense).",
            rich_help_panel=_CACHE,
        ),
    ] = None

    def load_options(self) -> dict[str, Any]:
        """Keyword arguments of `locret.load` besides the model and the method's options, which are still texts."""
        given = {
            "heads": self.heads,
            "method": self.method,
            "budget": self.budget,
            "chunk_size": self.chunk_size,
            "num_stabilizers": self.stabilizers,
            "local_window": self.local_window,
            "num_sinks": self.sinks,
            "positions": self.positions,
            "storage": self.storage,
        }
        return {
            "device": self.device,
            "dtype": self.dtype,
            **{name: value for name, value in given.items() if value is not None},
        }


@dataclass(frozen=True)
class SamplingOptions:
    """How the next token is chosen; greedy unless a temperature is given."""

    max_new_tokens: Annotated[
        int | None, Option("--max-new-tokens", help="Stop after this many (default: 256).", rich_help_panel=_SAMPLING)
    ] = None
    temperature: Annotated[
        float | None, Option("--temperature", help="0 is greedy (the default).", rich_help_panel=_SAMPLING)
    ] = None
    top_k: Annotated[
        int | None, Option("--top-k", help="Choose among the k likeliest.", rich_help_panel=_SAMPLING)
    ] = None  # fmt: skip
    top_p: Annotated[
        float | None, Option("--top-p", help="Choose among the likeliest of this mass.", rich_help_panel=_SAMPLING)
    ] = None
    min_p: Annotated[
        float | None,
        Option("--min-p", help="Drop what is less likely than this share of the best.", rich_help_panel=_SAMPLING),
    ] = None
    repetition_penalty: Annotated[
        float | None, Option("--repetition-penalty", help="Above 1: repeat less.", rich_help_panel=_SAMPLING)
    ] = None
    stop: Annotated[
        list[str] | None, Option("--stop", help="Stop at this text; may be repeated.", rich_help_panel=_SAMPLING)
    ] = None
    seed: Annotated[
        int | None, Option("--seed", help="Makes sampling repeatable.", rich_help_panel=_SAMPLING)
    ] = None  # fmt: skip

    def given(self) -> dict[str, Any]:
        """Keyword arguments of `LLM.generate`: only what was asked for."""
        named = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        named["stop"] = [as_unicode("--stop", text) for text in self.stop or []]
        return {name: value for name, value in named.items() if value is not None and value != []}


@dataclass(frozen=True)
class OutputOptions:
    """For machines, and for bug reports. `locret.cli.main` looks for both before typer does."""

    json: Annotated[
        bool, Option("--json", help="Print JSON, and nothing else, on stdout.", rich_help_panel=_OUTPUT)
    ] = False
    debug: Annotated[
        bool, Option("--debug", help="Show the traceback of an error.", rich_help_panel=_OUTPUT)
    ] = False  # fmt: skip


def typed(flag: str, texts: Iterable[str] | None) -> list[str]:
    """What was typed behind `flag`, checked before a model is loaded.

    Raises: ConfigError: a blank text, or one that is not UTF-8.
    """
    given = [as_unicode(flag, text) for text in texts or []]
    if any(not text.strip() for text in given):
        raise ConfigError(f"{flag} is blank; give some words, or leave it out")
    return given


def as_unicode(name: str, text: str) -> str:
    """Text from the command line: Python writes bytes that the locale does not know as surrogates.

    Raises: ConfigError: the bytes are not UTF-8.
    """
    try:
        text.encode()
        return text
    except UnicodeEncodeError:
        pass
    try:
        return os.fsencode(text).decode()
    except UnicodeError:
        raise ConfigError(f"{name} is {text!a}, which is not UTF-8; type it in a UTF-8 terminal, or give a file "
                          "with --file") from None  # fmt: skip


def flag_of(name: str) -> str:
    """The flag of an option of `CacheConfig`."""
    return "--" + name.removeprefix("num_").replace("_", "-")


# Arguments that more than one verb takes
FileOption = Annotated[Path | None, Option("--file", help="Document: .txt, .md, .pdf, or - for stdin.")]
QuestionsOption = Annotated[
    list[str] | None, Option("--question", help="Asked about the document; may be repeated.")
]  # fmt: skip
ContextOption = Annotated[Path | None, Option("--context", help="Saved by `locret compress`, instead of --file.")]

_GROUPS = (ModelOptions, SamplingOptions, OutputOptions)


def with_options(verb: Callable[..., Any]) -> Callable[..., Any]:
    """Replace every parameter of `verb` that is one of the groups by the group's fields, as keyword arguments."""
    hints = get_type_hints(verb, include_extras=True)
    groups = {name: hint for name, hint in hints.items() if hint in _GROUPS}
    parameters = [
        inspect.Parameter(p.name, inspect.Parameter.KEYWORD_ONLY, default=p.default, annotation=hints[p.name])
        for p in inspect.signature(verb).parameters.values()
        if p.name not in groups
    ]
    for group in groups.values():
        fields = get_type_hints(group, include_extras=True)
        parameters += [
            inspect.Parameter(f.name, inspect.Parameter.KEYWORD_ONLY, default=f.default, annotation=fields[f.name])
            for f in dataclasses.fields(group)
        ]

    @functools.wraps(verb)
    def run(**given: Any) -> Any:
        built = {
            name: group(**{field.name: given.pop(field.name) for field in dataclasses.fields(group)})
            for name, group in groups.items()
        }
        return verb(**built, **given)

    del run.__wrapped__  # typer would look through it at the verb's own signature
    run.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    run.__annotations__ = {p.name: p.annotation for p in parameters}
    return run
