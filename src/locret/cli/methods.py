"""`locret methods`: what --method accepts, read from the registry."""

from __future__ import annotations

from locret.cli.options import OutputOptions, with_options
from locret.cli.output import emit, table

_FIELDS = ("name", "paper", "summary", "query_aware", "bounded_prefill", "trained")


@with_options
def methods(output: OutputOptions) -> None:
    """List the eviction methods."""
    from locret.methods import list_methods

    infos = [{field: getattr(info, field) for field in _FIELDS} for info in list_methods()]
    if output.json:
        emit(infos)
        return
    yes = {True: "yes", False: ""}
    rows = [
        (i["name"], i["summary"], yes[i["trained"]], yes[i["query_aware"]], yes[i["bounded_prefill"]], i["paper"])
        for i in infos
    ]
    table(("method", "keeps", "trained", "reads the question", "bounded prefill", "paper"), rows)
