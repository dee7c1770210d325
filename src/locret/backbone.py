"""The seam to transformers: an unmodified causal language model whose attention is ours.

Three public pieces of transformers carry it, and nothing else:

1. `AttentionInterface.register("locret", fn)`: q, k, v of every layer reach one function, whatever the family did
   before (fused projections, biases, q/k norms). The name is absent from the mask registry, so no mask is ever built.
2. A keyword that transformers forwards untouched to that function: `model(..., use_cache=False, locret=ctx)`.
   No `Cache` object to fake; full attention, label extraction and the budgeted cache are three `LayerContext`s.
3. A neutral rotary module in the place of the model's own (cos = 1, sin = 0), so q and k arrive *before* RoPE. The real
   one stays inside ours, and rotation is done by the family's own `apply_rotary_pos_emb` at positions that we choose.

`probe` runs at every load: per layer it finds out whether the family rotates, keeps a window, or does something that
we would get silently wrong, in which case the model is refused.

Shapes: B batch, T chunk, Hq/Hkv query/KV heads, D head dim.
"""

from __future__ import annotations

import contextlib
import copy
import inspect
import re
import sys
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, Protocol, cast
from weakref import WeakValueDictionary

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AutoModelForCausalLM, AutoTokenizer, PreTrainedModel
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
from transformers.tokenization_utils_base import PreTrainedTokenizerBase

from locret.errors import BackboneError, ConfigError, unknown
from locret.fused import FusedModel, recognise
from locret.kernels.decode_attention import Angles, angles_of
from locret.kernels.rotate import by_slot, rotate
from locret.parallel import Shard, join

ATTENTION_NAME = "locret"
EMBEDDED = Path(__file__).parent / "models" / "embedded"
_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16, "float64": torch.float64}
_LAYER_TYPES = {"full_attention", "sliding_attention"}
# arguments that change what attention computes and that we do not carry
_UNSUPPORTED_ARGUMENTS = ("s_aux", "head_mask", "position_bias")
_WEIGHTS = ("weight", "qweight", "weight_packed")  # what a layer's matrix is called, quantised or not
_NUMBER = re.compile(r"(?<=\.)\d+(?=\.|$)")  # of a layer, in the name of a tensor


class AttentionCall(NamedTuple):
    """What the family asks of one layer's attention besides q, k and v."""

    scale: float
    softcap: float | None
    window: int | None
    hidden: Tensor | None = None  # what the projections read, [B, T, E]; only for contexts that want it


class LayerContext(Protocol):
    """One forward pass as the layers see it. One with a true attribute `wants_hidden` is also given hidden states."""

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor, call: AttentionCall) -> Tensor:
        """q [B, Hq, T, D], k and v [B, Hkv, T, D], before RoPE; returns [B, Hq, T, D]."""
        ...


@dataclass(frozen=True)
class LayerSpec:
    """What `probe` found in one layer."""

    rotated: bool  # False: a layer without positions (NoPE)
    window: int | None  # sliding-window layers keep their window and take no budget
    rope_type: str | None  # which of the family's rotary tables; None: it has one


