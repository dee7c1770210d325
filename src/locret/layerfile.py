"""Files of one small trained module a layer: read strictly, or refused."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any, ClassVar, Self

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from locret.errors import HeadsError
from locret.files import atomic_write


class LayerModules(nn.ModuleList):
    """The modules of all layers and the fingerprint of the model that they were trained on.

    A file is safetensors: `{layer}.{name}` of every parameter, and as metadata the format, the fingerprint and what
    `about` adds.
    """

    format: ClassVar[str]  # name and version
    contents: ClassVar[str]  # what it holds, in a word
    made_by: ClassVar[str]  # the function that trains such
    keys: ClassVar[tuple[str, ...]]  # parameters of a layer

    def __init__(self, modules: Iterable[nn.Module], backbone: dict[str, Any]) -> None:
        super().__init__(modules)
        self.backbone = backbone

    def about(self) -> dict[str, Any]:
        """JSON values that go into the file besides."""
        return {}

    @classmethod
    def layer(cls, tensors: dict[str, Tensor], about: dict[str, Any], path: Path) -> nn.Module:
        """A layer's module, not filled in, of the sizes that the first layer's tensors have.

        Raises: HeadsError: they have none.
        """
        raise NotImplementedError

    def save(self, path: str | Path) -> None:
        """Write one file, in one atomic rename."""
        tensors = {name: value.detach().cpu().contiguous() for name, value in self.state_dict().items()}
        values = {"format": self.format, "backbone": self.backbone, **self.about()}
        atomic_write(path, lambda file: save_file(tensors, file, metadata={"locret": json.dumps(values)}))

    @classmethod
    def load(cls, path: str | Path) -> Self:
        """Read what `save` wrote, on the CPU, without gradients.

        Raises: HeadsError: no such file, truncated or another format; a tensor that is missing, extra, of another shape
            or not finite.
        """
        path = Path(path)
        about, tensors = cls._read(path)
        count = 1 + max(int(name.split(".")[0]) for name in tensors)
        made = cls((cls.layer(tensors, about, path) for _ in range(count)), about["backbone"])
        wanted = {name: value.shape for name, value in made.state_dict().items()}
        for name in sorted(wanted.keys() | tensors.keys()):
            if name not in tensors or name not in wanted or tensors[name].shape != wanted[name]:
                found, right = (list(x[name].shape) if name in x else "missing" for x in (tensors, made.state_dict()))
                raise HeadsError(f"{path}: {name} is {found}; wanted {right} in a file of {count} layers")
            if not tensors[name].is_floating_point() or not tensors[name].isfinite().all():
                raise HeadsError(f"{path}: {name} holds NaN, infinite or whole numbers; train the {cls.contents} again")
        made.load_state_dict(tensors)
        return made.requires_grad_(False)

    @classmethod
    def _read(cls, path: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
        if not path.is_file():
            raise HeadsError(f"{path} is no file; wanted {cls.contents} that `{cls.made_by}` made and `save` wrote")
        try:
            with safe_open(path, framework="pt") as file:
                about = json.loads((file.metadata() or {}).get("locret", "null"))
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  (not a dict)
        except (SafetensorError, OSError, ValueError) as error:
            raise HeadsError(f"{path} is truncated or no safetensors file: {error}; copy it again") from error
        mine = isinstance(about, dict) and about.get("format") == cls.format
        if not mine or not isinstance(about.get("backbone"), dict):
            raise HeadsError(f"{path} is a safetensors file but holds no {cls.contents} of this version ({cls.format})")
        known = re.compile(rf"(0|[1-9]\d*)\.({'|'.join(map(re.escape, cls.keys))})")
        strange = [name for name in tensors if not known.fullmatch(name)]
        if strange or not tensors:
            wanted = ", ".join(f"N.{key}" for key in cls.keys)
            raise HeadsError(f"{path}: unexpected {strange[:3]}; wanted {wanted} of every layer N")
        return about, tensors
