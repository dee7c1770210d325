"""How good the model is: exact match of answers under teacher forcing, and the loss of held-out text."""

from __future__ import annotations

import numpy as np
import torch
from feed import Feed
from lean import LeanLlama
from log import Log
from recipe import Recipe
from source import Sample, Source


def exact_matches(
    model: LeanLlama, samples: list[Sample], device: torch.device, max_tokens: int = 131072
) -> list[bool]:
    """For each sample, whether greedy decoding would give all its answers: argmax under teacher forcing is the answer.

    Greedy decoding follows the answer as long as it is right, so both agree on whether all of it is right.
    """
    matches: list[bool] = []
    longest = max(len(sample.ids) for sample in samples)
    step = 1024 if longest > 1024 else 64
    longest = -(-longest // step) * step  # few shapes: each is planned by cuDNN
    rows = max(1, max_tokens // longest)
    for first in range(0, len(samples), rows):
        group = samples[first : first + rows]
        ids = np.zeros((len(group), longest), dtype=np.int64)  # padded on the right: causal attention never sees it
        places: list[int] = []
        wanted: list[int] = []
        owner: list[int] = []
        for row, sample in enumerate(group):
            ids[row, : len(sample.ids)] = sample.ids
            for start, end in sample.answers:
                places += [row * longest + at - 1 for at in range(start, end)]
                wanted += sample.ids[start:end].tolist()
                owner += [row] * (end - start)
        hidden = model.hidden(torch.from_numpy(ids).to(device))[torch.tensor(places, device=device)]
        right = model.logits(hidden).argmax(-1).cpu() == torch.tensor(wanted)
        wrong = torch.zeros(len(group)).index_add_(0, torch.tensor(owner), (~right).float())
        matches += (wrong == 0).tolist()
    return matches


@torch.no_grad()
def text_loss(model: LeanLlama, ids: np.ndarray, length: int, device: torch.device) -> float:
    """Mean nats a token of held-out text, read in windows of `length`."""
    windows = torch.from_numpy(ids[: len(ids) // length * length].astype(np.int64)).view(-1, length)
    total, count = 0.0, 0
    for part in windows.split(max(1, 32768 // length)):
        part = part.to(device)
        logits = model.logits(model.hidden(part)).view(*part.shape, -1)[:, :-1]
        total += torch.nn.functional.cross_entropy(logits.flatten(0, 1), part[:, 1:].flatten(), reduction="sum").item()
        count += part[:, 1:].numel()
    return total / max(count, 1)


class Validator:
    """Fixed samples of every task, made by the workers while training goes on."""

    def __init__(self, recipe: Recipe, source: Source, feed: Feed, log: Log):
        self.recipe, self.source, self.feed, self.log = recipe, source, feed, log
        self.tickets: dict[int, dict[str, list[int]]] = {}
        self.samples: dict[int, dict[str, list[Sample]]] = {}

    def order(self, stage: int) -> None:
        """Let the workers make the samples of a stage."""
        if stage >= len(self.recipe.stages) or stage in self.tickets:
            return
        v, length = self.recipe.validation, self.recipe.stages[stage].length
        self.tickets[stage] = {
            task: [self.feed.order(task, length, i, "train", "two_turns") for i in range(v.num_samples)]
            for task in v.tasks
        }

    def run(self, stage: int, model: LeanLlama, tokens: int) -> None:
        """Score the model on the stage's samples and on held-out text."""
        v, length = self.recipe.validation, self.recipe.stages[stage].length
        if stage not in self.samples:
            self.order(stage)
            self.samples[stage] = {
                task: [self.feed.result(ticket) for ticket in tickets] for task, tickets in self.tickets[stage].items()
            }
        device = model.model.norm.weight.device
        scores = {task: float(np.mean(exact_matches(model, s, device))) for task, s in self.samples[stage].items()}
        loss = text_loss(model, self.source.heldout_text(v.text_tokens), length, device)
        shown = "  ".join(f"{task} {score:.2f}" for task, score in scores.items())
        self.log.say(f"validation at {length}: text {loss:.4f}  {shown}")
        self.log.record("validation", length=length, tokens=tokens, text_loss=loss, scores=scores)


class Evaluation:
    """The full table: every task at every length; held-out wordings and other dialogues at the first length."""

    def __init__(self, recipe: Recipe, source: Source, feed: Feed, log: Log):
        self.recipe, self.source, self.feed, self.log = recipe, source, feed, log
        v = recipe.validation
        self.cells = [(length, "train", "two_turns") for length in v.final_lengths]
        self.cells.append((v.final_lengths[0], "heldout", "two_turns"))
        self.cells += [(v.final_lengths[0], "train", shape) for shape in v.shapes if shape != "two_turns"]
        self.tickets: dict[tuple, int] = {}
        self.waiting = [
            (task, length, i, wording, shape)
            for length, wording, shape in self.cells
            for task in v.tasks
            for i in range(v.final_samples)
        ][::-1]

    def order(self, number: int) -> None:
        """Let the workers make some more samples: a few a step during the last stage, so that none is waited for."""
        for _ in range(min(number, len(self.waiting))):
            args = self.waiting.pop()
            self.tickets[args] = self.feed.order(*args)

    def run(self, model: LeanLlama, device: torch.device) -> dict[str, dict[str, float]]:
        """Score the model; returns task -> share of exact matches by "length/wording/shape"."""
        self.order(len(self.waiting))
        v, table = self.recipe.validation, {}
        for length, wording, shape in self.cells:
            scores = {}
            for task in v.tasks:
                tickets = [self.tickets[task, length, i, wording, shape] for i in range(v.final_samples)]
                scores[task] = float(np.mean(exact_matches(model, [self.feed.result(t) for t in tickets], device)))
            table[f"{length}/{wording}/{shape}"] = scores
            shown = "  ".join(f"{task} {score:.2f}" for task, score in scores.items())
            self.log.say(f"evaluation {length:>5} {wording:<8}{shape:<13} {shown}")
        text = self.source.heldout_text(4 * v.text_tokens)
        losses = {length: text_loss(model, text, length, device) for length in v.final_lengths}
        self.log.say("held-out text, nats a token: " + "  ".join(f"{n}: {loss:.4f}" for n, loss in losses.items()))
        self.log.record("evaluation", scores=table, text_loss=losses, samples=v.final_samples)
        return table
