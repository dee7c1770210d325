"""Retaining heads: one small MLP per layer that says how much a KV unit will be needed later.

Locret (arXiv:2410.01805), retaining head R of a layer:

    score[t, j] = ( W2 . act( W1 . [q_t | k_t | v_t] ) )_j        j = KV head, no biases

q, k, v are the token's own projections before RoPE, all heads flattened, so a score never changes once its token has
been read. `act` is the backbone's MLP activation. The width of W1, d_R, was 1024 in the release; the paper's table 16
finds 256 equally good, with a quarter of the weights, so 256 is our default.

With `input: "hidden"` a head reads what the layer's projections read instead, W1 . h_t (as KVzap, arXiv:2601.07891,
and an abandoned variant in the release's Phi-3 file do).

Shapes: B batch, T tokens, Hq / Hkv query / KV heads, D head dim, E hidden size, L layers.
    fc1 [d_R, (Hq + 2 Hkv) D] or [d_R, E]      fc2 [Hkv, d_R]

On disk: `config.json` (what the heads are for) and `heads.safetensors`. Loading is strict: whatever is missing, extra,
misshapen, not finite or made for another backbone is an error, never a head with random weights.
"""

from __future__ import annotations

import dataclasses
import json
import re
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import huggingface_hub
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers.activations import ACT2FN

from locret.errors import HeadsError
from locret.files import atomic_write, write_text
from locret.kernels.linear import silu_scores
from locret.labels import LABELS
from locret.parallel import Shard

if TYPE_CHECKING:
    from locret.backbone import Backbone

VERSION = 1
CONFIG_FILE, WEIGHTS_FILE = "config.json", "heads.safetensors"
INPUTS = ("qkv", "hidden")  # what a head reads
INIT_STD = 0.02  # the release leaves the initialisation to transformers: N(0, initializer_range)


@dataclass(frozen=True)
class HeadsConfig:
    """What a set of heads is: its shapes, what it reads and predicts, which backbone it belongs to, how it was made."""

    num_layers: int
    num_q_heads: int
    num_kv_heads: int
    head_dim: int
    hidden_size: int = 256  # d_R
    activation: str = "silu"
    input: str = "qkv"  # one of INPUTS
    label: str = "max-logit"  # what the scores predict: one of labels.LABELS
    objective: str = "paper"  # how they were compared with it while training: train.objectives
    query_aware: bool = False  # trained on prompts that begin with the question: show them the same at inference
    backbone: dict[str, Any] = field(default_factory=dict)  # Backbone.fingerprint()
    training: dict[str, Any] = field(default_factory=dict)  # free text and numbers for people
    version: int = VERSION

    def __post_init__(self) -> None:
        for name in ("num_layers", "num_q_heads", "num_kv_heads", "head_dim", "hidden_size", "version"):
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool) or value < 1:
                raise HeadsError(f"heads config: {name} is {value!r}; it must be a whole number of at least 1")
        if self.version > VERSION:
            raise HeadsError(
                f"heads config: version {self.version}, but this locret reads versions up to {VERSION}; upgrade locret"
            )
        _one_of("activation", self.activation, ACT2FN)
        _one_of("input", self.input, INPUTS)
        _one_of("label", self.label, LABELS)
        if not isinstance(self.objective, str) or not isinstance(self.query_aware, bool):
            raise HeadsError(
                f"heads config: objective is {self.objective!r} and query_aware {self.query_aware!r}; they must be a "
                "name and true or false"
            )
        for name in ("backbone", "training"):
            if not isinstance(getattr(self, name), dict):
                raise HeadsError(
                    f"heads config: {name} is {getattr(self, name)!r}; it must be a table of names and values"
                )
        if self.input == "hidden" and not isinstance(self.backbone.get("hidden_size"), int):
            raise HeadsError('heads config: input is "hidden", but backbone names no hidden_size')

    @classmethod
    def of(
        cls, backbone: Backbone, *, hidden_size: int = 256, training: dict[str, Any] | None = None, **choices: Any
    ) -> HeadsConfig:
        """The config of heads that fit `backbone`; `choices`: input, label, objective, query_aware."""
        whole = backbone.fingerprint()
        return cls(
            **choices,
            **{name: whole[name] for name in _SIZES},
            hidden_size=hidden_size,
            activation=backbone.hidden_act,
            backbone=whole,
            training=training or {},
        )

    @classmethod
    def from_dict(cls, values: object, source: str = "heads config") -> HeadsConfig:
        """Strict: every key known, every shape present."""
        if not isinstance(values, dict):
            raise HeadsError(f"{source}: expected a JSON object, found {type(values).__name__}")
        fields = {f.name: f for f in dataclasses.fields(cls)}
        required = [n for n, f in fields.items() if f.default is f.default_factory is dataclasses.MISSING]
        missing, extra = [n for n in required if n not in values], sorted(set(values) - set(fields))
        if missing or extra:
            raise HeadsError(
                f"{source}: missing keys {missing}, unknown keys {extra}; known: {', '.join(fields)}. "
                "Is this the folder of a model instead of its retaining heads?"
            )
        return cls(**values)

    @property
    def input_size(self) -> int:
        """Numbers a head reads of one token."""
        if self.input == "hidden":
            return int(self.backbone["hidden_size"])
        return (self.num_q_heads + 2 * self.num_kv_heads) * self.head_dim

    def shapes(self) -> dict[str, tuple[int, int]]:
        """Every key of the weights file and its shape."""
        one = {"fc1": (self.hidden_size, self.input_size), "fc2": (self.num_kv_heads, self.hidden_size)}
        return {f"layers.{i}.{name}.weight": shape for i in range(self.num_layers) for name, shape in one.items()}


