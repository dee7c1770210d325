"""What a generated long-context sample is: a document as token ids, questions about it, and how both become a prompt.

Shapes of a prompt (the chat template is the tokenizer's own):

    one_turn        user: document, blank line, question
    conversation    the same, but other questions were asked and answered before
    two_turns       user: document; assistant: a short acknowledgement; user: question
    question_first  user: question, blank line, document, blank line, question      (for training only)
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from locret.errors import ConfigError, unknown
from locret.tasks.encode import encoder_of

SHAPES = ("one_turn", "two_turns", "conversation", "question_first")
ANSWER_WEIGHT = 4.0
QUESTION_WEIGHT = 0.5
BREAK = "\n\n"
ACKNOWLEDGEMENTS = (
    "Okay.",
    "I have read it.",
    "Ready.",
    "Understood.",
    "I have read the text.",
    "Thank you. What would you like to know?",
    "Done. Ask me anything about it.",
    "Got it.",
)


@dataclass(frozen=True)
class Question:
    """One question and its only right answer. `gold`: token spans of the facts it needs, in the document's ids."""

    text: str
    answer: str
    family: str
    wording: str
    gold: tuple[tuple[int, int], ...]


@dataclass(frozen=True)
class Sample:
    """A document of T tokens (no special ones) with questions.

    weights: float32 [T], how much a training loss should count a token: 0.1 for random keys and values, else 1.0.
    gap: what stands between the document and a question in the same turn.
    """

    task: str
    document: NDArray[np.int32]
    questions: tuple[Question, ...]
    weights: NDArray[np.float32]
    seed: int | str = 0
    meta: dict[str, Any] = field(default_factory=dict, compare=False)
    gap: str = BREAK

    def prompt_ids(self, tokenizer: Any, question: int = 0, shape: str = "one_turn") -> list[int]:
        """Token ids of the prompt that asks one question; they end with the generation prompt."""
        out: list[int] = []
        for piece, _ in self._pieces(tokenizer, self._asked(question, shape), shape, closed=False):
            out.extend(piece.tolist() if isinstance(piece, np.ndarray) else piece)
        return out

    def training_ids(self, tokenizer: Any, shape: str = "one_turn") -> tuple[NDArray[np.int32], NDArray[np.float32]]:
        """Ids and loss weights of the document with all its questions and answers, in one conversation."""
        asked = list(range(len(self.questions)))
        if shape not in SHAPES:
            raise unknown("shape", shape, SHAPES)
        if not asked:
            opening = encoder_of(tokenizer).chat.opening[:1]
            ids = np.concatenate([np.asarray(opening, np.int32), self.document])
            return ids, np.concatenate([np.ones(len(opening), np.float32), self.weights])
        pieces = self._pieces(tokenizer, asked, shape, closed=True)
        ids = np.concatenate([np.asarray(piece, dtype=np.int32) for piece, _ in pieces])
        weights = np.concatenate(
            [w if isinstance(w, np.ndarray) else np.full(len(piece), w, dtype=np.float32) for piece, w in pieces]
        )
        return ids, weights

    def messages(self, tokenizer: Any, question: int = 0, shape: str = "one_turn") -> list[dict[str, str]]:
        """The same conversation as text, up to the question (for people, servers and other chat templates)."""
        document = tokenizer.decode(self.document.tolist())
        asked = self._asked(question, shape)
        texts = [self.questions[i].text for i in asked]
        turns: list[dict[str, str]] = []
        if shape == "two_turns":
            turns = [_turn("user", document), _turn("assistant", self.acknowledgement)]
        elif shape == "question_first":
            texts[0] = texts[0] + self.gap + document + self.gap + texts[0]
        else:
            texts[0] = document + self.gap + texts[0]
        for place, text in zip(asked, texts, strict=True):
            turns += [_turn("user", text), _turn("assistant", self.questions[place].answer)]
        return turns[:-1]

    @property
    def acknowledgement(self) -> str:
        """What the assistant says to the document in the shape two_turns; fixed by the seed."""
        return ACKNOWLEDGEMENTS[sum(str(self.seed).encode()) % len(ACKNOWLEDGEMENTS)]

    def _asked(self, question: int, shape: str) -> list[int]:
        if shape not in SHAPES:
            raise unknown("shape", shape, SHAPES)
        if not 0 <= question < len(self.questions):
            raise ConfigError(f"question {question} of a sample that has {len(self.questions)}")
        return list(range(question + 1)) if shape == "conversation" else [question]

    def _pieces(self, tokenizer: Any, asked: list[int], shape: str, closed: bool) -> list[tuple[Any, Any]]:
        """(ids, weights) pieces of a conversation; a weight is one number or an array."""
        encoder = encoder_of(tokenizer)
        chat = encoder.chat
        space = encoder.ids(self.gap)
        pieces: list[tuple[Any, Any]] = [(chat.opening, 1.0)]
        for turn, place in enumerate(asked):
            question = self.questions[place]
            text = encoder.ids(question.text)
            if turn == 0:
                if shape == "question_first":
                    pieces += [(text, QUESTION_WEIGHT), (space, 1.0)]
                pieces.append((self.document, self.weights))
                if shape == "two_turns":
                    reply = encoder.ids(chat.lead + self.acknowledgement)
                    pieces += [(chat.to_answer, 1.0), (reply, 1.0), (chat.to_user, 1.0)]
                else:
                    pieces.append((space, 1.0))
            pieces.append((text, QUESTION_WEIGHT))
            last = turn == len(asked) - 1
            pieces.append((chat.generate if last and not closed else chat.to_answer, 1.0))
            if closed or not last:
                num_end = len(chat.end)
                pieces += [(encoder.ids(chat.lead + question.answer), ANSWER_WEIGHT), (chat.end, ANSWER_WEIGHT)]
                if not last:
                    pieces.append((chat.to_user[num_end:], 1.0))
        return pieces


def overhead(
    tokenizer: Any, questions: tuple[Question, ...], shape: str, closed: bool, seed: int | str = 0, gap: str = BREAK
) -> int:
    """Tokens of a prompt (closed: of a training example) besides the document's own."""
    empty = Sample("", np.zeros(0, np.int32), questions, np.zeros(0, np.float32), seed, gap=gap)
    if closed:
        return len(empty.training_ids(tokenizer, shape)[0])
    return len(empty.prompt_ids(tokenizer, 0, shape))


def _turn(role: str, content: str) -> dict[str, str]:
    return {"role": role, "content": content}
