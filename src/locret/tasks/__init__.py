"""Generated long-context tasks: facts in text, questions about them, exact lengths, one seed -> the same bytes."""

from locret.tasks.base import SHAPES, Question, Sample
from locret.tasks.build import HELD_OUT_FAMILIES, TASKS, TaskInfo, build, score
from locret.tasks.filler import CorpusFiller, Filler, ProseFiller
from locret.tasks.mixture import STAGES, head_samples, training_example

__all__ = [
    "HELD_OUT_FAMILIES",
    "SHAPES",
    "STAGES",
    "TASKS",
    "CorpusFiller",
    "Filler",
    "ProseFiller",
    "Question",
    "Sample",
    "TaskInfo",
    "build",
    "head_samples",
    "score",
    "training_example",
]