class HeadInput(NamedTuple):
    """What a layer gives its head: q [B, Hq, T, D], k and v [B, Hkv, T, D], before RoPE; hidden [B, T, E] or None."""

    q: Tensor
    k: Tensor
    v: Tensor
    hidden: Tensor | None = None

    def tokens(self, start: int, stop: int) -> HeadInput:
        """The inputs of tokens start .. stop - 1."""
        q, k, v = (x[:, :, start:stop] for x in (self.q, self.k, self.v))
        return HeadInput(q, k, v, None if self.hidden is None else self.hidden[:, start:stop])


class RetainingHead(nn.Module):
    """The head of one layer."""

    def __init__(self, config: HeadsConfig) -> None:
        super().__init__()
        self.input = config.input
        self.fc1 = nn.Linear(config.input_size, config.hidden_size, bias=False)
        self.fc2 = nn.Linear(config.hidden_size, config.num_kv_heads, bias=False)
        self.act, self.is_silu = ACT2FN[config.activation], config.activation in ("silu", "swish")

    def forward(self, x: HeadInput, dtype: torch.dtype | None = None, shard: Shard | None = None) -> Tensor:
        """Inputs of T tokens -> fp32 [B, Hkv, T]; `dtype`: of fc1's product, default the weights'.

        fc1 of a concatenation is a sum of three products, so nothing is concatenated; and as projections are laid out
        [B, T, H, D] in memory, flattening them is a view. fc2 runs in fp32: bf16 scores tie, and ties evict at random.

        Under tensor parallelism x and the scores are of this process's heads: fc1's columns of these, one sum over the
        processes of [B T, d_R], and fc2's rows of these.
        """
        shard = shard or Shard()
        batch, _, length, dim = x.q.shape
        weight = self.fc1.weight if dtype is None else self.fc1.weight.to(dtype)
        if self.input == "hidden":
            assert x.hidden is not None, "the context of this pass must ask for hidden states: wants_hidden"
            hidden = x.hidden.reshape(batch * length, -1).to(weight.dtype) @ weight.t()  # [B T, d_R]
        else:
            columns = weight.split([part.shape[1] * dim * shard.size for part in (x.q, x.k, x.v)], dim=1)
            wq, wk, wv = (shard.part(part, 1) for part in columns)
            hidden = _rows(x.q, wq.dtype) @ wq.t()  # [B T, d_R]
            hidden = hidden.addmm_(_rows(x.k, wk.dtype), wk.t()).addmm_(_rows(x.v, wv.dtype), wv.t())
            hidden = shard.sum(hidden)
        outputs = shard.part(self.fc2.weight, 0)
        if self.is_silu:
            return silu_scores(hidden, outputs, length)
        scores = self.act(hidden).float() @ outputs.float().t()  # [B T, Hkv]
        return scores.view(batch, length, -1).transpose(1, 2)


