"""The project's own tasks and metrics, and public files, as a `Source`."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

from locret.evaluate.source import Request, TaskFacts
from locret.tasks import metrics, suite
from locret.tasks.haystack import Haystack
from locret.tasks.public import load_public
from locret.tasks.records import Record


class SuiteSource:
    """Generated tasks by `suite.generate`, public sets by `load_public`, scores by `metrics.score`."""

    def __init__(self) -> None:
        self._haystacks: dict[str, Haystack] = {}

    def tasks(self) -> Sequence[str]:
        return list(suite.TASKS)

    def groups(self) -> Mapping[str, Sequence[str]]:
        return {info.group: suite.group(info.group) for info in suite.TASKS.values() if info.group not in suite.TASKS}

    def facts(self, task: str) -> TaskFacts:
        if task not in suite.TASKS:
            return TaskFacts(group="public")
        info = suite.TASKS[task]
        return TaskFacts(info.summary, info.group, info.metric, info.dense, info.query_agnostic_ceiling, info.stop)

    def records(self, request: Request) -> Iterable[Record]:
        if request.public is not None:
            return load_public(request.task, **{"limit": request.count, **request.public})
        if request.text is not None and request.text not in self._haystacks:
            self._haystacks[request.text] = Haystack.of(request.text, request.tokenizer)
        return suite.generate(
            request.task, count=request.count, length=request.length, tokenizer=request.tokenizer, seed=request.seed,
            mode=request.mode, answer_prefix=request.answer_prefix, even_lengths=request.even_lengths,
            sentence=request.sentence_tokens,
            filler=None if request.text is None else self._haystacks[request.text],
        )  # fmt: skip

    def check(self, metric: str, answers: Sequence[str]) -> None:
        metrics.check(metric, answers)

    def score(self, metric: str, prediction: str, answers: Sequence[str]) -> float:
        return metrics.score(metric, prediction, answers)

    def corpus_score(self, metric: str, predictions: Sequence[str], answers: Sequence[Sequence[str]]) -> float | None:
        return metrics.corpus_score(metric, predictions, answers) if metric in metrics.CORPUS else None
