"""How an answer is scored: one function a metric, (prediction, answers) -> 0..100, named as records name them.

What several answers mean is said by each metric: mostly any of them is right; `string_match_all` wants all; a few carry
what the published scorer reads beside the gold answer (labels, options), which the docstring then names. Benchmarks
whose score is not the mean over samples have an entry in `CORPUS`.
"""

from __future__ import annotations

import difflib
import re
import string
from collections import Counter
from collections.abc import Callable, Sequence
from statistics import fmean

from locret.errors import ConfigError, DataError, unknown
from locret.tasks import repoqa, rouge

Metric = Callable[[str, Sequence[str]], float]
METRICS: dict[str, Metric] = {}
CORPUS: dict[str, Callable[[Sequence[str], Sequence[Sequence[str]]], float]] = {}

_CONTROL = re.compile(r"[\x00-\x1f]")
_NUMBER = re.compile(r"\d+\.\d+|\d+")
_ARTICLES = re.compile(r"\b(a|an|the)\b")
_PUNCTUATION = str.maketrans("", "", string.punctuation)
_PUNCTUATION_ZH = str.maketrans(
    "", "",
    string.punctuation + "！？｡。＂＃＄％＆＇（）＊＋，－／：；＜＝＞＠［＼］＾＿｀｛｜｝～｟｠｢｣､、〃》「」『』【】"
    "〔〕〖〗〘〙〚〛〜〝〞〟〰〾〿–—‘’‛“”„‟…‧﹏.",
)  # fmt: skip


def score(metric: str, prediction: str, answers: Sequence[str]) -> float:
    """One sample's score, 0..100.

    Raises: ConfigError: an unknown metric; DataError: no answers, or answers that this metric cannot be used with.
    """
    if metric not in METRICS:
        raise unknown("metric", metric, METRICS)
    if isinstance(answers, str) or not answers:
        raise DataError(f"metric {metric!r} needs a list of at least one answer, not {answers!r}")
    return float(METRICS[metric](prediction, answers))


def check(metric: str, answers: Sequence[str]) -> None:
    """Raise now what `score` would raise after the model has run."""
    score(metric, "", answers)


def corpus_score(metric: str, predictions: Sequence[str], answers: Sequence[Sequence[str]]) -> float:
    """The benchmark's number for a whole set, 0..100: the mean over samples, or what `CORPUS` says."""
    if len(predictions) != len(answers) or not predictions:
        raise DataError(f"{len(predictions)} predictions for {len(answers)} samples; give one each, at least one")
    if metric in CORPUS:
        return CORPUS[metric](predictions, answers)
    return fmean(score(metric, prediction, gold) for prediction, gold in zip(predictions, answers, strict=True))


def longbench_e(scores: Sequence[float], lengths: Sequence[int]) -> dict[str, float]:
    """LongBench-E's columns: means over samples of under 4,000, under 8,000, and more words; empty ones left out."""
    groups: dict[str, list[float]] = {"0-4k": [], "4-8k": [], "8k+": []}
    for value, length in zip(scores, lengths, strict=True):
        groups["0-4k" if length < 4000 else "4-8k" if length < 8000 else "8k+"].append(value)
    return {name: fmean(values) for name, values in groups.items() if values}


def _metric(name: str) -> Callable[[Metric], Metric]:
    def register(function: Metric) -> Metric:
        assert name not in METRICS, name
        METRICS[name] = function
        return function

    return register


def _best(one: Callable[[str, str], float]) -> Metric:
    """The best over the answers, as a percentage."""
    return lambda prediction, answers: 100.0 * max(one(prediction, answer) for answer in answers)


# ---------------------------------------------------------------------- texts compared


def normalize(text: str) -> str:
    """SQuAD's: lower case, no punctuation, no articles, single blanks.

    >>> normalize("The  Cat's hat!")
    'cats hat'
    """
    return " ".join(_ARTICLES.sub(" ", text.lower().translate(_PUNCTUATION)).split())


def _normalize_zh(text: str) -> str:
    return "".join(text.lower().translate(_PUNCTUATION_ZH).split())


def _f1(found: Sequence[str], wanted: Sequence[str]) -> float:
    same = (Counter(found) & Counter(wanted)).total()
    return 2.0 * same / (len(found) + len(wanted)) if same else 0.0


def _token_f1(prediction: str, answer: str) -> float:
    return _f1(normalize(prediction).split(), normalize(answer).split())


def _first_line(text: str) -> str:
    return text.lstrip("\n").split("\n")[0]


