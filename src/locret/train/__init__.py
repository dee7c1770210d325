"""The trainer of the retaining heads: one forward pass a sample, no attention matrix, no logits, no labels on disk.

Locret (arXiv:2410.01805). The backbone is frozen and scores do not feed attention, so a layer's head can learn while
that layer runs. In each layer of one pass over (prompt + answer):

    q, k, v before RoPE  ->  full causal attention (what the backbone needs to go on)
                         ->  labels: by default the largest logit any answer query gives a prompt key (locret.labels)
                         ->  scores of the prompt's units, loss, backward into this layer's head; then all is freed

The released code stored labels on disk (one file a sample) and made full-vocabulary logits; here memory is one layer's.

Where we differ from the release: warm-up is 10 % of the steps (its 2000 of 3000 is not needed: APB, by the same
authors, trained the same heads with 300), d_R is 256 (paper, table 16: as good), heads are fp32, samples are rendered
with the model's own chat template, every turn of the assistant is an answer, and there is a held-out split.

    run.py           the loop                           passes.py      a sample through the backbone, labels per layer
    options.py       TrainConfig                        packs.py       ... several short ones side by side
    objectives.py    what a score is compared with      evicted.py     ... with eviction on
    evaluation.py    overlap, retention                 recall.py      does the model still answer?
    answers.py       the backbone's own answers         checkpoint.py  what a stopped run leaves
    distributed.py   several processes                  surroundings.py  signals, precision
    log.py, progress.py
"""

from locret.train.checkpoint import CHECKPOINT_FILE
from locret.train.evaluation import Evaluation, evaluate, top_overlap
from locret.train.log import LOG_FILE
from locret.train.objectives import OBJECTIVES, Objective, layer_loss, make_objective
from locret.train.options import TrainConfig
from locret.train.passes import LabelContext, LabelPass
from locret.train.progress import TrainProgress, TrainResult, progress_bar
from locret.train.run import train

__all__ = [
    "CHECKPOINT_FILE",
    "LOG_FILE",
    "OBJECTIVES",
    "Evaluation",
    "LabelContext",
    "LabelPass",
    "Objective",
    "TrainConfig",
    "TrainProgress",
    "TrainResult",
    "evaluate",
    "layer_loss",
    "make_objective",
    "progress_bar",
    "top_overlap",
    "train",
]
