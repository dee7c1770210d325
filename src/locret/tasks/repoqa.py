"""RepoQA (arXiv:2406.06025) as SCBench scores it: which function of a repository an answer repeats, and how well.

Functions are found in code by tree-sitter, as there; its grammars are packages of their own (`pip install
'locret[code]'`). `bleu` agrees with nltk 3.10's sentence_bleu with Chen and Cherry's fourth smoothing.
"""

from __future__ import annotations

import functools
import math
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from importlib import import_module
from typing import Any

from locret.errors import ConfigError

Function = tuple[str, str]  # name and text
LANGUAGES = {  # what its grammar calls a function
    "python": "function_definition",
    "java": "method_declaration",
    "typescript": "function_declaration",
    "rust": "function_item",
    "cpp": "function_definition",
    "go": "function_declaration",
}
_BLOCK = re.compile(r"^```\w*\s*\n(.*?)^```", re.DOTALL | re.MULTILINE)
_ORDERS = (1, 2, 3, 4)


def closest(prediction: str, language: str, functions: Sequence[Function]) -> tuple[str | None, float]:
    """The name of the function that an answer is most alike, the first of equals, and its BLEU; None: none at all.

    Raises: ConfigError: tree-sitter or its grammar is not installed.
    """
    found = code(prediction, language).strip()
    best: tuple[str | None, float] = (None, 0.0)
    for name, text in functions:
        similarity = bleu(re.split(r"\s+", found), re.split(r"\s+", text.strip()))
        if similarity > best[1]:
            best = (name, similarity)
    return best


def code(prediction: str, language: str) -> str:
    """The first function in any fenced block; none: the first block; no block: the whole answer."""
    parser = parser_of(language)
    blocks = _BLOCK.findall(prediction.strip())
    for block in blocks:
        text = block.encode()
        for node in _walk(parser.parse(text).root_node):
            if _is_function(node, language):
                return str(text[node.start_byte : node.end_byte].decode())
    return str(blocks[0]) if blocks else prediction.strip()


def bleu(found: Sequence[str], wanted: Sequence[str]) -> float:
    """BLEU-4 of one text against one other, 0..1.

    A precision of zero becomes ln(words) / (5 * 2^i * its denominator), for the i-th zero: short texts get less.
    """
    matches, totals = zip(*(_matches(found, wanted, order) for order in _ORDERS), strict=True)
    if not matches[0]:
        return 0.0
    logs, zeros = [], 0
    for same, total in zip(matches, totals, strict=True):
        if same:
            logs.append(math.log(same / total))
        elif len(found) > 1:
            zeros += 1
            logs.append(math.log(math.log(len(found)) / (5 * 2**zeros) / total))
    shorter = min(0.0, 1 - len(wanted) / len(found))
    return math.exp(shorter) * math.exp(math.fsum(logs) / len(_ORDERS))


@functools.cache
def parser_of(language: str) -> Any:
    """tree-sitter's parser. Raises: ConfigError: not installed."""
    try:
        from tree_sitter import Language, Parser  # type: ignore[import-not-found,import-untyped,unused-ignore]

        grammar = import_module(f"tree_sitter_{language}")
    except ImportError as error:
        raise ConfigError(
            f"SCBench's repoqa looks for functions with tree-sitter, and {error.name} is not installed; "
            "pip install 'locret[code]', or leave scbench_repoqa and scbench_repoqa_and_kv out"
        ) from None
    made = grammar.language_typescript() if language == "typescript" else grammar.language()
    return Parser(Language(made))


def _matches(found: Sequence[str], wanted: Sequence[str], order: int) -> tuple[int, int]:
    """(n-grams of `found` that occur in `wanted`, at most as often as there; all n-grams, at least 1)."""
    counts, known = (Counter(zip(*(words[i:] for i in range(order)), strict=False)) for words in (found, wanted))
    return (counts & known).total(), max(1, counts.total())


def _walk(node: Any) -> Iterator[Any]:
    """A node and all below it, in the order of the text."""
    left = [node]
    while left:
        node = left.pop()
        yield node
        left += reversed(node.children)


def _is_function(node: Any, language: str) -> bool:
    if node.type != LANGUAGES[language]:
        return False
    if language != "cpp":
        return node.child_by_field_name("name") is not None
    declarator = node.child_by_field_name("declarator")  # a plain name: no method, no pointer or reference returned
    if declarator is None or declarator.type != "function_declarator":
        return False
    name = declarator.child_by_field_name("declarator")
    return name is not None and name.type == "identifier"