METRICS["exact_match"] = _best(lambda prediction, answer: normalize(prediction) == normalize(answer))
METRICS["exact_match_line"] = _best(lambda p, answer: normalize(_first_line(p.strip())) == normalize(answer))
METRICS["contains"] = _best(lambda prediction, answer: answer.lower() in prediction.lower())
METRICS["token_f1"] = _best(_token_f1)  # also InfiniteBench longbook_qa_eng, LongBench qa_f1, L-Eval f1
METRICS["rouge_l"] = _best(rouge.rouge_l)
METRICS["rouge_lsum"] = _best(rouge.rouge_lsum)  # InfiniteBench longbook_sum_eng, SCBench summary


@_best
def _word_recall(prediction: str, answer: str) -> float:
    found, wanted = Counter(rouge.words(prediction)), Counter(rouge.words(answer))
    return (found & wanted).total() / max(1, wanted.total())


@_best
def _word_prefix(prediction: str, answer: str) -> float:
    found, wanted = prediction.split(), answer.split()
    same = next((i for i, (a, b) in enumerate(zip(found, wanted)) if a != b), min(len(found), len(wanted)))
    return same / max(1, len(wanted))


METRICS["word_recall"] = _word_recall  # ROUGE-1 recall: how much of the answer is in the prediction
METRICS["word_prefix"] = _word_prefix  # how many of the answer's words come first and in order, before a wrong one


# ---------------------------------------------------------------------- RULER (arXiv:2404.06654), scripts/eval


def _ruler_clean(text: str) -> str:
    return _CONTROL.sub("\n", text.strip()).strip().lower()


@_metric("string_match_all")
def _string_match_all(prediction: str, answers: Sequence[str]) -> float:
    """The share of all answers that occur, whatever their case."""
    text = _ruler_clean(prediction)
    return 100.0 * sum(answer.lower() in text for answer in answers) / len(answers)


@_metric("string_match_part")
def _string_match_part(prediction: str, answers: Sequence[str]) -> float:
    """Whether any answer occurs, whatever its case."""
    text = _ruler_clean(prediction)
    return 100.0 * any(answer.lower() in text for answer in answers)


# ---------------------------------------------------------------------- InfiniteBench (arXiv:2402.13718)


def _blank(text: str, drop: str) -> str:
    return text.translate(str.maketrans(drop, " " * len(drop)))


def _first_number(prediction: str, answer: str) -> float:
    found = re.search(r"[0-9]+", prediction)
    return found is not None and found.group() == answer


METRICS["infinitebench_first_number"] = _best(_first_number)  # passkey, number_string
METRICS["infinitebench_kv"] = _best(lambda p, answer: answer in _blank(p, "\n:\"'.,?!{}").split())
METRICS["infinitebench_qa_zh"] = _best(lambda p, answer: _f1(_normalize_zh(p), _normalize_zh(answer)))


@_metric("infinitebench_dialogue")
def _dialogue(prediction: str, answers: Sequence[str]) -> float:
    """The first answer, a name in capitals, is a word of the prediction; further answers are not read, as published."""
    return 100.0 * (answers[0].upper() in _blank(prediction, "\n:\"'.,?!{}").upper().split())


def _as_number(metric: str, answer: str) -> float:
    try:
        return float(answer)
    except ValueError:
        raise DataError(f"metric {metric!r} compares numbers; the answer is {answer!r}") from None


@_metric("infinitebench_math_find")
def _math_find(prediction: str, answers: Sequence[str]) -> float:
    """The first number equals the answer (the published scorer crashes on "42.5" where 42 is right)."""
    wanted = _as_number("infinitebench_math_find", answers[0])
    found = _NUMBER.search(prediction)
    return 100.0 * (found is not None and float(found.group()) == wanted)


@_metric("infinitebench_math_calc")
def _math_calc(prediction: str, answers: Sequence[str]) -> float:
    """The share of running values, all of them in `answers`, that come right before the first wrong one."""
    found = re.findall(r"[0-9]+", prediction)
    right = 0
    for number, answer in zip(found, answers):
        if int(number) != _as_number("infinitebench_math_calc", answer):
            break
        right += 1
    return 100.0 * right / len(answers)


@_metric("infinitebench_code_run")
def _code_run(prediction: str, answers: Sequence[str]) -> float:
    """The last word is the right integer."""
    wanted = _as_number("infinitebench_code_run", answers[0])
    words = _blank(prediction.strip(), "\n.`'\":").split()
    try:
        return 100.0 * (int(words[-1]) == wanted)
    except (IndexError, ValueError):
        return 0.0


