"""LongBench v1, its length-balanced part E (arXiv:2308.14508) and v2 (arXiv:2412.15204).

v1: {input, context, answers, length, dataset, language, all_classes, _id}, one file a task, E's end in _e.jsonl; v2:
one file of {question, choice_A .. choice_D, answer, context, length, difficulty}. Prompts, limits: LongBench's (MIT).
The published runs put the whole prompt, lead-in included, in the user's turn, and use no chat template at all for
few-shot and code tasks (`meta["chat"]` is False there).
"""

from __future__ import annotations

from collections.abc import Iterator

from locret.tasks.public.base import Prompt, PublicSet, texts
from locret.tasks.public.files import Row
from locret.tasks.records import Record

_PASSAGES = (
    "Answer the question based on the given passages. Only give me the answer and do not output any other words.\n\n"
    "The following are given passages.\n{context}\n\n"
    "Answer the question based on the given passages. Only give me the answer and do not output any other words.\n\n"
    "Question: {input}\nAnswer:"
)
_STORY = (
    "Answer the question as concisely as you can, using a single phrase if possible. Do not provide any explanation."
)
_QASPER = (
    "concisely as you can, using a single phrase or sentence if possible. If the question cannot be answered based on "
    'the information in the article, write "unanswerable". If the question is a yes/no question, answer "yes", "no", '
    'or "unanswerable". Do not provide any explanation.\n\n'
)
_PROMPTS = {
    "narrativeqa": Prompt(
        f"You are given a story, which can be either a novel or a movie script, and a question. {_STORY}\n\n"
        "Story: {context}\n\nNow, answer the question based on the story as concisely as you can, using a single "
        "phrase if possible. Do not provide any explanation.\n\nQuestion: {input}\n\nAnswer:",
        "token_f1", 128,
    ),
    "qasper": Prompt(
        f"You are given a scientific article and a question. Answer the question as {_QASPER}"
        f"Article: {{context}}\n\n Answer the question based on the above article as {_QASPER}"
        "Question: {input}\n\nAnswer:",
        "token_f1", 128,
    ),
    "multifieldqa_en": Prompt(
        "Read the following text and answer briefly.\n\n{context}\n\nNow, answer the following question based on the "
        "above text, only give me the answer and do not output any other words.\n\nQuestion: {input}\nAnswer:",
        "token_f1", 64,
    ),
    "multifieldqa_zh": Prompt(
        "阅读以下文字并用中文简短回答：\n\n{context}\n\n现在请基于上面的文章回答下面的问题，只告诉我答案，不要输出任何其他字词。\n\n"
        "问题：{input}\n回答：",
        "longbench_qa_f1_zh", 64,
    ),
    "hotpotqa": Prompt(_PASSAGES, "token_f1", 32),
    "2wikimqa": Prompt(_PASSAGES, "token_f1", 32),
    "musique": Prompt(_PASSAGES, "token_f1", 32),
    "dureader": Prompt(
        "请基于给定的文章回答下述问题。\n\n文章：{context}\n\n请基于上述文章回答下面的问题。\n\n问题：{input}\n回答：",
        "longbench_rouge_zh", 128,
    ),
    "gov_report": Prompt(
        "You are given a report by a government agency. Write a one-page summary of the report.\n\nReport:\n{context}"
        "\n\nNow, write a one-page summary of the report.\n\nSummary:",
        "longbench_rouge", 512,
    ),
    "qmsum": Prompt(
        "You are given a meeting transcript and a query containing a question or instruction. Answer the query in one "
        "or more sentences.\n\nTranscript:\n{context}\n\nNow, answer the query based on the above meeting transcript "
        "in one or more sentences.\n\nQuery: {input}\nAnswer:",
        "longbench_rouge", 512,
    ),
    "multi_news": Prompt(
        "You are given several news passages. Write a one-page summary of all news. \n\nNews:\n{context}\n\n"
        "Now, write a one-page summary of all the news.\n\nSummary:",
        "longbench_rouge", 512,
    ),
    "vcsum": Prompt(
        "下面有一段会议记录，请你阅读后，写一段总结，总结会议的内容。\n会议记录：\n{context}\n\n会议总结：",
        "longbench_rouge_zh", 512,
    ),
    "trec": Prompt(
        "Please determine the type of the question below. Here are some examples of questions.\n\n{context}\n{input}",
        "longbench_classification", 64,
    ),
    "triviaqa": Prompt(
        "Answer the question based on the given passage. Only give me the answer and do not output any other words. "
        "The following are some examples.\n\n{context}\n\n{input}",
        "longbench_qa_f1_line", 32,
    ),
    "samsum": Prompt(
        "Summarize the dialogue into a few short sentences. The following are some examples.\n\n{context}\n\n{input}",
        "longbench_rouge_line", 128,
    ),
    "lsht": Prompt(
        "请判断给定新闻的类别，下面是一些例子。\n\n{context}\n{input}", "longbench_classification", 64
    ),
    "passage_count": Prompt(
        "There are some paragraphs below sourced from Wikipedia. Some of them may be duplicates. Please carefully read "
        "these paragraphs and determine how many unique paragraphs there are after removing duplicates. In other "
        "words, how many non-repeating paragraphs are there in total?\n\n{context}\n\nPlease enter the final count of "
        "unique paragraphs after removing duplicates. The output format should only contain the number, such as 1, 2, "
        "3, and so on.\n\nThe final answer is: ",
        "longbench_count", 32,
    ),
    "passage_retrieval_en": Prompt(
        "Here are 30 paragraphs from Wikipedia, along with an abstract. Please determine which paragraph the abstract "
        "is from.\n\n{context}\n\nThe following is an abstract.\n\n{input}\n\nPlease enter the number of the paragraph "
        'that the abstract is from. The answer format must be like "Paragraph 1", "Paragraph 2", etc.\n\n'
        "The answer is: ",
        "longbench_retrieval", 32,
    ),
    "passage_retrieval_zh": Prompt(
        "以下是若干段落文字，以及其中一个段落的摘要。请确定给定的摘要出自哪一段。\n\n{context}\n\n下面是一个摘要\n\n{input}\n\n"
        '请输入摘要所属段落的编号。答案格式必须是"段落1"，"段落2"等格式\n\n答案是：',
        "longbench_retrieval_zh", 32,
    ),
    "lcc": Prompt("Please complete the code given below. \n{context}Next line of code:\n", "longbench_code", 64),
    "repobench-p": Prompt(
        "Please complete the code given below. \n{context}{input}Next line of code:\n", "longbench_code", 64
    ),
}  # fmt: skip
_NO_CHAT = {"trec", "triviaqa", "samsum", "lsht", "lcc", "repobench-p"}
_V2 = Prompt(
    "Please read the following text and answer the question below.\n\n<text>\n{context}\n</text>\n\n"
    "What is the correct answer to this question: {question}\nChoices:\n(A) {A}\n(B) {B}\n(C) {C}\n(D) {D}\n\n"
    'Format your response as follows: "The correct answer is (insert answer here)".',
    "longbench_v2", 128,
)  # fmt: skip