class Rope:
    """Rotation tables, built once: the frequencies of LongRoPE or dynamic NTK do not depend on the chunking.

    Args:
        length: positions 0 .. length - 1 can be asked for; `rotate` grows the table when more are.
        prompt_len: the length that families with length-dependent frequencies choose them by.
    """

    def __init__(self, backbone: Backbone, length: int, prompt_len: int) -> None:
        self._layers = backbone.layers
        self._apply = backbone.apply_rope
        self._real = copy.deepcopy(backbone.rotary)  # "dynamic" modules remember the longest prompt they have seen
        self._like = torch.zeros(1, 1, dtype=backbone.dtype, device=backbone.device)
        self.prompt_len = prompt_len
        self._tables: dict[str | None, tuple[Tensor, Tensor]] = {}
        self._head_dim = backbone.head_dim
        self._kinds: dict[str | None, Angles | None] = {}
        self.length = 0
        self.grow(length)

    @torch.inference_mode(False)
    @torch.no_grad()
    def grow(self, length: int) -> None:
        """Make positions up to `length` - 1 available."""
        if length <= self.length:
            return
        self.length = max(length, min(2 * self.length, self.length + 65_536))
        last = max(self.prompt_len - 1, 0)
        positions = torch.cat((torch.arange(self.length), torch.tensor([last])))[None].to(self._like.device)
        if self.length > self.prompt_len:  # choose by the prompt, then read the rest of the angles
            _call_rotary(self._real, self._like, positions[:, -1:], self._types())
            positions = positions[:, :-1]
        for kind in self._types():
            cos, sin = self._angles(positions, kind)
            self._tables[kind] = (cos[0, : self.length], sin[0, : self.length])
        self._kinds.clear()

    def angles(self, layer: int) -> Angles | None:
        """The layer's tables as the kernels take them; None: it does not rotate, or in a way that they do not know."""
        spec = self._layers[layer]
        if not spec.rotated:
            return None
        if spec.rope_type not in self._kinds:
            self._kinds[spec.rope_type] = angles_of(self._apply, *self._tables[spec.rope_type], self._head_dim)
        return self._kinds[spec.rope_type]

    def run(self, layer: int, x: Tensor, first: int, out: Tensor | None = None, slots: Tensor | None = None) -> Tensor:
        """RoPE at positions first, first + 1, ... x [B, H, T, D], laid out as it is or into `out`.

        slots: int32, [B, H, T]: where the first token lies, the second, ...; default: one behind the other.
        """
        angles = self.kernel_angles(layer, x)
        if angles is not None:
            return rotate(x, angles, first, torch.empty_like(x) if out is None else out, slots)
        at = torch.arange(first, first + x.shape[2], device=x.device)
        return self.rotate(layer, x, at if slots is None else by_slot(at[None, None], slots), out)

    def kernel_angles(self, layer: int, x: Tensor) -> Angles | None:
        """The tables by which `run` turns x in one kernel, or None: on a CPU the family's function is as fast."""
        angles = self.angles(layer) if x.is_cuda else None
        return angles if angles is not None and angles.cos.device == x.device else None

    def rotate(self, layer: int, x: Tensor, positions: Tensor, out: Tensor | None = None) -> Tensor:
        """RoPE by the family's own function. x [B, H, T, D]; positions [T], [B, T] or [B, H, T], int64."""
        turned = self._rotate(layer, x, positions)
        return turned if out is None else out.copy_(turned)

    def _rotate(self, layer: int, x: Tensor, positions: Tensor) -> Tensor:
        spec = self._layers[layer]
        if not spec.rotated:
            return x
        cos, sin = (table.to(x.device)[positions] for table in self._tables[spec.rope_type])  # [..., T, rotary dim]
        if positions.dim() == 1:
            cos, sin = cos[None], sin[None]
        if positions.dim() < 3:
            return self._apply(x, x[:, :1], cos, sin)[0]  # the function wants a pair: give it the least
        b, h, t, d = x.shape  # fold heads into the batch: each has its own angles
        folded = x.reshape(b * h, 1, t, d)
        return self._apply(folded, folded, cos.flatten(0, 1), sin.flatten(0, 1))[0].reshape(b, h, t, d)

    def _types(self) -> list[str | None]:
        return sorted({spec.rope_type for spec in self._layers}, key=str)

    def _angles(self, positions: Tensor, kind: str | None) -> tuple[Tensor, Tensor]:
        with _fixed_frequencies(self._real, by_prompt=self.length > self.prompt_len):
            return self._real(self._like, positions, *(() if kind is None else (kind,)))


