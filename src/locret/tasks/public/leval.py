"""L-Eval (arXiv:2307.11088): {input, instructions, outputs, source, evaluation}, several questions a document.

Every question is a record of its own, in a row over the same context. Scorers are L-Eval's; the wording of the prompt
is ours, because L-Eval's code is GPL. Rows that are judged by people or models (evaluation "human", "LLM") are left
out, as in L-Eval's n-gram evaluation. sci_fi's second half, a fact asked without the document, measures no context:
left out too.
"""

from __future__ import annotations

from collections.abc import Iterator

from locret.errors import DataError
from locret.tasks.public.base import Prompt, PublicSet
from locret.tasks.public.files import Row
from locret.tasks.records import Record

_LIMIT = 512
_DOCUMENT = "Here is a long document; what to do comes after it.\n\n{context}\n\n"
_CLOSED = {
    "coursera": "leval_choices",
    "quality": "leval_choice",
    "tpo": "leval_choice",
    "gsm100": "leval_math",
    "codeU": "leval_code",
    "sci_fi": "leval_judge",
    "topic_retrieval_longchat": "leval_match",
}
_OPEN = (
    "financial_qa", "gov_report_summ", "legal_contract_qa", "meeting_summ", "multidoc_qa", "narrative_qa",
    "natural_question", "news_summ", "paper_assistant", "patent_summ", "review_summ", "scientific_qa", "tv_show_summ",
)  # fmt: skip
_HOW = {
    "leval_choices": "Answer with the letter or letters of all right options and nothing else.",
    "leval_choice": "Answer with the letter of the right option and nothing else.",
    "leval_math": "Reason as in the examples and end with: The answer is",
    "leval_judge": "Answer True or False.",
    "leval_code": "Answer with the final output only.",
    "leval_match": "Answer briefly.",
}
_METRIC_OF = {"exam": "leval_match", "f1": "token_f1", "rouge": "leval_rouge"}


def _convert(task: str, row: Row, index: int) -> Iterator[Record]:
    if row["evaluation"] in ("human", "LLM"):
        return
    if len(row["instructions"]) != len(row["outputs"]):
        raise DataError(f"{len(row['instructions'])} instructions but {len(row['outputs'])} outputs")
    if row["evaluation"] not in _METRIC_OF:
        raise DataError(f"evaluation {row['evaluation']!r} is none of {', '.join(_METRIC_OF)}, human, LLM")
    metric = _CLOSED.get(task) or _METRIC_OF[row["evaluation"]]
    for question, answer in zip(row["instructions"], row["outputs"]):
        how = _HOW.get(metric, f"Answer in about {len(answer.split())} words.")
        prompt = Prompt(_DOCUMENT + "{question}\n{how}", metric, _LIMIT, " Answer:")
        yield prompt.record(
            task, index, row["input"], (answer,), fields={"question": question, "how": how}, source=row.get("source")
        )
        index += 1


SET = PublicSet(
    "leval", "20 tasks over long documents", "L4NLP/LEval",
    "get LEval-data from https://github.com/OpenLMLab/LEval (the hub's copy needs a script)",
    _convert, (*_CLOSED, *_OPEN),
)  # fmt: skip