@_metric("infinitebench_code_debug")
def _code_debug(prediction: str, answers: Sequence[str]) -> float:
    """answers: the function's name, and the letter of its option."""
    name, letter = _two(answers, "infinitebench_code_debug")
    if prediction[:2] in (f"{letter}.", f"{letter}:"):
        return 100.0
    text = re.sub(r"[\n`'\"\-*]|[Oo]ption", " ", prediction.strip())
    text = re.sub(r"  +", " ", text)
    for lead in ("answer is:", "is:", "answer:"):
        _, found, rest = text.partition(lead)
        if found:
            return 100.0 * rest[1:].startswith((letter, name))
    return 0.0


@_metric("infinitebench_choice")
def _choice(prediction: str, answers: Sequence[str]) -> float:
    """answers: the option's text, and its letter. Leading blanks are dropped (as SCBench does; InfiniteBench fails)."""
    _two(answers, "infinitebench_choice")
    text = prediction.strip()
    if not text:
        return 0.0
    if text[0] in "ABCD":
        return 100.0 * (text[0] in answers)
    text = re.sub(r"  +", " ", _blank(text, "\n\"'.,?!{}"))
    for lead in ("answer is:", "answer:", "answer is", "option is"):
        _, found, rest = text.partition(lead)
        if found:
            return 100.0 * rest[1:].startswith(tuple(answers))
    letter = next((word for word in text.split() if word in "ABCD"), "")
    return 100.0 * (letter in answers)


def _two(answers: Sequence[str], metric: str) -> tuple[str, str]:
    if len(answers) != 2 or answers[1] not in ("A", "B", "C", "D"):
        raise DataError(f"metric {metric!r} wants two answers, a text and a letter A to D, not {list(answers)!r}")
    return answers[0], answers[1]


# ---------------------------------------------------------------------- LongBench (arXiv:2308.14508)


def _cut_zh(text: str) -> list[str]:
    try:
        import jieba  # type: ignore[import-not-found,import-untyped,unused-ignore]
    except ImportError:
        raise ConfigError("LongBench's Chinese metrics cut words with jieba; install it: pip install jieba") from None
    return list(jieba.cut(text, cut_all=False))


def _qa_f1_zh(prediction: str, answer: str) -> float:
    found, wanted = ([w for w in map(_normalize_zh, _cut_zh(text)) if w] for text in (prediction, answer))
    return _f1(found, wanted)


def _share_equal(prediction: str, wanted: str) -> float:
    numbers = re.findall(r"\d+", prediction)
    return numbers.count(wanted) / len(numbers) if numbers else 0.0


def _retrieval(label: str) -> Callable[[str, str], float]:
    def share(prediction: str, answer: str) -> float:
        found = re.search(label + r"(\d+)", answer)
        if found is None:
            raise DataError(f"the answer to a retrieval question looks like {label + '7'!r}, not {answer!r}")
        return _share_equal(prediction, found.group(1))

    return share


def _code_similarity(prediction: str, answer: str) -> float:
    lines = prediction.lstrip("\n").split("\n")
    line = next((line for line in lines if not any(mark in line for mark in ("`", "#", "//"))), "")
    if not line or not answer:
        return 0.0
    return (
        round(100 * difflib.SequenceMatcher(None, line, answer).ratio()) / 100
    )  # fuzzywuzzy's ratio, rounded as there


METRICS["longbench_qa_f1_line"] = _best(lambda p, answer: _token_f1(_first_line(p), answer))  # triviaqa
METRICS["longbench_rouge"] = _best(rouge.summary_l)
METRICS["longbench_rouge_line"] = _best(lambda p, answer: rouge.summary_l(_first_line(p), answer))  # samsum
METRICS["longbench_qa_f1_zh"] = _best(_qa_f1_zh)
METRICS["longbench_rouge_zh"] = _best(lambda p, a: rouge.summary_l(" ".join(_cut_zh(p)), " ".join(_cut_zh(a))))
METRICS["longbench_count"] = _best(_share_equal)
METRICS["longbench_retrieval"] = _best(_retrieval("Paragraph "))
METRICS["longbench_retrieval_zh"] = _best(_retrieval("段落"))
METRICS["longbench_code"] = _best(_code_similarity)