def _convert(task: str, row: Row, index: int) -> Iterator[Record]:
    answers = texts(row["answers"])
    if _PROMPTS[task].metric == "longbench_classification":
        answers = (answers[0], *texts(row["all_classes"]))
    yield _PROMPTS[task].record(
        task, index, row["context"], answers, fields={"input": row["input"]},
        words=row.get("length"), id=row.get("_id", index), chat=task not in _NO_CHAT,
    )  # fmt: skip


def _convert_v2(task: str, row: Row, index: int) -> Iterator[Record]:
    fields = {letter: row[f"choice_{letter}"].strip() for letter in "ABCD"} | {"question": row["question"].strip()}
    yield _V2.record(
        "longbench-v2", index, row["context"].strip(), (row["answer"],), fields=fields,
        id=row.get("_id", index), size=row.get("length"), difficulty=row.get("difficulty"), domain=row.get("domain"),
    )  # fmt: skip


_ENGLISH = ("qasper", "multifieldqa_en", "hotpotqa", "2wikimqa", "gov_report", "multi_news", "trec", "triviaqa",
            "samsum", "passage_count", "passage_retrieval_en", "lcc", "repobench-p")  # fmt: skip
_WHERE = "get data.zip from https://huggingface.co/datasets/THUDM/LongBench and unzip it"
SET = PublicSet("longbench", "21 tasks", "Xnhyacinth/LongBench", _WHERE, _convert, tuple(_PROMPTS))
SET_E = PublicSet(
    "longbench-e", "13 tasks, evenly spread over lengths", "Xnhyacinth/LongBench", _WHERE, _convert, _ENGLISH,
    files={f"{task}_e": task for task in _ENGLISH},
)  # fmt: skip
SET_V2 = PublicSet(
    "longbench-v2", "503 four-choice questions", "THUDM/LongBench-v2",
    "get data.json from https://huggingface.co/datasets/THUDM/LongBench-v2", _convert_v2,
)  # fmt: skip
