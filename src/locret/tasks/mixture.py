"""What the embedded model and the retaining heads are trained on: endless examples of all tasks, made when needed."""

from __future__ import annotations

import dataclasses
import functools
import math
import random
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from locret.errors import ConfigError, unknown
from locret.tasks.base import BREAK, Sample
from locret.tasks.build import HELD_OUT_FAMILIES, TASKS, Plan, compose, fit_prompt, fit_training
from locret.tasks.encode import encoder_of, token_texts
from locret.tasks.families import frame_words
from locret.tasks.filler import Filler, Renamed
from locret.tasks.words import coined, reserved

__all__ = ["HELD_OUT_FAMILIES", "STAGES", "Stage", "head_samples", "training_example"]
Fillers = Mapping[str, Filler]  # names: "corpus", "prose"; one of them is enough
PROSE_SHARE = 0.08
RENAMED_SHARE = 0.5
_SHAPE_SHARES = {"one_turn": 0.45, "two_turns": 0.35, "question_first": 0.2}  # several questions: a conversation
# behind a single newline, as benchmarks put it, a question looks like one more line of a list
_GAP_SHARES = {BREAK: 0.65, "\n": 0.35}
_SHORTEST = 160


@dataclass(frozen=True)
class Stage:
    """Shares of the kinds of examples; they add up to 1. `packed`: how often a row holds several shorter examples."""

    plain: float
    sparse: float
    dense: float
    copying: float
    packed: float
    garble: float  # how often a fact of a sparse document is put in arbitrary words
    strange: float = 0.75  # documents of which some or all keys, names and values are words of no list
    value_first: float = 0.4  # statements made to name the value before the key (a fifth does so anyway)


STAGES = {
    "start": Stage(plain=0.18, sparse=0.38, dense=0.36, copying=0.08, packed=0.5, garble=0.35),
    "main": Stage(plain=0.12, sparse=0.46, dense=0.38, copying=0.04, packed=0.35, garble=0.35),
    "long": Stage(plain=0.10, sparse=0.46, dense=0.42, copying=0.02, packed=0.12, garble=0.35),
}


def training_example(
    rng: random.Random, length: int, tokenizer: Any, fillers: Fillers, stage: str = "main"
) -> tuple[NDArray[np.uint16] | NDArray[np.int32], NDArray[np.float32]]:
    """One row of a training batch: ids and loss weights, both exactly [length].

    weights[t] counts the loss of *predicting* token t. Rows may hold several examples, each starting with the
    beginning-of-text token; attention need not be cut between them.
    """
    if stage not in STAGES:
        raise unknown("stage", stage, STAGES)
    shares = STAGES[stage]
    ids: list[NDArray[Any]] = []
    weights: list[NDArray[np.float32]] = []
    left = length
    packed = rng.random() < shares.packed
    while left > 0:
        size = left
        if packed and left > 2 * _SHORTEST:
            size = min(left, int(math.exp(rng.uniform(math.log(_SHORTEST), math.log(length)))))
            size = left if left - size < _SHORTEST else size
        found, weight = _example(rng, size, tokenizer, fillers, shares)
        ids.append(found)
        weights.append(weight)
        left -= len(found)
    dtype: Any = np.uint16 if encoder_of(tokenizer).vocab_size <= 1 << 16 else np.int32
    return np.concatenate(ids).astype(dtype), np.concatenate(weights)


def _example(
    rng: random.Random, length: int, tokenizer: Any, fillers: Fillers, shares: Stage
) -> tuple[NDArray[np.int32], NDArray[np.float32]]:
    """One example of exactly `length` tokens; plain text if it is too short for what was drawn."""
    kind = rng.choices(
        ("plain", "sparse", "dense", "copying"), (shares.plain, shares.sparse, shares.dense, shares.copying)
    )[0]
    filler = _filler(rng, fillers)
    if rng.random() < RENAMED_SHARE:
        filler = Renamed(filler, tokenizer, rng)
    if length < _SHORTEST or kind == "plain":
        return _plain(rng, length, tokenizer, filler)
    for attempt in range(6):
        plan = dataclasses.replace(
            _plan(rng, kind, length, attempt),
            garble=shares.garble,
            strange=rng.uniform(0.1, 1.0) if rng.random() < shares.strange else 0.0,
            value_first=shares.value_first,
            vocabulary=_vocabulary(tokenizer),
        )
        shape = rng.choices(list(_SHAPE_SHARES), list(_SHAPE_SHARES.values()))[0]
        gap = rng.choices(list(_GAP_SHARES), list(_GAP_SHARES.values()))[0]
        seed = rng.getrandbits(32)
        try:
            sample = compose(rng, plan, tokenizer, filler, fit_training(tokenizer, length, shape, seed, gap), seed)
        except ConfigError:  # what was drawn does not fit: draw less
            continue
        ids, weights = dataclasses.replace(sample, gap=gap).training_ids(tokenizer, shape)
        assert len(ids) == length, "a training example missed its length"
        return ids, weights
    return _plain(rng, length, tokenizer, filler)


