"""InfiniteBench's published files (arXiv:2402.13718): {id, context, input, answer, options}, one file a task.

Prompts are its yarn-mistral templates (MIT, src/prompt.py), limits its eval_utils.py's. The lead-in at the end of a
template is the answer prefix.
"""

from __future__ import annotations

import re
from collections.abc import Iterator

from locret.errors import DataError
from locret.tasks.infinitebench import CODE_HEAD, NUMBER_HEAD, PASSKEY_HEAD
from locret.tasks.public.base import Prompt, PublicSet, option_answers, texts
from locret.tasks.public.files import Row
from locret.tasks.records import Record

_OPTIONS = "A. {A}\nB. {B}\nC. {C}\nD. {D}\n\n"
_PROMPTS = {
    "passkey": Prompt(
        PASSKEY_HEAD + "{context}\n\n{input}\n\n", "infinitebench_first_number", 6, "The pass key is"
    ),
    "number_string": Prompt(
        NUMBER_HEAD + "{context}\n\n{input}\n\n", "infinitebench_first_number", 12, "The sequence of digits is"
    ),
    "kv_retrieval": Prompt(
        "Extract the value corresponding to the specified key in the JSON object below.\n\n{context}\n\n{input}",
        "infinitebench_kv", 50,
    ),
    "longbook_sum_eng": Prompt("Summarize the book below.\n\n{context}\n\n", "rouge_lsum", 1200, "Summary:"),
    "longbook_choice_eng": Prompt(
        "Read the book and answer the question.\n\n{context}\n\nQuestion: {input}\n" + _OPTIONS,
        "infinitebench_choice", 40, "The letter of the correct answer is",
    ),
    "longbook_qa_eng": Prompt(
        "Read the book and answer the question. Be very concise in your answer.\n\n{context}\n\nQuestion: {input}\n",
        "token_f1", 40, "Answer:",
    ),
    "longbook_qa_chn": Prompt(
        "阅读以下书籍然后回答问题。\n\n{context}\n\n问题：{input}\n", "infinitebench_qa_zh", 40, "答案："
    ),
    "longdialogue_qa_eng": Prompt(
        "Below is a dialogue script where one random occurrence of a character name is replaced with "
        '"$$MASK$$", and you should try to guess who that character is.\n\n{context}\n\n',
        "infinitebench_dialogue", 40, "The name that has been replaced with $$MASK$$ is likely",
    ),
    "math_find": Prompt("{prefix}\n\n{context}\n\n{input}", "infinitebench_math_find", 3),
    "math_calc": Prompt(
        "Let us calculate the intermediate values of an expression.\n\nExpression: 1 + 3 + 4\nValues: [1, 4, 8]\n\n"
        "Expression: 8 - 3 + 2 - 4\nValues: [8, 5, 7, 3]\n\nExpression: {context}\n",
        "infinitebench_math_calc", 30_000, "Values:",
    ),
    "code_run": Prompt(
        CODE_HEAD + "{context}\n\nPlease compute the exact value of {call}. ",
        "infinitebench_code_run", 5, "The value of {call} is",
    ),
    "code_debug": Prompt(
        "Following is a Python code where exactly one of the functions/methods has a deliberate error that makes it "
        "crash.\n\n{context}\n\nOptions:\n" + _OPTIONS,
        "infinitebench_code_debug", 5, "The correct option is:",
    ),
}  # fmt: skip


def _convert(task: str, row: Row, index: int) -> Iterator[Record]:
    fields = {"input": row.get("input", "")}
    answers = texts(row["answer"])
    if task in ("longbook_choice_eng", "code_debug"):
        fields |= dict(zip("ABCD", row["options"], strict=True))
        answers = option_answers(row["answer"], row["options"])
    elif task == "code_run":
        call = re.search(r"func_[0-9]+\(-?[0-9]+\)", row["input"])
        if call is None:
            raise DataError(f"code_run's input names no call like func_1(2): {row['input']!r}")
        fields |= {"call": call.group(), "name": call.group().split("(")[0]}
    elif task == "math_find":
        which = re.search(r"The .+ of", row["input"])
        if which is None:
            raise DataError(f"math_find's input names no number like 'The largest number of': {row['input']!r}")
        fields["prefix"] = f"What is {which.group().lower()[:-3]} in the following list?"
    yield _PROMPTS[task].record(task, index, row["context"], answers, fields=fields, id=row.get("id", index))


SET = PublicSet(
    "infinitebench", "12 tasks of 100K tokens and more", "xinrongzhang2022/InfiniteBench",
    "get the .jsonl files from https://huggingface.co/datasets/xinrongzhang2022/InfiniteBench",
    _convert, tuple(_PROMPTS),
)  # fmt: skip