@_metric("longbench_classification")
def _classification(prediction: str, answers: Sequence[str]) -> float:
    """answers: the right class, then all classes. 1 / (classes named in the first line), if the right one is named.

    A class whose name lies inside the right one's does not count as named. As published, removing one while walking the
    list skips the next: two such classes in a row leave the second in.
    """
    right, classes = answers[0], answers[1:]
    if right not in classes:
        raise DataError(f"metric 'longbench_classification' wants the right class and then all classes, the right one "
                        f"among them, not {list(answers)!r}")  # fmt: skip
    line = _first_line(prediction)
    named = [name for name in classes if name in line]
    for name in named:  # not a copy: the published loop, with what it skips
        if name in right and name != right:
            named.remove(name)
    return 100.0 / len(named) if right in named else 0.0


@_metric("longbench_v2")
def _longbench_v2(prediction: str, answers: Sequence[str]) -> float:
    """The letter in "The correct answer is (X)", brackets optional, asterisks ignored."""
    text = prediction.replace("*", "")
    found = re.search(r"The correct answer is \(([A-D])\)", text) or re.search(r"The correct answer is ([A-D])", text)
    return 100.0 * (found is not None and found.group(1) in answers)


# ---------------------------------------------------------------------- L-Eval (arXiv:2307.11088)


def _leval_plain(text: str) -> str:
    return " ".join(_ARTICLES.sub(" ", text.translate(_PUNCTUATION)).split())


def _leval_match(prediction: str, answer: str) -> float:
    """Letters: equal, or a quarter for a part of them (also for none). Numbers: equal. Text: contained, caseless."""
    if not set(_leval_plain(answer)) - set("ABCD"):
        if _leval_plain(prediction) == _leval_plain(answer):
            return 1.0
        return 0.25 * (set(_leval_plain(prediction)) <= set(_leval_plain(answer)))
    try:
        return float(float(prediction) == float(answer))
    except ValueError:
        line = next((line for line in prediction.split("\n") if len(line) > 1), prediction)
        return float(answer.lower().replace(" ", "") in line.lower().replace(" ", ""))


def _leval_letters(prediction: str) -> str:
    """The first letter A to D; "A", the published guess, where there is none."""
    if prediction in "ABCD":  # also "AB" and "": as published
        return prediction
    return next((letter for letter in prediction if letter in "ABCD"), "A")


def _leval_many_letters(prediction: str) -> str:
    """coursera, where several options may be right: leading letters, or else letters that stand alone."""
    if prediction in "ABCD":
        return prediction
    lead = re.match(r"[ABCD]*", prediction)
    first = lead.group() if lead else ""
    if len(first) > 1:
        return "".join(sorted(set(first)))
    rest = prediction[len(first) :].split("Question")[0]
    letters = {c for option in re.findall(r"\s*[A-Z](?=[\s.)])", rest) for c in option if c in "ABCD"} | set(first)
    return "".join(sorted(letters)) or "A"


def _leval_gold_letters(answer: str) -> str:
    return re.sub(r"[^A-D]", "", (answer.split() or [""])[0]) or "A"


def _leval_number(text: str) -> str:
    """gsm100: behind "The answer is", or else the first paragraph's last word with a digit; whole part only."""
    found = re.search(r"The answer is (\S+)", text)
    if found:
        word = found.group(1)
    else:
        last = text.split("\n\n")[0].split(" ")[::-1]
        word = next((w for w in last if any(c.isdigit() for c in w)), "")
    return "".join(c for c in word.split(".")[0] if c.isdigit())


def _leval_code_text(text: str) -> str:
    text = re.sub(r"\s+", " ", text)
    for mark in (",", "'", "\\", ".0"):
        text = text.replace(mark, "")
    return text.replace("] [", "][").replace("[ [", "[[").replace("] ]", "]]")


def _leval_code(prediction: str, answer: str) -> float:
    """codeU: the words behind "the final output", or the last ones; three more than the answer has."""
    text = _leval_code_text(prediction)
    for phrase in ("will be", "of the code", "is", "would be", "the value of", "the result of", "printed"):
        text = text.replace(phrase, "")
    size = len(answer.split()) + 3
    if "the final output" in text:
        text = " ".join(re.split(r"\s+", text.split("the final output")[-1])[:size])
    else:
        text = " ".join(re.split(r"\s+", text)[-size:])
    return _leval_match(text, _leval_code_text(answer))


def _leval_judge(prediction: str, answer: str) -> float:
    """sci_fi: the first word with "true" or "false" in it, against the answer's part before "[fact:"."""
    words = prediction.lower().split("[fact:")[0].split()
    said = next((v for word in words for v in ("true", "false") if v in word), "<error>")
    return _leval_match(said, answer.lower().split("[fact:")[0].strip())