class Backbone:
    """A causal language model behind the seam.

    Attributes:
        model, tokenizer: the Hugging Face objects, unchanged.
        num_layers, num_q_heads, num_kv_heads, head_dim, hidden_act: its dimensions, as the probe saw them.
        layers: one `LayerSpec` a layer.
        shard: under tensor parallelism heads are counted as they are on this process, and this says which they are.
        calls: what each layer asks of attention.
        fused: the layers in fewer kernels, where the family's are known (`fused`) and the model is on a GPU.
    """

    def __init__(self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase | None = None) -> None:
        self.model = model
        self.tokenizer = tokenizer
        self._inside = 0  # of the seam
        self._before: str | None = None  # the model's own attention, while ours is in place
        self._seam_lock = threading.RLock()  # a stream that is collected leaves the seam at any time
        self._ropes: WeakValueDictionary[int, Rope] = WeakValueDictionary()
        base: Any = model.base_model
        rotary = getattr(base, "rotary_emb", None)
        if not isinstance(rotary, nn.Module):
            raise BackboneError(f"{type(model).__name__} has no rotary module at base_model.rotary_emb; "
                                "locret runs decoder families that use RoPE that way")  # fmt: skip
        self.rotary: nn.Module = rotary
        found = probe(self)
        self.layers = found.layers
        self.apply_rope = found.apply_rope
        self.attention_modules = found.modules
        self.num_layers = len(found.layers)
        self.num_q_heads, self.num_kv_heads, self.head_dim = found.dims
        self.shard = Shard.of(model.config, self.num_q_heads, self.num_kv_heads)
        self.hidden_act: str = getattr(model.config, "hidden_act", None) or model.config.hidden_activation
        self.calls = found.calls
        self.fused: FusedModel | None = recognise(self) if self.device.type == "cuda" else None

    @classmethod
    def load(
        cls, name_or_path: str | Path | None = None, *, device: str = "auto", dtype: str | torch.dtype = "auto",
        options: Mapping[str, Any] | None = None,
    ) -> Backbone:  # fmt: skip
        """Load a model folder or hub id; no name: the small model that ships with locret.

        Args:
            device: "auto" (CUDA when there is one), "cpu", "cuda", "cuda:1".
            dtype: "auto" (as stored; float32 on a CPU), "float32", "bfloat16", "float16", or torch's own.
            options: further keywords of `from_pretrained`: quantization_config, device_map, max_memory, revision ...
                With a device_map the model stays where that puts it. tp_plan="auto", on the processes of torchrun:
                each takes its share of every layer (tensor parallel).
        Raises: BackboneError: it cannot be loaded, or cannot be run faithfully. ConfigError: a device or dtype that
            is none.
        """
        where = _device(device)
        dtype = str(dtype).removeprefix("torch.")
        if dtype not in (*_DTYPES, "auto"):
            raise unknown("dtype", dtype, [*_DTYPES, "auto"])
        path = str(EMBEDDED if name_or_path is None else name_or_path)
        wanted: Any = _DTYPES.get(dtype, torch.float32 if where.type == "cpu" else "auto")
        options = dict(options or {})
        if "quantization_config" in options and where.type == "cuda":
            options.setdefault("device_map", {"": where})  # quantised weights are made in place and cannot be moved
        split = {"tp_plan", "distributed_config"} & set(options)
        if split and not join():  # transformers would join a group that takes no tensors of the CPU
            raise ConfigError(
                f"{min(split)} splits a model over processes: start several with torchrun --nproc-per-node"
            )
        try:
            model, found = _load_model(path, dtype=wanted, **options)
            tokenizer = AutoTokenizer.from_pretrained(path)
        except (OSError, ValueError, KeyError, RuntimeError, ImportError) as error:
            raise BackboneError(
                f"cannot load a model from {path!r}: {_first_line(error)}; give a folder with config.json, weights and "
                "tokenizer, or a hub id that this machine can reach"
            ) from error
        except Exception as error:  # safetensors raises a class of its own for broken files
            if type(error).__module__.startswith("safetensors"):
                raise BackboneError(f"the weights in {path!r} are broken: {_first_line(error)}") from error
            raise
        _check_weights(path, model, found)
        if "device_map" not in options and not split:
            model = model.to(where)
        return cls(model.eval(), tokenizer)

    @property
    def vocab_size(self) -> int:
        """Token ids that the model can read are below it."""
        return cast(nn.Embedding, self.model.get_input_embeddings()).num_embeddings

    def need_tokenizer(self) -> PreTrainedTokenizerBase:
        """The tokenizer, for text; a ConfigError where the model was given without one."""
        if self.tokenizer is None:
            raise ConfigError("this model was given without a tokenizer; give token ids instead of text")
        return self.tokenizer

    @property
    def device(self) -> torch.device:
        return next(self.model.parameters()).device

    @property
    def dtype(self) -> torch.dtype:
        return self.model.dtype

    @property
    def decoder_layers(self) -> list[nn.Module]:
        """The modules that hold an attention module and what belongs to it, in order."""
        attention = {id(module) for module in self.attention_modules}
        return [m for m in self.model.modules() if any(id(child) in attention for child in m.children())]

    def layer_device(self, layer: int) -> torch.device:
        """Where a layer's attention runs; layers of a model loaded with a `device_map` may lie on different devices."""
        module = self.attention_modules[layer]
        for part in module.modules():
            hook = getattr(part, "_hf_hook", None)  # accelerate's: weights may wait elsewhere until they are needed
            where = getattr(hook, "execution_device", None)
            if where is not None:
                return torch.device(where)
        return next(module.parameters()).device

    def fingerprint(self) -> dict[str, Any]:
        """What heads are made for: they fit every model with the same fingerprint."""
        return {
            "architecture": type(self.model).__name__,
            "num_layers": self.num_layers,
            "num_q_heads": self.num_q_heads * self.shard.size,
            "num_kv_heads": self.num_kv_heads * self.shard.size,
            "head_dim": self.head_dim,
            "hidden_size": int(self.model.config.hidden_size),
            "hidden_act": self.hidden_act,
        }

    def rope(self, length: int, prompt_len: int) -> Rope:
        """Rotation tables for positions below `length`, frequencies chosen for a prompt of `prompt_len` tokens.

        Whoever asks for the same prompt length while others still use theirs gets the same tables: they only grow.
        """
        rope = self._ropes.get(prompt_len)
        if rope is None:
            with torch.inference_mode(False), torch.no_grad():  # whoever has them next may want gradients
                rope = self._ropes[prompt_len] = Rope(self, length, prompt_len)
        rope.grow(length)
        return rope

    def run(self, input_ids: Tensor, context: LayerContext, *, logits: int = 1) -> Tensor | None:
        """One forward pass. input_ids [B, T]; returns the logits of the last `logits` tokens, [B, logits, V].

        `logits=0` skips the output matrix and returns None.
        """
        if self.fused is not None:
            return self.fused.run(input_ids, context, logits=logits)
        return self.run_modules(input_ids, context, logits=logits)

    def run_modules(self, input_ids: Tensor, context: LayerContext, *, logits: int = 1) -> Tensor | None:
        """`run` through transformers' own modules, whether there is a faster way or not."""
        positions = torch.arange(input_ids.shape[1], device=input_ids.device)[None]  # read by the neutral rotary only
        hidden = getattr(context, "wants_hidden", False)
        with self.seam(), _hidden_states(self.attention_modules) if hidden else contextlib.nullcontext():
            if logits == 0:
                self.model.base_model(input_ids=input_ids, position_ids=positions, use_cache=False, locret=context)
                return None
            return self.model(
                input_ids=input_ids, position_ids=positions, use_cache=False, locret=context, logits_to_keep=logits
            ).logits

    @contextlib.contextmanager
    def seam(self) -> Iterator[None]:
        """Put our attention and the neutral rotary in place. Whoever leaves last, of all threads and all streams that
        are suspended inside, makes the model what it was."""
        with self._seam_lock:
            self._inside += 1
            if self._before is None:
                self._before = self.model.config._attn_implementation
                self.model.set_attn_implementation(ATTENTION_NAME)
                cast(Any, self.model.base_model).rotary_emb = _NeutralRotary(self.rotary)
        try:
            yield
        finally:
            with self._seam_lock:
                self._inside -= 1
                if not self._inside and self._before is not None:
                    cast(Any, self.model.base_model).rotary_emb = self.rotary
                    self.model.set_attn_implementation(self._before)
                    self._before = None


