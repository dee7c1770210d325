"""`locret methods`: what --method accepts, read from the registry; `locret methods show NAME`: one of them."""

from __future__ import annotations

from dataclasses import asdict
from typing import Annotated, Any

from typer import Argument

from locret.cli.options import OutputOptions, with_options
from locret.cli.output import emit, say, table
from locret.errors import ConfigError


@with_options
def methods(
    output: OutputOptions,
    words: Annotated[
        list[str] | None, Argument(metavar="[show NAME]", help="Slots, options and defaults of one method.")
    ] = None,
) -> None:
    """List the eviction methods, or show one."""
    if not words:
        _list(json=output.json)
    elif len(words) == 2 and words[0] == "show":
        _show(words[1], json=output.json)
    else:
        raise ConfigError(f"`locret methods {' '.join(words)}` is not understood; write `locret methods`, or "
                          "`locret methods show NAME`")  # fmt: skip


def _list(*, json: bool) -> None:
    from locret.methods import list_methods

    infos = [asdict(info) for info in list_methods()]
    if json:
        emit(infos)
        return
    table(("method", "keeps", "remarks", "paper"), [(i["name"], i["summary"], _remarks(i), i["paper"]) for i in infos])


def _remarks(info: dict[str, Any]) -> str:
    remarks = (("trained", info["trained"]), ("reads the question", info["query_aware"]),
               ("prefill not bounded", not info["bounded_prefill"]))  # fmt: skip
    return ", ".join(text for text, holds in remarks if holds)


def _show(name: str, *, json: bool) -> None:
    from locret.methods import find_method, list_methods, method_options, method_slots

    find_method(name)  # unknown names end here
    info = asdict(next(info for info in list_methods() if info.name == name))
    found = {**info, "slots": method_slots(name), "options": method_options(name)}
    if json:
        emit(found)
        return
    say(f"{name}: {info['summary']}")
    for label in ("paper", "variant"):
        if info[label]:
            say(f"{label}: {info[label]}")
    if _remarks(info):
        say(f"remarks: {_remarks(info)}")
    table(("slot", "choice"), [(slot, text) for slot, text in found["slots"].items()])
    if found["options"]:
        table(("option", "default"), [(option, repr(value)) for option, value in found["options"].items()])
