"""What the model learns from and is measured with: the tasks of `locret.tasks` over the corpus."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

ROOM = {"one_turn": 64, "two_turns": 96, "conversation": 384}  # tokens of a sample besides the one-turn prompt


class Sample(NamedTuple):
    """A finished dialogue: token ids and the [start, end) of every answer in it."""

    ids: np.ndarray
    answers: list[tuple[int, int]]


class Source:
    """The tokenised corpus and the tasks. Held-out samples have text and keys that training never shows."""

    def __init__(self, tokenizer: Any, fillers: dict[str, Any], heldout: Any, mixtures: list[str]):
        self.tokenizer, self.fillers, self.heldout, self.mixtures = tokenizer, fillers, heldout, mixtures

    @classmethod
    def load(cls, folder: Path, tokenizer: Path, cache: Path, mixtures: list[str]) -> Source:
        """Tokenise the folder's text with all cores, or read what an earlier run left in `cache`.

        Args:    mixtures: the name of each stage's mixture, see `locret.tasks.mixture.STAGES`.
        """
        from transformers import AutoTokenizer

        from locret.tasks.filler import CorpusFiller, ProseFiller

        loaded = AutoTokenizer.from_pretrained(tokenizer)
        train, heldout = (
            CorpusFiller.from_folder(folder, loaded, split=split, cache=cache) for split in ("train", "heldout")
        )
        fillers = {"corpus": train, "prose": ProseFiller.from_seed(0, loaded)}
        return cls(loaded, fillers, heldout, mixtures)

    @property
    def num_tokens(self) -> int:
        return len(self.fillers["corpus"].ids)

    def make_example(self, rng: random.Random, stage: int, length: int) -> tuple[np.ndarray, np.ndarray]:
        """One training sequence and its loss weights, both [length]."""
        from locret.tasks.mixture import training_example

        return training_example(rng, length, self.tokenizer, self.fillers, self.mixtures[stage])

    def sample(self, task: str, length: int, index: int, wording: str, shape: str) -> Sample:
        """Sample `index` of a task with its right answer: at most `length` tokens, the last question asked."""
        from locret.tasks.build import build
        from locret.tasks.encode import encoder_of

        asked = 3 if shape == "conversation" and task != "passkey" else 1
        built = build(
            task,
            seed=f"validation/{index}",
            length=length - ROOM[shape],
            tokenizer=self.tokenizer,
            filler=self.heldout,
            num_questions=asked,
            wording=wording,
            values="heldout",
        )
        encoder = encoder_of(self.tokenizer)
        prompt = built.prompt_ids(self.tokenizer, len(built.questions) - 1, shape)
        answer = encoder.ids(encoder.chat.lead + built.questions[-1].answer) + encoder.chat.end
        ids = np.array(prompt + answer, dtype=np.uint16)
        assert len(ids) <= length, f"{task}, {shape}: {len(ids)} tokens"
        return Sample(ids, [(len(prompt), len(ids))])

    def heldout_text(self, num_tokens: int) -> np.ndarray:
        """The first tokens of the held-out documents."""
        return np.asarray(self.heldout.ids[:num_tokens])