class RetainingHeads(nn.Module):
    """The heads of all layers of one backbone (arXiv:2410.01805).

    Attributes:
        compute_dtype: of fc1's product; None is the weights' dtype. Training sets bfloat16 over fp32 weights on CUDA.
        shard: under tensor parallelism inputs and scores are of these KV heads; weights are whole everywhere.
    """

    def __init__(self, config: HeadsConfig, *, generator: torch.Generator | None = None) -> None:
        super().__init__()
        self.config = config
        self.compute_dtype: torch.dtype | None = None
        self.shard = Shard()
        self.layers = nn.ModuleList(RetainingHead(config) for _ in range(config.num_layers))
        for weight in self.parameters():
            nn.init.normal_(weight, std=INIT_STD, generator=generator)

    def score(self, layer: int, q: Tensor, k: Tensor, v: Tensor, hidden: Tensor | None = None) -> Tensor:
        """Causal importance scores of `layer`: q [B, Hq, T, D], k, v [B, Hkv, T, D] before RoPE -> fp32 [B, Hkv, T].

        hidden: [B, T, E], what the layer's projections read; needed, and read, by heads with that input only. Inputs
        are cast to the weights' dtype: move the heads with `.to(device, dtype)` once.
        """
        scores: Tensor = self.layers[layer](HeadInput(q, k, v, hidden), self.compute_dtype, self.shard)
        return scores

    def score_layers(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor | None:
        """`score` of all layers at once: q [L, B, Hq, T, D], k, v [L, B, Hkv, T, D] -> fp32 [L, B, Hkv, T].

        None where that cannot be: weights that were not laid together (`join_layers`), other inputs, a share of the
        heads. A few launches instead of several a layer: for few tokens launching is what takes the time.
        """
        if self.wants_hidden or self.shard.size > 1 or self.compute_dtype is not None:
            return None
        fc1, fc2 = (_joined(weights) for weights in self._weights())
        if fc1 is None or fc2 is None:
            return None
        layers, batch, _, length, _ = q.shape
        rows = [x.transpose(2, 3).reshape(layers, batch * length, -1).to(fc1.dtype) for x in (q, k, v)]
        columns = fc1.mT.split([x.shape[2] for x in rows], dim=1)
        hidden = torch.bmm(rows[0], columns[0])  # [L, B T, d_R]
        for x, weight in zip(rows[1:], columns[1:], strict=True):
            hidden = hidden.baddbmm_(x, weight)
        scores = self.layers[0].act(hidden).float() @ fc2.float().mT  # type: ignore[operator]  # [L, B T, Hkv]
        return scores.unflatten(1, (batch, length)).transpose(2, 3)

    def join_layers(self) -> RetainingHeads:
        """Lay the weights of all layers together, for `score_layers`; returns self. Moving them undoes it."""
        for weights in self._weights():
            if _joined(weights) is None and len({(weight.device, weight.dtype) for weight in weights}) == 1:
                for weight, own in zip(weights, torch.stack([weight.detach() for weight in weights]), strict=True):
                    weight.data = own
        return self

    def _weights(self) -> tuple[list[Tensor], list[Tensor]]:
        """fc1 and fc2 of every layer."""
        heads: list[RetainingHead] = list(self.layers)  # type: ignore[arg-type]
        return [head.fc1.weight for head in heads], [head.fc2.weight for head in heads]

    @property
    def wants_hidden(self) -> bool:
        """Whether they read hidden states."""
        return self.config.input == "hidden"

    @property
    def num_bytes(self) -> int:
        """Bytes of all weights."""
        return sum(p.numel() * p.element_size() for p in self.parameters())

    def to_layers(self, backbone: Backbone) -> RetainingHeads:
        """Move each head to the device of its layer (a model may be spread over several); returns self."""
        for i, head in enumerate(self.layers):
            head.to(backbone.layer_device(i))
        return self

    def check(self, backbone: Backbone) -> None:
        """Take over how `backbone` is split over processes, and make sure that these heads were made for it.

        Raises: HeadsError: for another one; the message names every field that differs.
        """
        self.shard = backbone.shard
        seen = backbone.fingerprint()
        wanted = self.config.backbone or {name: getattr(self.config, name) for name in _SIZES}
        wrong = [f"{n}: {seen.get(n)!r}, wanted {w!r}" for n, w in wanted.items() if seen.get(n) != w]
        if wrong:
            raise HeadsError(
                "these retaining heads were made for another backbone: it has " + "; ".join(wrong) + ". "
                "Load the model that the heads were trained on, or train heads for this one (locret train)"
            )

    # ------------------------------------------------------------------ our own files

    def save_pretrained(self, folder: str | Path, *, dtype: torch.dtype | None = None) -> None:
        """Write `config.json` and `heads.safetensors`, each in one atomic rename: a full disk or a kill leaves the old
        files whole. The weights go first and carry the config too, so a pair from two saves is noticed.

        dtype: of the file; None: as they are."""
        folder = Path(folder)
        text = json.dumps(dataclasses.asdict(self.config), indent=2, sort_keys=True) + "\n"
        tensors = {name: tensor.detach().to("cpu", dtype).contiguous() for name, tensor in self.state_dict().items()}
        _check_finite(tensors, "not saved: ")
        try:
            atomic_write(folder / WEIGHTS_FILE, lambda path: save_file(tensors, path, metadata={"config": text}))
            write_text(folder / CONFIG_FILE, text)
        except (OSError, SafetensorError) as error:  # safetensors wraps a full disk in its own class
            raise HeadsError(
                f"heads in {folder} cannot be written: {_first_line(error)}; the old ones are untouched"
            ) from error

    @classmethod
    def from_pretrained(
        cls, path: str | Path, *, revision: str | None = None, token: str | None = None
    ) -> RetainingHeads:
        """Heads from a folder, or from a Hub id such as "user/name". Strict: any defect raises HeadsError.

        Weights keep the dtype they are stored in. Call `check(backbone)` before use; the engine does.
        """
        folder = _folder(path, [CONFIG_FILE, WEIGHTS_FILE], revision=revision, token=token)
        config = _read_config(folder / CONFIG_FILE)
        tensors, metadata = _read_safetensors(folder / WEIGHTS_FILE)
        if "config" in metadata:
            _check_same_save(config, HeadsConfig.from_dict(json.loads(metadata["config"])), folder)
        return cls._from_tensors(config, tensors, str(folder / WEIGHTS_FILE))

    def push_to_hub(
        self, repo_id: str, *, private: bool | None = None, token: str | None = None, message: str = "Retaining heads"
    ) -> str:
        """Upload the two files and a short model card; returns the commit's address."""
        api = huggingface_hub.HfApi(token=token)
        repo = api.create_repo(repo_id, private=private, exist_ok=True).repo_id
        with tempfile.TemporaryDirectory() as folder:
            self.save_pretrained(folder)
            write_text(Path(folder) / "README.md", _card(self.config, repo))
            commit = api.upload_folder(repo_id=repo, folder_path=folder, commit_message=message)
        return commit.commit_url

    # ------------------------------------------------------------------ published files

    def save_published(self, path: str | Path, *, dtype: torch.dtype | None = None) -> None:
        """Write one .safetensors file with the keys of the Locret release, `model.layers.{i}.self_attn.fc1.weight`.

        It says nothing of what the heads are for. Raises: HeadsError: heads that read hidden states, which the release
        does not know; a file that cannot be written.
        """
        if self.wants_hidden:
            raise HeadsError("these heads read hidden states; the published layout has only heads that read q, k, v")
        if Path(path).suffix != ".safetensors":
            raise HeadsError(f"{path}: the published layout is written as one file that ends in .safetensors")
        tensors = {
            f"model.{name.replace('.fc', '.self_attn.fc')}": tensor.detach().to("cpu", dtype).contiguous()
            for name, tensor in self.state_dict().items()
        }
        try:
            atomic_write(path, lambda temporary: save_file(tensors, temporary))
        except (OSError, SafetensorError) as error:
            raise HeadsError(f"{path} cannot be written: {_first_line(error)}") from error

    @classmethod
    def from_published(
        cls, path: str | Path, backbone: Backbone, *, revision: str | None = None, token: str | None = None
    ) -> RetainingHeads:
        """Import heads in the layout of the Locret and APB releases (`hyx21/Locret-*`, `thunlp/APB-Locret-*`).

        Keys `model.layers.{i}.self_attn.fc1.weight` and `...fc2.weight`, or bare `layers.{i}.fc1.weight`, in a .bin or
        .pt file (read with weights_only: nothing in it is executed), a .safetensors file, a folder of shards, or a Hub
        id; other keys beside them (a whole checkpoint) are left alone. The files say nothing about their backbone:
        shapes and layers are checked against `backbone`, which becomes the heads' fingerprint.
        """
        source = Path(path)
        if not source.is_file():
            source = _folder(path, _PUBLISHED_PATTERNS, revision=revision, token=token)
        tensors = _published_tensors(source)
        first = tensors.get("layers.0.fc1.weight")
        hidden_size = first.shape[0] if first is not None and first.dim() == 2 else 1024
        config = HeadsConfig.of(backbone, hidden_size=hidden_size, training={"imported from": str(path)})
        return cls._from_tensors(config, tensors, str(source))

    @classmethod
    def _from_tensors(cls, config: HeadsConfig, tensors: Mapping[str, Tensor], source: str) -> RetainingHeads:
        _check_tensors(config, tensors, source)
        with torch.device("meta"):  # no memory and no random numbers for weights that are about to be replaced
            heads = cls(config)
        heads.load_state_dict(dict(tensors), strict=True, assign=True)
        return heads.requires_grad_(False).eval()


_SIZES = ("num_layers", "num_q_heads", "num_kv_heads", "head_dim")
_PUBLISHED_PATTERNS = ["*.bin", "*.pt", "*.pth", "*.safetensors", "*.index.json"]
_IN_ATTENTION = re.compile(r"(?:^|\.)layers\.(\d+)\.self_attn\.(fc[12])\.weight$")
_BARE = re.compile(r"^(?:model\.)?layers\.(\d+)\.(fc[12])\.weight$")
_NOT_WEIGHTS = re.compile(r"^(optimizer|scheduler|scaler|training_args|random_states|rng_state|checkpoint\.pt)")


def _rows(x: Tensor, dtype: torch.dtype) -> Tensor:
    """[B, H, T, D] -> [B T, H D]; a view when the memory is laid out [B, T, H, D], as a projection's output is."""
    batch, heads, length, dim = x.shape
    return x.transpose(1, 2).reshape(batch * length, heads * dim).to(dtype)


def _joined(weights: list[Tensor]) -> Tensor | None:
    """One tensor [L, ...] of equal weights that lie one behind the other in the same memory; None: they do not."""
    first = weights[0]
    memory, start, size = first.untyped_storage().data_ptr(), first.storage_offset(), first.numel()
    for i, weight in enumerate(weights):
        if weight.untyped_storage().data_ptr() != memory or weight.storage_offset() != start + i * size:
            return None
        if weight.dtype != first.dtype or not weight.is_contiguous():
            return None
    return first.detach().as_strided((len(weights), *first.shape), (size, *first.stride()))


def _one_of(name: str, value: object, valid: Any) -> None:
    if value not in valid:
        raise HeadsError(f"heads config: {name} is {value!r}; this locret knows: {', '.join(sorted(valid))}")


# ---------------------------------------------------------------------- reading


def _folder(path: str | Path, patterns: list[str], **hub: Any) -> Path:
    """The local folder, or the Hub's files downloaded into its cache."""
    if Path(path).is_dir():
        return Path(path)
    name = str(path)
    if Path(path).exists() or not re.fullmatch(r"[\w-][\w.-]*/[\w-][\w.-]*", name):
        raise HeadsError(
            f"{name!r} is not a folder and not a Hub id ('user/name'); give the folder that holds {patterns[0]}"
        )
    try:
        return Path(huggingface_hub.snapshot_download(name, allow_patterns=patterns, **hub))
    except Exception as error:  # the Hub's client raises its own, its HTTP library's and OS errors
        raise HeadsError(
            f"no folder {name!r} here, and the Hub could not give it: {type(error).__name__}: {_first_line(error)}. "
            "Check the spelling, the network and, for a private repository, your token (hf auth login)"
        ) from error


def _read_config(path: Path) -> HeadsConfig:
    if not path.is_file():
        raise HeadsError(f"{path} is missing; a heads folder holds {CONFIG_FILE} and {WEIGHTS_FILE}")
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise HeadsError(f"{path} cannot be read as JSON: {_first_line(error)}; copy or download it again") from error
    return HeadsConfig.from_dict(values, str(path))


def _read_safetensors(path: Path, wanted: re.Pattern[str] | None = None) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Tensors whose key matches `wanted` (all when None), and the file's metadata."""
    if not path.is_file():
        raise HeadsError(f"{path} is missing; a heads folder holds {CONFIG_FILE} and {WEIGHTS_FILE}")
    try:
        with safe_open(path, framework="pt") as file:
            keys = [key for key in file.keys() if wanted is None or wanted.search(key)]  # noqa: SIM118  (not a dict)
            return {key: file.get_tensor(key) for key in keys}, file.metadata() or {}
    except (SafetensorError, OSError) as error:
        raise HeadsError(
            f"{path} ({path.stat().st_size} bytes) is truncated or no safetensors file: {_first_line(error)}; "
            "copy or download it again"
        ) from error


def _read_pickle(path: Path) -> dict[str, Tensor]:
    try:
        values = _torch_load(path)
    except Exception as error:  # torch.load raises pickle, zip, EOF, runtime and key errors for broken files
        raise HeadsError(
            f"{path} ({path.stat().st_size} bytes) is truncated, or not a file of plain tensors "
            f"({type(error).__name__}); copy or download it again"
        ) from error
    if not isinstance(values, dict):
        raise HeadsError(f"{path} holds a {type(values).__name__}; expected a dictionary of tensors (a state dict)")
    return {key: value for key, value in values.items() if isinstance(key, str) and isinstance(value, Tensor)}


def _torch_load(path: Path) -> object:
    try:  # mapped: of a whole checkpoint only the heads are read
        return torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except RuntimeError as error:
        if "mmap" not in str(error):
            raise
        return torch.load(path, map_location="cpu", weights_only=True)  # the format before torch 1.6


def _published_tensors(source: Path) -> dict[str, Tensor]:
    """Heads found in a file or folder, under our own keys."""
    found: dict[str, dict[str, Tensor]] = {"attention": {}, "bare": {}}
    files = [source] if source.is_file() else list(_weight_files(source))
    for file in files:
        for key, tensor in _tensors_of(file):
            for kind, pattern in (("attention", _IN_ATTENTION), ("bare", _BARE)):
                match = pattern.search(key)
                if match:
                    name = f"layers.{int(match[1])}.{match[2]}.weight"
                    if name in found[kind]:
                        raise HeadsError(f"{file}: {key} is the second {name} in {source}; point to one set of heads")
                    found[kind][name] = tensor.clone()  # not a view of a mapped checkpoint
    tensors = found["attention"] or found["bare"]
    if not tensors:
        raise HeadsError(
            f"no retaining heads in {source}: looked at {[f.name for f in files] or 'no weight file'} for keys like "
            "'model.layers.0.self_attn.fc1.weight' or 'layers.0.fc1.weight'"
        )
    return tensors


def _weight_files(folder: Path) -> Iterator[Path]:
    """The shards an index names, else every file of tensors in the folder."""
    for index in sorted(folder.glob("*.index.json")):
        try:
            shards = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise HeadsError(f"{index} cannot be read as a shard index: {_first_line(error)}") from error
        lost = [name for name in shards if not (folder / name).is_file()]
        if lost:
            raise HeadsError(f"{index} names shards that are missing: {', '.join(lost)}; copy or download them")
        yield from (folder / name for name in shards)
        return
    files = [p for pattern in _PUBLISHED_PATTERNS[:-1] for p in sorted(folder.glob(pattern))]
    yield from (p for p in files if not _NOT_WEIGHTS.match(p.name))


def _tensors_of(path: Path) -> Iterator[tuple[str, Tensor]]:
    if path.suffix == ".safetensors":
        yield from _read_safetensors(path, re.compile(r"\.fc[12]\.weight$"))[0].items()
    else:
        yield from _read_pickle(path).items()


# ---------------------------------------------------------------------- checking


def _check_tensors(config: HeadsConfig, tensors: Mapping[str, Tensor], source: str) -> None:
    wanted = config.shapes()
    missing, extra = [n for n in wanted if n not in tensors], sorted(set(tensors) - set(wanted))
    if missing or extra:
        raise HeadsError(
            f"{source}: {_some('missing', missing)}{_some('unexpected', extra)}"
            f"wanted fc1 and fc2 of {config.num_layers} layers; they belong to another backbone or are incomplete"
        )
    for name, shape in wanted.items():
        tensor = tensors[name]
        if tuple(tensor.shape) != shape:
            raise HeadsError(
                f"{source}: {name} has shape {list(tensor.shape)}, wanted {list(shape)} "
                f"(d_R {config.hidden_size}, {config.num_q_heads} query and {config.num_kv_heads} KV heads of "
                f"{config.head_dim}); these heads belong to another backbone"
            )
        if not tensor.dtype.is_floating_point:
            raise HeadsError(f"{source}: {name} is {tensor.dtype}; wanted floating-point weights")
    _check_finite(tensors, f"{source}: ")


def _check_finite(tensors: Mapping[str, Tensor], prefix: str) -> None:
    for name, tensor in tensors.items():
        bad = int((~torch.isfinite(tensor)).sum())
        if bad:
            raise HeadsError(
                f"{prefix}{name} has {bad} NaN or infinite of {tensor.numel()} weights; "
                "the training diverged or the file is damaged: train or download again"
            )


def _check_same_save(config: HeadsConfig, weights: HeadsConfig, folder: Path) -> None:
    """A kill between the two renames may leave an old `training` note; anything else is a mixed-up folder."""
    for f in dataclasses.fields(HeadsConfig):
        ours, theirs = getattr(config, f.name), getattr(weights, f.name)
        if f.name != "training" and ours != theirs:
            raise HeadsError(
                f"{folder}: {CONFIG_FILE} and {WEIGHTS_FILE} are not from one save: {f.name} is {ours!r} in the first, "
                f"{theirs!r} in the second; copy both files from the same place"
            )


def _some(what: str, names: list[str]) -> str:
    more = f" and {len(names) - 3} more" if len(names) > 3 else ""
    return f"{what} {', '.join(names[:3])}{more}; " if names else ""


def _first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


def _card(config: HeadsConfig, repo: str) -> str:
    name = config.backbone.get("architecture", "a Hugging Face causal language model")
    return f"""---
library_name: locret
tags: [locret, kv-cache, long-context]
---
# Retaining heads

{config.num_layers} layers, d_R {config.hidden_size}, for {name} (Locret, arXiv:2410.01805).

```python
import locret
llm = locret.load(MODEL, heads="{repo}", budget=6000)
```

Training: `{json.dumps(config.training, sort_keys=True)}`
"""
