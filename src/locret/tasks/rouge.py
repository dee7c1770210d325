"""ROUGE (Lin, 2004) as two packages compute it, because benchmarks name one or the other and the numbers differ.

`rouge_n`, `rouge_l` and `rouge_lsum` agree with google's rouge-score without a stemmer (InfiniteBench, L-Eval):
lower-case runs of [a-z0-9] are words, repeated words count. `summary_l` agrees with the PyPI package rouge 1.0.1
(LongBench): words are what stands between blanks, sentences end at ".", and only distinct words count.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Sequence

_WORD = re.compile(r"[a-z0-9]+")


def words(text: str) -> list[str]:
    """Lower-case alphanumeric words, as rouge-score splits without a stemmer.

    >>> words("It's 3.5 km!")
    ['it', 's', '3', '5', 'km']
    """
    return _WORD.findall(text.lower())


def rouge_n(prediction: str, answer: str, n: int) -> float:
    """F-measure of n-grams, 0..1."""
    found, wanted = _ngrams(words(prediction), n), _ngrams(words(answer), n)
    return _f(sum((found & wanted).values()), sum(found.values()), sum(wanted.values()))


def rouge_l(prediction: str, answer: str) -> float:
    """F-measure of the longest common subsequence of both texts, 0..1."""
    found, wanted = words(prediction), words(answer)
    return _f(len(_common(wanted, found)), len(found), len(wanted))


def rouge_lsum(prediction: str, answer: str) -> float:
    """Summary-level ROUGE-L, 0..1: lines are sentences, each answer line is matched with the union over all lines."""
    found = [words(line) for line in prediction.split("\n")]
    wanted = [words(line) for line in answer.split("\n")]
    left_found, left_wanted = Counter(w for line in found for w in line), Counter(w for line in wanted for w in line)
    total_found, total_wanted = left_found.total(), left_wanted.total()
    hits = 0
    for line in wanted:
        union = sorted({i for other in found for i in _common(line, other)})
        for word in (line[i] for i in union):
            if left_found[word] > 0 and left_wanted[word] > 0:  # no word of either side counts twice
                hits += 1
                left_found[word] -= 1
                left_wanted[word] -= 1
    return _f(hits, total_found, total_wanted)


def summary_l(prediction: str, answer: str) -> float:
    """ROUGE-L of the PyPI package rouge 1.0.1, 0..1; 0 where either text has no sentence.

    That package recurses once a word and LongBench scores 0 when it hits Python's limit; this one has no limit.
    """
    found, wanted = _sentences(prediction), _sentences(answer)
    if not found or not wanted:
        return 0.0
    union: set[str] = set()
    for line in wanted:
        for other in found:
            union |= {line[i] for i in _common(line, other, last_of_ties=True)}
    precision = len(union) / len({w for line in found for w in line})
    recall = len(union) / len({w for line in wanted for w in line})
    return 2.0 * (precision * recall) / (precision + recall + 1e-8)


def _sentences(text: str) -> list[list[str]]:
    # "".split(" ") is [""]: a blank sentence holds one empty word there
    return [" ".join(part.split()).split(" ") for part in text.split(".") if part]


def _ngrams(tokens: Sequence[str], n: int) -> Counter[tuple[str, ...]]:
    return Counter(tuple(tokens[i : i + n]) for i in range(len(tokens) - n + 1))


def _f(hits: int, num_found: int, num_wanted: int) -> float:
    if not hits:
        return 0.0
    precision, recall = hits / num_found, hits / num_wanted
    return 2 * precision * recall / (precision + recall)


def _common(wanted: Sequence[str], found: Sequence[str], last_of_ties: bool = False) -> list[int]:
    """Indices into `wanted` of one longest common subsequence; where several are longest, the packages differ."""
    table = list(_table(wanted, found))
    i, j = len(wanted), len(found)
    out: list[int] = []
    while i and j:
        if wanted[i - 1] == found[j - 1]:
            i, j = i - 1, j - 1
            out.append(i)
        elif (table[i - 1][j] > table[i][j - 1]) if last_of_ties else (table[i - 1][j] >= table[i][j - 1]):
            i -= 1
        else:
            j -= 1
    return out[::-1]


def _table(wanted: Sequence[str], found: Sequence[str]) -> Iterable[list[int]]:
    """Rows of the LCS length table."""
    row = [0] * (len(found) + 1)
    yield row
    for word in wanted:
        above, row = row, [0]
        for j, other in enumerate(found):
            row.append(above[j] + 1 if word == other else max(above[j + 1], row[j]))
        yield row