@functools.lru_cache(maxsize=4)
def _vocabulary(tokenizer: Any) -> tuple[str, ...]:
    """What strange words are drawn from: half of the draws a coined word, half a plain word that is one token.

    Words reserved for evaluation are not among them, nor are the words that frames are made of.
    """
    texts = (text[1:] for text in token_texts(tokenizer) if text[:1] == " ")
    plain = {text for text in texts if text.isascii() and text.isalpha() and text.islower() and len(text) > 2}
    known = sorted(plain - reserved() - {word.lower() for word in reserved()} - set(frame_words()))
    return coined() + tuple(known) * (len(coined()) // max(len(known), 1))


def _plain(
    rng: random.Random, length: int, tokenizer: Any, filler: Filler
) -> tuple[NDArray[np.int32], NDArray[np.float32]]:
    opening = encoder_of(tokenizer).chat.opening[:1][:length]
    text, _ = filler.take(rng, length - len(opening))
    return np.concatenate([np.asarray(opening, np.int32), text]), np.ones(length, np.float32)


def _filler(rng: random.Random, fillers: Fillers) -> Filler:
    if "corpus" in fillers and ("prose" not in fillers or rng.random() >= PROSE_SHARE):
        return fillers["corpus"]
    return fillers["prose"]


def _plan(rng: random.Random, kind: str, length: int, attempt: int) -> Plan:
    """Draw a document of this kind; every further attempt asks for less."""
    # a long document is paid for once, by its length; more questions about it are nearly free
    low, high = (4, 16) if length <= 4096 else (8, 40)
    shrink = 2**attempt
    num_questions = max(1, rng.randint(low, high) // shrink)
    if kind == "copying":
        task = "repeat" if rng.random() < 0.5 else "verbatim"
        return Plan(task, num_questions=max(1, min(num_questions, length // 256)))
    wording = "official" if rng.random() < 0.08 else "train"
    if kind == "dense":
        task = rng.choices(("multikey2", "multikey3", "kv"), (0.34, 0.33, 0.33))[0]
        fill = 1.0 if rng.random() < 0.6 else rng.uniform(0.1, 0.9)
        each = 64 if task == "multikey2" else 200  # tokens of a pair, its question and its answer, with room to spare
        num_questions = max(1, min(num_questions, (length - 80) // (each * shrink)))
        return Plan(task, wording, num_questions=num_questions, hard=True, fill=fill)
    most = max(2, min(40, length // 60))
    num_facts = max(1, round(math.exp(rng.uniform(0, math.log(most)))) // shrink)
    if length <= 4096 or rng.random() < 0.5:
        num_facts = min(most, max(num_facts, num_questions))
    draw = rng.random()
    if draw < 0.08:
        return Plan("chain", wording, "train", num_questions, max(1, num_facts // 2), ("chain",), hard=True)
    if draw < 0.13:
        return Plan("passkey", wording, "train", 1, 1, ("passkey",), hard=True)
    chain_share = rng.uniform(0.2, 0.5) if draw < 0.3 else 0.08
    return Plan("mixed", wording, "train", num_questions, num_facts, TASKS["mixed"].families, True, 1.0, chain_share)


# ---- samples for retaining heads ----------------------------------------------------------------------------------

_HEAD_TASKS = {
    "mixed": 0.25,
    "number": 0.1,
    "fact": 0.15,
    "chain": 0.12,
    "multivalue": 0.05,
    "multikey2": 0.12,
    "multikey3": 0.1,
    "kv": 0.11,
}


def head_samples(
    tokenizer: Any, fillers: Fillers, *, count: int, length_range: tuple[int, int] = (1024, 8192), seed: int = 0,
    max_questions: int = 1, shape: str | None = None,
) -> Iterator[dict[str, Any]]:  # fmt: skip
    """Training samples for retaining heads: a question at the end and its gold answer; log-uniform prompt lengths.

    A label is the largest logit that any query of the answer gives a unit. With one question a document's other facts
    look useless, and SmoothL1, a median far from its target, learns just that. With `max_questions` above 1 the rest
    of a conversation about the document follows in `answer_ids`, so every fact that could be asked for counts.

    `shape` None draws one_turn or two_turns for every sample; "question_first" is for heads that know the question.
    Never a fact of HELD_OUT_FAMILIES: these measure whether heads know what matters, or only what they were shown.
    Yields:  {"prompt_ids": list[int], "answer_ids": list[int] (closed by the end of turn), "answer": str, "task": str,
             "prompt": messages, "shape": str, "gold": spans in the document's ids}.
    """
    low, high = length_range
    for number in range(count):
        rng = random.Random(f"heads:{seed}:{number}")
        task = rng.choices(list(_HEAD_TASKS), list(_HEAD_TASKS.values()))[0]
        length = round(math.exp(rng.uniform(math.log(low), math.log(high))))
        drawn = "two_turns" if rng.random() < 0.5 else "one_turn"
        form = shape or drawn
        sample = _head_sample(rng, task, length, form, tokenizer, _filler(rng, fillers), number, max_questions)
        question = sample.questions[0]
        prompt = sample.prompt_ids(tokenizer, 0, form)
        whole, _ = sample.training_ids(tokenizer, form)
        yield {
            "prompt_ids": prompt,
            "answer_ids": whole[len(prompt) :].tolist(),
            "answer": question.answer,
            "task": task,
            "prompt": sample.messages(tokenizer, 0, form),
            "shape": form,
            "gold": question.gold,
        }


def _head_sample(
    rng: random.Random,
    task: str,
    length: int,
    shape: str,
    tokenizer: Any,
    filler: Filler,
    seed: int,
    max_questions: int,
) -> Sample:
    families = tuple(name for name in TASKS[task].families if name not in HELD_OUT_FAMILIES)
    num_facts = rng.randint(1, max(2, min(24, length // 120)))
    fill = 1.0 if rng.random() < 0.6 else rng.uniform(0.1, 0.9)
    asked = min(max_questions, num_facts)
    strange = rng.uniform(0.1, 1.0) if rng.random() < 0.5 else 0.0
    plan = Plan(
        task, "train", "train", asked, num_facts, families, hard=True, fill=fill, chain_share=0.25,
        strange=strange, vocabulary=_vocabulary(tokenizer),
    )  # fmt: skip
    return compose(rng, plan, tokenizer, filler, fit_prompt(tokenizer, length, shape, seed), seed)