class _NeutralRotary(nn.Module):
    """cos = 1, sin = 0: x * cos + turn(x) * sin is exactly x."""

    def __init__(self, real: nn.Module) -> None:
        super().__init__()
        self.real = real
        self._dims: dict[Any, int] = {}

    def forward(self, x: Tensor, position_ids: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        key = (args, tuple(kwargs.items()))
        if key not in self._dims:
            probe_at = torch.zeros(1, 1, dtype=torch.long, device=x.device)
            self._dims[key] = copy.deepcopy(self.real)(x[:, :1], probe_at, *args, **kwargs)[0].shape[-1]
        one = x.new_ones(1, 1, self._dims[key])
        return one, torch.zeros_like(one)


def _attention(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None,
    scaling: float | None = None, dropout: float = 0.0, sliding_window: int | None = None,
    softcap: float | None = None, locret: LayerContext | None = None, **kwargs: Any,
) -> tuple[Tensor, None]:  # fmt: skip
    """The function that transformers calls in every layer."""
    if locret is None:
        raise BackboneError("attention 'locret' was called without a context; run the model through locret, "
                            "or set its attention implementation back")  # fmt: skip
    assert attention_mask is None, "transformers builds no mask for this name"
    if any(kwargs.get(name) is not None for name in _UNSUPPORTED_ARGUMENTS):
        names = [name for name in _UNSUPPORTED_ARGUMENTS if kwargs.get(name) is not None]
        raise BackboneError(f"{type(module).__name__} passes {', '.join(names)} to attention; locret carries none")
    scale = module.scaling if scaling is None else scaling
    call = AttentionCall(float(scale), softcap, sliding_window, _HIDDEN.pop(module, None))  # type: ignore[arg-type]
    if isinstance(locret, _Probe):
        locret.modules[module.layer_idx] = module  # type: ignore[index]
    out = locret.attend(module.layer_idx, query, key, value, call)  # type: ignore[arg-type]
    return out.transpose(1, 2).contiguous(), None


AttentionInterface.register(ATTENTION_NAME, _attention)
assert ATTENTION_NAME not in ALL_MASK_ATTENTION_FUNCTIONS.valid_keys(), "a registered mask would be built"


_HIDDEN: dict[nn.Module, Tensor] = {}  # between a module's pre-hook and its attention call


@contextlib.contextmanager
def _hidden_states(modules: list[nn.Module]) -> Iterator[None]:
    """While it is open, every attention call carries what the module was given."""

    def note(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        _HIDDEN[module] = args[0] if args else kwargs["hidden_states"]

    hooks = [module.register_forward_pre_hook(note, with_kwargs=True) for module in modules]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()
        _HIDDEN.clear()


class _Probe:
    """Attention stubbed to zero, so that layer inputs do not depend on positions and queries can be compared."""

    def __init__(self) -> None:
        self.q: dict[int, Tensor] = {}
        self.k: dict[int, Tensor] = {}
        self.calls: dict[int, AttentionCall] = {}
        self.modules: dict[int, nn.Module] = {}

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor, call: AttentionCall) -> Tensor:
        if v.shape != k.shape or q.shape[-1] != k.shape[-1]:
            raise BackboneError(f"layer {layer}: q {tuple(q.shape)}, k {tuple(k.shape)}, v {tuple(v.shape)} "
                                "differ in head dim; locret stores K and V of one size")  # fmt: skip
        self.q[layer], self.k[layer], self.calls[layer] = q, k, call
        return torch.zeros_like(q)


class _Found(NamedTuple):
    layers: list[LayerSpec]
    calls: list[AttentionCall]
    apply_rope: Callable[..., tuple[Tensor, Tensor]]
    dims: tuple[int, int, int]
    modules: list[nn.Module]


@torch.no_grad()
def probe(backbone: Backbone) -> _Found:
    """Find out per layer how the family treats positions; refuse what we would get wrong.

    Two five-token passes, one with the neutral and one with the real rotary module. A layer whose queries are the same
    in both has no positions; one whose queries equal our own rotation is rotated; anything else is refused.
    Raises: BackboneError naming the layer.
    """
    model, base = backbone.model, backbone.model.base_model
    ids = torch.arange(4, 9, device=backbone.device)[None] % model.config.vocab_size
    positions = torch.tensor([[0, 3, 7, 12, 29]], device=backbone.device)
    neutral, real = _Probe(), _Probe()
    with backbone.seam():
        swapped = base.rotary_emb
        for rotary, record in ((swapped, neutral), (backbone.rotary, real)):
            base.rotary_emb = rotary
            model(input_ids=ids, position_ids=positions, use_cache=False, locret=record)
        base.rotary_emb = swapped
    wanted = model.config.num_hidden_layers
    if sorted(neutral.q) != list(range(wanted)):
        raise BackboneError(f"{type(model).__name__}: {len(neutral.q)} of {wanted} layers use plain attention; "
                            "locret needs all of them")  # fmt: skip
    shapes = {(q.shape[1], neutral.k[i].shape[1], q.shape[3]) for i, q in neutral.q.items()}
    if len(shapes) != 1:
        raise BackboneError(f"layers differ in (query heads, KV heads, head dim): {sorted(shapes)}; locret needs one")
    apply_rope = _family_apply_rope(neutral.modules[0])
    layers = []
    for i in range(wanted):
        kind = _rope_type(backbone, i)
        rotated = _is_rotated(backbone, i, neutral, real, apply_rope, positions, kind)
        layers.append(LayerSpec(rotated, _window(backbone, neutral.modules[i], neutral.calls[i], i), kind))
    return _Found(
        layers,
        [neutral.calls[i] for i in range(wanted)],
        apply_rope,
        shapes.pop(),
        [neutral.modules[i] for i in range(wanted)],
    )


def _family_apply_rope(module: nn.Module) -> Callable[..., tuple[Tensor, Tensor]]:
    source = sys.modules[type(module).__module__]
    apply_rope = getattr(source, "apply_rotary_pos_emb", None)
    if apply_rope is None:
        raise BackboneError(f"{type(module).__name__}: no apply_rotary_pos_emb in {source.__name__}")
    return apply_rope


def _is_rotated(
    backbone: Backbone, i: int, neutral: _Probe, real: _Probe, apply_rope: Callable[..., tuple[Tensor, Tensor]],
    positions: Tensor, kind: str | None,
) -> bool:  # fmt: skip
    if torch.equal(neutral.q[i], real.q[i]) and torch.equal(neutral.k[i], real.k[i]):
        return False
    like = torch.zeros(1, 1, dtype=backbone.dtype, device=backbone.device)
    angles = backbone.rotary(like, positions, *(() if kind is None else (kind,)))
    cos, sin = (angle.to(neutral.q[i].device) for angle in angles)
    ours = apply_rope(neutral.q[i], neutral.k[i], cos, sin)
    tolerance = 2e-2 if backbone.dtype in (torch.bfloat16, torch.float16) else 1e-3
    for mine, theirs in zip(ours, (real.q[i], real.k[i]), strict=True):
        if (mine - theirs).abs().max() > tolerance * theirs.abs().max():
            raise BackboneError(f"layer {i} of {type(backbone.model).__name__} rotates in a way that is not its "
                                "apply_rotary_pos_emb on whole heads; this family needs an adapter")  # fmt: skip
    return True


def _window(backbone: Backbone, module: nn.Module, call: AttentionCall, i: int) -> int | None:
    if getattr(module, "is_causal", True) is False:
        raise BackboneError(f"layer {i} is not causal; locret runs causal decoders")
    types = getattr(backbone.model.config, "layer_types", None)
    if types:
        if types[i] not in _LAYER_TYPES:
            raise BackboneError(f"layer {i} is of type {types[i]!r}; locret knows {', '.join(sorted(_LAYER_TYPES))}")
        if types[i] == "sliding_attention" and call.window is None:
            raise BackboneError(f"layer {i} is a sliding-window layer but names no window to attention")
    if call.window is not None and call.window >= model_length(backbone.model):
        return None  # Phi-3-128K names a window of 262,144: it never bites, so the layer takes a budget
    return call.window


def model_length(model: PreTrainedModel) -> int:
    """The longest input the model was trained for, in tokens."""
    return int(getattr(model.config, "max_position_embeddings", 0) or sys.maxsize)


def _rope_type(backbone: Backbone, i: int) -> str | None:
    """Families with one rotary table a layer type (Gemma-3) take the type as a third argument."""
    if "layer_type" not in inspect.signature(backbone.rotary.forward).parameters:
        return None
    return backbone.model.config.layer_types[i]


def _call_rotary(real: nn.Module, like: Tensor, positions: Tensor, kinds: list[str | None]) -> None:
    for kind in kinds:
        real(like, positions, *(() if kind is None else (kind,)))


@contextlib.contextmanager
def _fixed_frequencies(real: nn.Module, *, by_prompt: bool) -> Iterator[None]:
    """Read angles without letting the module choose new frequencies from the positions it is shown.

    transformers wraps the forward of "dynamic" and "longrope" modules in a decorator that does; the function inside
    is reachable through functools.wraps.
    """
    wrapped = inspect.unwrap(type(real).forward)
    if not by_prompt or wrapped is type(real).forward:
        yield
        return
    real.forward = lambda *args, **kwargs: wrapped(real, *args, **kwargs)
    try:
        yield
    finally:
        del real.forward


def _device(name: str | torch.device) -> torch.device:
    """Raises: ConfigError: no device that torch knows, or a GPU that it does not see."""
    try:
        where = torch.device(("cuda" if torch.cuda.is_available() else "cpu") if name == "auto" else name)
    except (RuntimeError, TypeError):
        raise ConfigError(f"device {str(name)!r} is not known; use auto, cpu, cuda or cuda:N (cuda:0, cuda:1 ...)"
                          ) from None  # fmt: skip
    if where.type == "cuda" and not torch.cuda.is_available():
        raise ConfigError(f"device {str(name)!r}: this torch ({torch.__version__}) sees no CUDA GPU; use --device cpu")
    if where.type == "cuda" and (where.index or 0) >= torch.cuda.device_count():
        raise ConfigError(f"device {str(name)!r}: this machine's GPUs are cuda:0 to "
                          f"cuda:{torch.cuda.device_count() - 1}; use one of them")  # fmt: skip
    return where


def _load_model(path: str, **options: Any) -> tuple[Any, Mapping[str, Any]]:
    """The model, and what transformers says about its weights. Other shapes are left to `_check_weights`, which can
    name them."""
    options |= {"output_loading_info": True, "ignore_mismatched_sizes": True}
    loaded: Any = AutoModelForCausalLM.from_pretrained(path, **options)
    return loaded


def _check_weights(path: str, model: Any, found: Mapping[str, Any]) -> None:
    """Refuse a model with random weights, or without layers that its file has: transformers only warns of both.

    Raises: BackboneError: tensors are missing, have other shapes, or have no place; what transformers itself ignores
        and what quantisers keep beside their weights is no trouble.
    """
    missing = set(found.get("missing_keys") or ())
    if getattr(model, "hf_quantizer", None) is not None:
        missing = {name for name in missing if name.rpartition(".")[2] in _WEIGHTS}
    shapes = [f"{name} ({list(file)} in the file, {list(ours)} by config.json)"
              for name, file, ours in found.get("mismatched_keys") or ()]  # fmt: skip
    extra = _of_layers(model, found.get("unexpected_keys") or ())
    troubles = [("missing, so they would be random", missing), ("of another shape", shapes),
                ("of layers or biases that config.json does not have", extra)]  # fmt: skip
    said = [f"{len(names)} {trouble}: {_first_names(names)}" for trouble, names in troubles if names]
    if said:
        raise BackboneError(f"the weights in {path!r} are not those of its config.json; tensors {'; '.join(said)}. "
                            "Download or save the folder again, config.json and weights together")  # fmt: skip


def _of_layers(model: nn.Module, names: Iterable[str]) -> list[str]:
    """Which of these tensors the model would have with more layers, or with biases; others belong to other models."""
    ours = {name for name, _ in [*model.named_parameters(), *model.named_buffers()]}
    kinds = {_NUMBER.sub("*", name) for name in ours}
    plain = getattr(model, "hf_quantizer", None) is None  # some quantisers write biases of zeros
    return [name for name in names if _NUMBER.sub("*", name) in kinds
            or (plain and name.endswith(".bias") and name.removesuffix("bias") + "weight" in ours)]  # fmt: skip


def _first_names(names: Iterable[str], count: int = 3) -> str:
    listed = sorted(names)
    return ", ".join(listed[:count]) + (" ..." if len(listed) > count else "")


def _first_line(error: BaseException) -> str:
    text = str(error).strip()
    return text.splitlines()[0] if text else type(error).__name__
