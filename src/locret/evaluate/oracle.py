"""Reference rows: what the same budget could hold if one knew what will be asked, and the right answer.

Not methods to use, so not in the registry: rows of a table that say how much of a loss is the budget's and how much the
method's. They are cut back to the same budget by the same chunk loop under the same pins.

    oracle_gold   the units of the gold facts, then the newest
    oracle_cis    the best units by the retaining heads' training target, the largest logit that the right answer gives
                  a unit (`labels`, "max-logit"): perfect heads that know the question
    oracle_mass   the best units by the attention that the right answer gives them in the mean ("log-mass")

The last two take one pass of full attention a question.

Several questions of a context that is compressed once: the gold facts of all, the largest label of any.

Shapes: B rows, Hkv KV heads, C new units, T context tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import ClassVar, Self

import torch
from torch import Tensor

from locret.backbone import Backbone
from locret.data import Sample
from locret.engine import LLM
from locret.errors import DataError
from locret.evaluate.prompts import Prompt, name_of
from locret.methods.base import ChunkView, Method
from locret.train.passes import LabelPass

_LATER = 1e30  # of units behind the context, which nobody chooses among: fp32, above every logit


@dataclass(frozen=True)
class Oracle(Method):
    """Scores that are known before anything is read. known: per layer with a budget, fp32 [B, Hkv, T]."""

    reads_whole: ClassVar[bool] = False  # True: the model must be able to read context, question and answer in full
    per_token: ClassVar[bool] = True
    known: dict[int, Tensor] = field(default_factory=dict, init=False, repr=False)

    def knowing(self, backbone: Backbone, prompts: Sequence[Prompt], turn: int | None) -> Self:
        """The same for these samples; turn: the only question that is asked, None: all of them."""
        other = type(self)()
        other.known.update(self._known(backbone, prompts, turn))
        return other

    def score(self, view: ChunkView) -> Tensor:
        scores = view.k.new_full(view.k.shape[:3], _LATER, dtype=torch.float32)
        known = self.known[view.layer]
        if view.start < known.shape[2]:
            part = known[:, :, view.start : view.start + scores.shape[2]]
            scores[:, :, : part.shape[2]] = part
        return scores

    def _known(self, backbone: Backbone, prompts: Sequence[Prompt], turn: int | None) -> dict[int, Tensor]:
        raise NotImplementedError


@dataclass(frozen=True)
class OracleGold(Oracle):
    """A gold unit scores 2 and more, any other its place in the context, 0 to 1: the newest fill the budget."""

    name: ClassVar[str] = "oracle_gold"
    summary: ClassVar[str] = "the units of the gold facts, then the newest"

    def _known(self, backbone: Backbone, prompts: Sequence[Prompt], turn: int | None) -> dict[int, Tensor]:
        place = torch.linspace(0, 1, len(prompts[0].context), device=backbone.device)
        scores = place.expand(len(prompts), backbone.num_kv_heads, -1).clone()
        for row, prompt in enumerate(prompts):
            if not prompt.gold:
                raise DataError(f"{name_of(prompt.record)} says no gold spans; run it without {self.name}")
            scores[row, :, prompt.gold] += 2
        return dict.fromkeys(_budgeted(backbone), scores)


@dataclass(frozen=True)
class OracleCis(Oracle):
    """Labels of the context's units, as the trainer makes them from the right answer."""

    name: ClassVar[str] = "oracle_cis"
    summary: ClassVar[str] = "the units with the largest logits of the right answer"
    reads_whole: ClassVar[bool] = True
    label: ClassVar[str] = "max-logit"

    def _known(self, backbone: Backbone, prompts: Sequence[Prompt], turn: int | None) -> dict[int, Tensor]:
        layers = _budgeted(backbone)
        rows: list[dict[int, Tensor]] = []
        for prompt in prompts:
            found: dict[int, Tensor] = {}

            def visit(layer: int, _: object, labels: Tensor, found: dict[int, Tensor] = found) -> None:
                found[layer] = torch.maximum(found[layer], labels) if layer in found else labels

            context = prompt.context.tolist()
            run = LabelPass(backbone, layers, label=self.label, wants_hidden=False, max_length=len(context))
            for ask in prompt.asks if turn is None else prompt.asks[turn : turn + 1]:
                run(Sample([*context, *ask.first], ask.target, name_of(prompt.record)), visit)
            rows.append(found)
        return {layer: torch.cat([found[layer] for found in rows]) for layer in layers}


@dataclass(frozen=True)
class OracleMass(OracleCis):
    """The same by what softmax leaves of the logits, over all tokens of the answer."""

    name: ClassVar[str] = "oracle_mass"
    summary: ClassVar[str] = "the units that the right answer attends to most"
    label: ClassVar[str] = "log-mass"


REFERENCES: dict[str, type[Oracle]] = {cls.name: cls for cls in (OracleGold, OracleCis, OracleMass)}


def informed(llm: LLM, prompts: Sequence[Prompt], turn: int | None = None) -> LLM:
    """`llm` itself, or for a reference row the same with what these samples (contexts of one length) will need."""
    if not isinstance(llm.method, Oracle):
        return llm
    return replace(llm, method=llm.method.knowing(llm.backbone, prompts, turn))


def reads_whole(method: Method) -> bool:
    """Whether a row of the table exists only for what the model can read with a full cache."""
    return not method.evicts or (isinstance(method, Oracle) and method.reads_whole)


def _budgeted(backbone: Backbone) -> list[int]:
    return [i for i, layer in enumerate(backbone.layers) if layer.window is None]
