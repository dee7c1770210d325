"""Published benchmarks from local files, or from the hub by id; every row becomes a `Record` with its official metric.

    load_public("infinitebench/passkey", path="data/passkey.jsonl")
    load_public("longbench", path="data/longbench")               # every task's file in the folder
    load_public("scbench/scbench_kv", hub_id="microsoft/SCBench")

Nothing is downloaded unless a hub id is given, and no script of a dataset is ever run.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

from locret.errors import ConfigError, DataError, unknown
from locret.tasks import metrics, ruler
from locret.tasks.public import infinitebench, kvpress, leval, longalpaca, longbench, recall, scbench
from locret.tasks.public.base import PublicSet
from locret.tasks.public.files import ENDINGS, Row, find, rows, stem
from locret.tasks.public.kvpress import export_kvpress, from_kvpress, is_kvpress, to_kvpress
from locret.tasks.records import Record
from locret.tasks.request import TaskInfo

__all__ = ["SETS", "export_kvpress", "load_public", "to_kvpress"]

SETS: dict[str, PublicSet] = {
    one.name: one
    for one in (
        infinitebench.SET, leval.SET, longbench.SET, longbench.SET_E, longbench.SET_V2, recall.RULER, scbench.SET,
        recall.HELMET, recall.BABILONG, longalpaca.SET, kvpress.SET,
    )
}  # fmt: skip
_KNOWN: dict[str, TaskInfo] = {info.name: info for info in ruler.TASKS}


def load_public(
    name: str,
    path: str | Path | None = None,
    hub_id: str | None = None,
    revision: str | None = None,
    limit: int | None = None,
) -> Iterator[Record]:
    """Records of a public benchmark ("set" or "set/task").

    Args:
        path: a file, or a folder whose files are named after the tasks.
        hub_id: a dataset on the Hugging Face hub, downloaded as files (used if path is None).
        limit: at most so many records of each file.
    Raises: ConfigError: an unknown set or task, neither path nor hub id; DataError: a missing file (and where to get
        it), a broken line (file and line), a row without its benchmark's fields, answers its metric cannot use.
    """
    name, _, task = name.partition("/")
    if name not in SETS:
        raise unknown("public set", name, SETS)
    one = SETS[name]
    if task and one.tasks and task not in one.tasks:
        raise unknown(f"task of {name}", task, one.tasks)
    if path is None and hub_id is None:
        raise ConfigError(f"{name}: give path= (a file or folder; {one.where}) or hub_id= (for example {one.hub_id!r})")
    if limit is not None and limit < 1:
        raise ConfigError(f"limit is {limit}; leave it out for all records, or ask for at least one")
    folder = Path(path) if path is not None else _download(str(hub_id), revision, one, task)
    alone = task if folder.is_file() else ""
    chosen = [(file, found) for file in find(folder, one.where) if (found := _task_of(file, one) or alone or None)]
    if one.tasks:
        chosen = [(file, found) for file, found in chosen if found in one.tasks and task in ("", found)]
    if not chosen:
        raise DataError(f"{folder}: no file is named after {task or f'a task of {name}'} (valid: "
                        f"{', '.join(one.files or one.tasks)}); {one.where}; or name one file and its task: "
                        f"'{name}/{task or one.tasks[0]}'")  # fmt: skip
    return _records(one, chosen, limit)


def _records(one: PublicSet, chosen: list[tuple[Path, str]], limit: int | None) -> Iterator[Record]:
    counts: dict[str, int] = {}
    for file, task in chosen:
        left = limit
        found_rows = rows(file)
        for row, where in found_rows if one.together is None else one.together(task, found_rows):
            if left is not None and left <= 0:
                break
            try:
                found = _convert(one, task, row, counts.get(task, 0))[:left]
            except ConfigError:
                raise
            except KeyError as error:
                raise DataError(f"{where}: a row of {one.name} has a field {error}; this one has "
                                f"{', '.join(sorted(map(str, row)))}") from None  # fmt: skip
            except (DataError, TypeError, ValueError, AttributeError) as error:
                raise DataError(f"{where}: {error}") from None
            counts[task] = counts.get(task, 0) + len(found)
            left = None if left is None else left - len(found)
            yield from found


def _convert(one: PublicSet, task: str, row: Row, index: int) -> list[Record]:
    """The records of a row, with names that say the benchmark, their answers checked against their metrics."""
    if is_kvpress(row):
        found = [from_kvpress(row, index, _KNOWN, task, _metric(one, task))]
    else:
        found = list(one.convert(task, row, index))
    for record in found:
        for answers in (record.answers, *(turn.answers for turn in record.turns)):
            metrics.check(record.metric, answers)
    if one.name == "kvpress":
        return found
    return [replace(record, task=f"{one.name}/{task}" if one.tasks else one.name) for record in found]


def _task_of(file: Path, one: PublicSet) -> str | None:
    """The task that a file is named after, by itself or by its folder; None: none of this set's."""
    if not one.tasks:
        return stem(file)
    names = one.files or {task: task for task in one.tasks}
    return next(
        (names[name] for name in (stem(file), *(part.name for part in file.parents[:3])) if name in names), None
    )


def _metric(one: PublicSet, task: str) -> str:
    """How a benchmark's task is scored, for its rows in kvpress's schema."""
    prompts = {**infinitebench._PROMPTS, **longbench._PROMPTS}
    return prompts[task].metric if one.name in ("infinitebench", "longbench", "longbench-e") and task in prompts else ""


def _download(hub_id: str, revision: str | None, one: PublicSet, task: str) -> Path:
    """Data files only; of one task where one is named."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    names = [name for name, found in (one.files or {task: task}).items() if found == task] if task else [""]
    patterns = [pattern for name in names for ending in ENDINGS
                for pattern in ((f"*{name}*{ending}", f"*{name}*/*{ending}") if name else (f"*{ending}",))]  # fmt: skip
    try:
        return Path(snapshot_download(hub_id, repo_type="dataset", revision=revision, allow_patterns=patterns))
    except (HfHubHTTPError, LocalEntryNotFoundError, OSError, ValueError) as error:
        raise DataError(f"dataset {hub_id!r} cannot be had from the hub ({str(error).splitlines()[0]}); {one.where}, "
                        f"and give path=") from None  # fmt: skip
