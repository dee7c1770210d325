"""LoCoCo (arXiv:2406.05317): the best units stay, and learned weights merge the others into a few."""

from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor, nn

from locret.errors import ConfigError
from locret.lococo import ConvMerge, Mergers, compress
from locret.methods.base import ChunkView, Method, Wrapped, register
from locret.reduce import Merged


@dataclass(frozen=True)
class LatestChunk(Method):
    """LoCoCo's own score: the attention that the latest chunk gave each unit, summed, mean over the group."""

    name: ClassVar[str] = "latest chunk"
    query_aware: ClassVar[bool] = True
    rescoring: ClassVar[bool] = True

    def score(self, view: ChunkView) -> Tensor:
        probe = view.all.attention
        return probe.per_kv_head(probe.column_sums())


@register("lococo")
@dataclass(frozen=True)
class LoCoCo(Wrapped):
    """Of a budget the mergers' slots are merged units, new at every eviction; pinned units are never candidates.

    With a base whose scores never change (Locret) a merged unit takes the lowest score of its head, so it is merged
    again before anything else is. While decoding, the latest chunk is one query.

    Attributes:
        path: a file of `locret.lococo.Mergers`, trained on the model that runs.
        base: a method's name to score as; none: LoCoCo's own score.
    """

    paper: ClassVar[str] = "arXiv:2406.05317"
    summary: ClassVar[str] = "the best units stay, learned convolutions merge the others into a few; from a file"
    variant: ClassVar[str] = "keys merged before RoPE, in the places of the best candidates; published: after, behind"
    query_aware: ClassVar[bool] = True
    rescoring: ClassVar[bool] = True
    reduces: ClassVar[bool] = True
    trained: ClassVar[bool] = True

    path: str = ""
    base: str | Method = ""

    def __post_init__(self) -> None:
        if not self.path:
            raise ConfigError("method 'lococo' merges with trained weights; give path: a file that "
                              "`locret.lococo.train` made for this model")  # fmt: skip
        super().__post_init__()
        mergers = Mergers.load(self.path)
        object.__setattr__(self, "trained", True)
        object.__setattr__(self, "mergers", mergers)
        object.__setattr__(self, "heads", nn.ModuleList([mergers] if self.heads is None else [mergers, self.heads]))

    def _scores(self) -> Method:
        return super()._scores() if self.base else LatestChunk()

    @property
    def _mergers(self) -> Mergers:
        return self.mergers  # type: ignore[attr-defined]  # set once, and no option

    @property
    def made_for(self) -> dict[str, Any]:
        return self._mergers.backbone

    def describe(self) -> dict[str, Any]:
        return {name: value for name, value in super().describe().items() if name != "path"}

    def check_free(self, free: int) -> None:
        if free < self._mergers.slots:
            raise ConfigError(f"lococo: {self._mergers.slots} merged units do not fit the {free} units of the budget "
                              "that are not pinned; raise the budget or train mergers with fewer slots")  # fmt: skip

    def reduce(self, scores: Tensor, budget: int, pinned: Tensor, view: ChunkView) -> tuple[Tensor, Merged]:
        units = view.all.units
        merge = self._mergers[view.layer].to(units.k.device)
        assert isinstance(merge, ConvMerge)
        keep, places, merged = compress(units.k, units.v, scores, budget, merge, fixed=pinned)
        if not self.rescoring:
            units.score.scatter_(-1, places, scores.gather(-1, keep).amin(-1, keepdim=True).expand_as(places).clone())
        return keep, merged
