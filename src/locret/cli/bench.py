"""`locret bench`: speed and memory on this machine, beside transformers' full cache and beside the floor."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from typer import Option

from locret.cli.options import ModelOptions, OutputOptions, with_options
from locret.cli.output import bytes_text, emit, note, say, table
from locret.cli.session import open_llm, quiet_transformers
from locret.errors import ConfigError

if TYPE_CHECKING:
    from locret.bench import Report, Row, Spread
    from locret.engine import LLM

_EMBEDDED_BUDGET = "1024"  # the engine's default would keep all of these short prompts


@with_options
def bench(
    model: ModelOptions,
    output: OutputOptions,
    shape: Annotated[
        str | None,
        Option("--shape", help="Random weights instead of --model: llama-3.1-8b, ... (see locret plan)."),
    ] = None,
    lengths: Annotated[str, Option("--lengths", help="Prompt tokens, with commas between.")] = "1024,4096",
    batches: Annotated[str, Option("--batches", help="Rows that decode together, with commas between.")] = "1,4",
    new_tokens: Annotated[int, Option("--new-tokens", help="Tokens of an answer.")] = 16,
    repeats: Annotated[int, Option("--repeats", help="Runs per number.")] = 3,
    peers: Annotated[
        bool, Option("--peers/--no-peers", help="Also transformers' full cache, as shipped and on cuDNN.")
    ] = True,
    plot: Annotated[Path | None, Option("--plot", help="Write an SVG.")] = None,
) -> None:
    """Measure TTFT, TPOT, throughput and memory."""
    from locret.bench import run, svg

    report = run(
        _llm(model, shape), lengths=_numbers("--lengths", lengths), batches=_numbers("--batches", batches),
        new_tokens=new_tokens, repeats=repeats, peers=peers, embedded=model.model is None and shape is None,
        on_case=note,
    )  # fmt: skip
    if plot is not None:
        from locret.files import write_text

        write_text(plot, svg(report))
    if output.json:
        emit(report.to_dict())
    else:
        _show(report)


def _llm(options: ModelOptions, shape: str | None) -> LLM:
    if shape is None:
        if options.model is None and options.budget is None:
            return open_llm(options, budget=_EMBEDDED_BUDGET)
        return open_llm(options)
    if options.model is not None or options.heads is not None:
        raise ConfigError("--shape has random weights and heads; leave --model and --heads out")
    if options.method_option:
        raise ConfigError("--shape runs methods with their defaults; leave --method-option out, or name a --model")
    from locret.bench import random_llm
    from locret.config import CacheConfig

    quiet_transformers()
    given: dict[str, Any] = options.load_options()
    device, dtype, method = given.pop("device"), given.pop("dtype"), given.pop("method", "locret")
    return random_llm(shape, device=device, dtype=dtype, method=method, config=CacheConfig.from_dict(given))


def _numbers(flag: str, text: str) -> list[int]:
    try:
        return [int(part) for part in text.split(",")]
    except ValueError:
        raise ConfigError(f"{flag} is {text!r}; write whole numbers with commas between: 1024,4096") from None


def _show(report: Report) -> None:
    m, s = report.machine, report.settings
    say(f"{s['model']}, {s['dtype']}, method {s['method']}, budget {s['budget']}, storage {s['storage']}")
    say(f"{m['name']} ({m['device']}, {m['threads']} threads), torch {m['torch']}, transformers {m['transformers']}, "
        f"locret {m['locret']} {m['commit']}")  # fmt: skip
    say(f"floor: copies {report.card.bandwidth / 1e9:,.1f} GB/s, matmuls {report.card.flops / 1e12:,.4g} TFLOP/s, "
        "measured in this run")  # fmt: skip
    title = f"medians of {s['repeats']} (least - most)"
    prefill = [row for row in report.rows if row.ttft is not None]
    table(("engine", "tokens", "TTFT s", "of floor", "tok/s"), [_prefill(row) for row in prefill], title=title)
    columns = ("engine", "tokens", "batch", "TPOT ms", "of floor", "tok/s", "KV", "peak")
    table(columns, [_decode(row) for row in report.rows])
    for ratio in report.ratios():
        texts = [f"{name.upper()} {ratio[name]:.2f}" for name in ("ttft", "tpot") if ratio[name] is not None]
        text = ", ".join(texts) or ratio["failed"]
        whose = f"{ratio['peer']}'" + "s" * (not ratio["peer"].endswith("s"))
        say(f"{ratio['length']:,} tokens, batch {ratio['batch']}: {whose} seconds / locret's: {text}")
    for engine, why in s["left_out"].items():
        say(f"{engine} left out: {why}")
    bar = report.bar()
    if bar is not None:
        say(bar)


def _prefill(row: Row) -> tuple[str, ...]:
    return (
        row.engine, f"{row.length:,}", _spread(row.ttft, 1, 3), _floor(row.ttft_floor, row.ttft),
        _rate(row.length, row.ttft),
    )  # fmt: skip


def _decode(row: Row) -> tuple[str, ...]:
    return (
        row.engine, f"{row.length:,}", str(row.batch), row.failed or _spread(row.tpot, 1e3, 1),
        _floor(row.tpot_floor, row.tpot), _rate(row.batch, row.tpot), "" if row.failed else bytes_text(row.kv_bytes),
        "" if row.peak_bytes is None else bytes_text(row.peak_bytes),
    )  # fmt: skip


def _spread(value: Spread | None, scale: float, digits: int) -> str:
    if value is None:
        return ""
    median, low, high = (f"{x * scale:.{digits}f}" for x in (value.median, value.low, value.high))
    return f"{median} ({low} - {high})"


def _floor(floor: float | None, value: Spread | None) -> str:
    return "" if floor is None or value is None else f"{100 * floor / value.median:.0f} %"


def _rate(tokens: int, value: Spread | None) -> str:
    return "" if value is None else f"{tokens / value.median:,.0f}"