METRICS["leval_match"] = _best(_leval_match)  # topic_retrieval_longchat
METRICS["leval_choice"] = _best(lambda p, a: _leval_match(_leval_letters(p), _leval_gold_letters(a)))  # quality, tpo
METRICS["leval_choices"] = _best(lambda p, a: _leval_match(_leval_many_letters(p), _leval_gold_letters(a)))  # coursera
METRICS["leval_math"] = _best(lambda p, a: _leval_match(_leval_number(p), _leval_number(a)))  # gsm100
METRICS["leval_code"] = _best(_leval_code)
METRICS["leval_judge"] = _best(_leval_judge)


def _rouge_parts(prediction: str, answers: Sequence[str]) -> tuple[float, float, float]:
    """ROUGE-1, -2, -L, each the best over the answers, 0..100."""
    return (
        100.0 * max(rouge.rouge_n(prediction, answer, 1) for answer in answers),
        100.0 * max(rouge.rouge_n(prediction, answer, 2) for answer in answers),
        100.0 * max(rouge.rouge_l(prediction, answer) for answer in answers),
    )


def _geometric(parts: Sequence[float]) -> float:
    return float((parts[0] * parts[1] * parts[2]) ** (1 / 3))


@_metric("leval_rouge")
def _leval_rouge(prediction: str, answers: Sequence[str]) -> float:
    """Geometric mean of ROUGE-1, -2 and -L. The published number takes it of the three means: `corpus_score` does."""
    return _geometric(_rouge_parts(prediction, answers))


def _leval_rouge_corpus(predictions: Sequence[str], answers: Sequence[Sequence[str]]) -> float:
    parts = [_rouge_parts(prediction, gold) for prediction, gold in zip(predictions, answers, strict=True)]
    return _geometric([fmean(column) for column in zip(*parts, strict=True)])


CORPUS["leval_rouge"] = _leval_rouge_corpus


# ---------------------------------------------------------------------- HELMET (arXiv:2410.02694), utils.py


def _parsed(prediction: str, lead: str) -> str:
    """What stands behind the lead, to the end of the line; or else the first line."""
    found = re.search(f"{lead}(.*)(?:\n|$)", prediction, re.IGNORECASE) or re.search(r"^(.*)(?:\n|$)", prediction)
    text = found.group(1).strip() if found else ""
    return re.sub(f"^{re.escape(lead)}", "", text, flags=re.IGNORECASE).strip()


def _sub_em(prediction: str, answer: str) -> float:
    return normalize(answer) in normalize(prediction)


METRICS["helmet_sub_em"] = _best(_sub_em)
METRICS["helmet_json_kv"] = _best(lambda p, a: _sub_em(p, a) or _sub_em(_parsed(p, "corresponding value:"), a))
METRICS["helmet_icl"] = _best(
    lambda p, a: normalize(p) == normalize(a) or normalize(_parsed(p, "label:")) == normalize(a)
)


# ---------------------------------------------------------------------- BABILong (2406.10149), SCBench (2412.10319)


@_metric("babilong")
def _babilong(prediction: str, answers: Sequence[str]) -> float:
    """answers: the right label, then the labels that must not be named (all of the task's, less the question's)."""
    text = prediction.lower().split(".")[0].split("<context>")[0].split("<example>")[0]
    named = {label.lower() for label in answers if label.lower() in text}
    return 100.0 * (named == {answers[0].lower()})


METRICS["scbench_kv"] = _best(lambda prediction, answer: answer in prediction)  # kv, prefix_suffix
METRICS["scbench_any"] = _best(
    lambda prediction, answer: answer.upper() in prediction.strip().upper()
)  # qa_eng, many_shot


@_metric("scbench_repoqa")
def _repoqa(prediction: str, answers: Sequence[str]) -> float:
    """answers: the function, its name, its language, then name and text of all that are asked of its repository.

    Right if no other is more alike (the first of equals counts) and BLEU is at least 0.8.
    """
    _, name, language, *others = (*answers, "", "")[: max(3, len(answers))]
    functions = list(zip(others[::2], others[1::2], strict=False))
    if language not in repoqa.LANGUAGES or len(others) % 2 or name not in dict(functions):
        raise DataError(f"metric 'scbench_repoqa' wants a function, its name, its language (one of "
                        f"{', '.join(repoqa.LANGUAGES)}), then name and text of all functions, this one among them, "
                        f"not {list(answers)!r}")  # fmt: skip
    found, similarity = repoqa.closest(prediction, language, functions)
    return 100.0 * (found == name and similarity >= 0.8)
