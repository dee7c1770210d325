"""Attention-Gate (arXiv:2410.12876): a small trained attention judges every token with its whole chunk in view."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from locret.gate import Gates
from locret.methods.base import register
from locret.methods.scorers import FromFile, Scorer


@register("attention_gate")
@dataclass(frozen=True)
class AttentionGate(FromFile):
    """A unit's score is the logit of the gate's p, from the hidden states of its chunk; it never changes.

    Published, the gate sees the whole prompt at once and every unit with p > 1/2 stays, however many those are: with a
    budget of that many and one chunk this is the same. Decoded tokens are all kept there; here each is a chunk of its
    own. Gates are trained at original angles: run them with `positions="original"`.

    Attributes:
        path: a file of `locret.gate.Gates`, trained on the model that runs.
    """

    paper: ClassVar[str] = "arXiv:2410.12876"
    summary: ClassVar[str] = "a small attention over the chunk gates every unit; trained, from a file"
    variant: ClassVar[str] = "published: all units above 1/2, once, over the whole prompt; here the budget's, per chunk"
    query_aware: ClassVar[bool] = True  # a question in the chunk is in view
    layout: ClassVar[str] = "a file that `locret.gate.train` made for this model"

    path: str = ""

    @classmethod
    def load(cls, path: Path) -> Scorer:
        gates = Gates.load(path)
        first: Any = gates[0]
        return Scorer(list(gates), hidden_size=first.qkv.in_features, num_kv_heads=first.out.out_features,
                      backbone=gates.backbone)  # fmt: skip
