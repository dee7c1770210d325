"""`locret plan`: what a model, a card, a context and its users take, before anything is loaded."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

from typer import Option

from locret.cli.options import ModelOptions, OutputOptions, with_options
from locret.cli.output import bytes_text, emit, say, table
from locret.errors import ConfigError

if TYPE_CHECKING:
    from locret.plan import Plan


@with_options
def plan(
    model: ModelOptions,
    output: OutputOptions,
    shape: Annotated[
        str | None,
        Option("--shape", help="Instead of --model: llama-3.1-8b, ... or LAYERSxHIDDENxINNERxHEADSxKVHEADSxVOCAB."),
    ] = None,
    card: Annotated[str, Option("--card", help="h200, h100, a100-80gb, l40s, rtx-4090, ...")] = "rtx-4090",
    memory: Annotated[str | None, Option("--memory", help="Instead of the card's: 24GB, 16GiB.")] = None,
    bandwidth: Annotated[float | None, Option("--bandwidth", help="Instead of the card's: GB/s, measured.")] = None,
    tflops: Annotated[float | None, Option("--tflops", help="Instead of the card's: bf16 matmuls, measured.")] = None,
    context: Annotated[int, Option("--context", help="Prompt tokens of each user.")] = 131_072,
    users: Annotated[int, Option("--users", help="Sequences held at once.")] = 1,
    new_tokens: Annotated[int, Option("--new-tokens", help="Tokens of an answer.")] = 256,
) -> None:
    """Plan memory and speed. Without --budget: the largest budget that fits. Only the model's config is read."""
    from locret.cli.session import quiet_transformers
    from locret.config import parse_budget
    from locret.plan import Shape, get_card, make_plan, shape_config

    if model.model is not None and shape is not None:
        raise ConfigError("--model and --shape both name a model; give one of them")
    memory_bytes = None
    if memory is not None:
        number, kind = parse_budget(memory)
        if kind != "bytes":
            raise ConfigError(f"--memory {memory!r} has no unit; write 24GB or 16GiB")
        memory_bytes = int(number)
    if model.method_option:
        raise ConfigError("plans are of methods with their defaults; leave --method-option out")
    quiet_transformers()
    if shape is not None:
        found = Shape.of(shape_config(shape), shape)
    else:
        from locret.backbone import EMBEDDED

        found = Shape.load(model.model or str(EMBEDDED))
    options = model.load_options()
    for name in ("device", "heads"):
        options.pop(name, None)
    dtype = options.pop("dtype")
    result = make_plan(
        found,
        get_card(card, memory=memory_bytes, bandwidth=_scaled(bandwidth, 1e9), flops=_scaled(tflops, 1e12)),
        context=context,
        users=users,
        new_tokens=new_tokens,
        dtype="bfloat16" if dtype == "auto" else dtype,
        **options,
    )
    if output.json:
        emit(result.to_dict())
    else:
        _show(result)


def _scaled(number: float | None, by: float) -> float | None:
    return None if number is None else number * by


def _show(plan: Plan) -> None:
    budget = "none (full cache)" if plan.budget is None else f"{plan.budget:,} units per layer and KV head"
    say(f"{plan.shape.name}, {plan.dtype}, on {plan.card.name}: {plan.users} x {plan.context:,} tokens")
    say(f"method {plan.method}, storage {plan.storage}, budget {budget}, chunk {plan.chunk_size:,}")
    table(("what", "bytes", "how"), [(i.name, bytes_text(i.bytes), i.arithmetic) for i in plan.items])
    free = plan.card.memory - plan.peak_bytes
    verdict = f"fits, {bytes_text(free)} left" if plan.fits else f"does not fit: {bytes_text(-free)} too much"
    say(f"peak {bytes_text(plan.peak_bytes)} of {bytes_text(plan.card.memory)}: {verdict}")
    say(f"a full cache would take {bytes_text(plan.users * plan.full_cache_bytes)} instead of "
        f"{bytes_text(plan.users * plan.kv_bytes)}")  # fmt: skip
    say(f"prefill: at most {plan.context / plan.prefill_seconds:,.0f} tokens/s, {plan.prefill_seconds:.2f} s a prompt")
    say(f"decode: at most {1 / plan.decode_seconds:,.0f} tokens/s a user, {plan.users / plan.decode_seconds:,.0f} "
        f"together ({plan.decode_seconds * 1e3:.2f} ms a step)")  # fmt: skip
    say(f"roofline of {plan.card.bandwidth / 1e9:,.0f} GB/s and {plan.card.flops / 1e12:,.4g} TFLOP/s "
        f"({plan.card.source})")  # fmt: skip
