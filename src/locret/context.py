"""A compressed context: a text read once into the budget, asked again and again, continued, forked, saved.

Shapes: L layers, Hkv KV heads, S kept units, D head dim.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from locret import chat
from locret.config import CachePlan, Sampling
from locret.decode import Decoder, Output, Stream
from locret.errors import ConfigError, ContextError
from locret.files import atomic_write
from locret.parallel import local_part
from locret.prefill import Progress, Reader

if TYPE_CHECKING:
    from locret.engine import LLM

_FORMAT = "locret-context-3"


class Context:
    """Use `LLM.compress`, `LLM.open` or `Context.load` to get one.

    Attributes:
        llm: the model that read it.
        ids: every token read so far, int32 on the CPU (4 bytes a token; kept for `inspect` and repetition penalties).
    """

    def __init__(self, llm: LLM, reader: Reader, *, lead: str, ids: list[int] | None = None) -> None:
        self.llm = llm
        self._reader = reader
        self._lead = lead  # what the template puts before the next user text ...
        self._open = False  # ... unless the user's turn has text already
        self._pending: list[int] = []  # chosen by the model, not read yet
        self._torn = False  # reading ended in the middle: layers may hold different units
        self._ids: list[Tensor] = [] if ids is None else [torch.tensor(ids, dtype=torch.int32)]

    @classmethod
    def open(cls, llm: LLM) -> Context:
        """Nothing read yet, no end known."""
        turns = _turns(llm)
        with torch.inference_mode():
            reader = Reader.start(llm.backbone, llm.method, llm.config, batch=1, prompt_len=None)
        return cls(llm, reader, lead=turns.begin if turns else "")

    @classmethod
    def compress(
        cls, llm: LLM, document: str | list[dict[str, Any]] | list[int], *, protect: Sequence[str] = (),
        on_progress: Progress | None = None,
    ) -> Context:  # fmt: skip
        """See `LLM.compress`."""
        ids, mask = encode_document(llm, document, protect)
        if not ids:
            raise ConfigError("the document has no tokens; give some text")
        with torch.inference_mode():
            reader = Reader.start(
                llm.backbone, llm.method, llm.config, batch=1, prompt_len=len(ids),
                num_protected=0 if mask is None else int(mask.sum()),
            )  # fmt: skip
            context = cls(llm, reader, lead="")
            context._read(ids, local_window=0, protected=mask, on_progress=on_progress)
            context._open = isinstance(document, str)
        return context

    @property
    def ids(self) -> Tensor:
        return torch.cat(self._ids) if self._ids else torch.empty(0, dtype=torch.int32)

    @property
    def kv_bytes(self) -> int:
        """Bytes of the slabs, metadata included."""
        return self._reader.cache.nbytes

    @property
    def peak_kv_bytes(self) -> int:
        """Most bytes that slabs, workspace and one layer's rotated keys have taken."""
        return self._reader.cache.peak_bytes

    @property
    def plan(self) -> CachePlan:
        """The options, with every number known."""
        return self._reader.plan

    @property
    def held(self) -> int:
        """Units held per layer and KV head; never more than the budget."""
        return self._reader.cache.held

    @property
    def seen(self) -> int:
        """Tokens read."""
        return self._reader.cache.seen

    def ask(self, question: str | list[int], *, sampling: Sampling | None = None, **options: Any) -> Output:
        """Answer a question; the context stays as it is, so questions do not see each other."""
        return self.fork().chat(question, sampling=sampling, **options)

    def stream(self, question: str | list[int], *, sampling: Sampling | None = None, **options: Any) -> Stream:
        """`ask`, piece by piece."""
        return self.fork().reply(question, sampling=sampling, **options)

    def chat(self, message: str | list[int], *, sampling: Sampling | None = None, **options: Any) -> Output:
        """A turn that stays: the message and the answer become part of the context, within the budget."""
        stream = self.reply(message, sampling=sampling, **options)
        for _ in stream:
            pass
        return stream.output

    def reply(self, message: str | list[int], *, sampling: Sampling | None = None, **options: Any) -> Stream:
        """`chat`, piece by piece. Leaving the iterator early keeps what was generated."""
        chosen = Sampling.of(sampling, options)
        turns = _turns(self.llm)
        ids = self._encode(message, chat.JOIN, turns.end if turns else "")

        def prefill() -> Tensor:
            return self._read(ids, local_window=len(ids) if self._can_pin(len(ids)) else None)

        def finished(decoder: Decoder) -> None:
            if decoder.failed:
                self._torn = True
                return
            output = decoder.outputs()[0]
            read = output.tokens if decoder.pending[0] is None else output.tokens[:-1]
            self._ids.append(torch.tensor(read, dtype=torch.int32))
            self._pending = [] if decoder.pending[0] is None else [decoder.pending[0]]
            self._lead, self._open = turns.again if turns else "", False

        device = self.llm.backbone.device
        history = torch.cat((self.ids.to(device), torch.tensor(ids, device=device)))[None]
        strip = turns is not None and turns.templated
        return Stream(Decoder(self._reader, prefill, history, chosen, strip_start=strip), finished)

    def append(self, text: str | list[int], *, on_progress: Progress | None = None) -> None:
        """Read more text behind what is there, as it is; for input without end. The newest units stay pinned."""
        ids = self._encode(text, "", "")
        if not ids:
            raise ConfigError("there is nothing to append; give some text")
        with torch.inference_mode():
            self._read(ids, local_window=0, more=True, on_progress=on_progress)
        self._open = True

    def fork(self) -> Context:
        """An independent copy: what happens to one does not happen to the other."""
        self._check_whole()
        twin = Context(self.llm, self._reader.copy(), lead=self._lead)
        twin._pending, twin._ids, twin._open = list(self._pending), list(self._ids), self._open
        return twin

    def kept(self) -> list[Tensor]:
        """Original positions of the kept units, one int64 [Hkv, S] a layer, ascending.

        Where KV heads keep different numbers, shorter ones begin with -1.
        """
        return [layer.positions()[0].cpu() for layer in self._reader.cache.layers]

    def save(self, path: str | Path) -> None:
        """Write it to one safetensors file; an old file there stays whole until the new one is complete.

        Raises: ContextError: it cannot be written.
        """
        self._check_whole()
        tensors = {"ids": self.ids}
        for i, layer in enumerate(self._reader.cache.layers):
            for name, tensor in layer.tensors().items():
                tensors[f"{i}.{name}"] = tensor.contiguous()
        state = {
            "format": _FORMAT,
            "fingerprint": self.llm.backbone.fingerprint(),
            "model": model_digest(self.llm),
            "dtype": str(self.llm.backbone.dtype),
            "method": self.llm.method.name,
            "options": self.llm.method.describe(),
            "plan": dataclasses.asdict(self.plan),
            "seen": self.seen,
            "rope_length": self._reader.rope.prompt_len,
            "num_protected": self._reader.num_protected,
            "evicted": [layer.evicted for layer in self._reader.cache.layers],
            "lead": self._lead,
            "open": self._open,
            "pending": self._pending,
        }
        state["sha256"] = _digest(tensors, state)
        try:
            atomic_write(path, lambda file: save_file(tensors, file, metadata={"locret": json.dumps(state)}))
        except (OSError, ValueError, SafetensorError) as error:  # safetensors wraps a full disk in its own class
            why = getattr(error, "strerror", None) or error
            raise ContextError(f"{path} cannot be written ({why}); name another file, or look at the permissions and "
                               "the free space. A file that was there before is untouched") from error  # fmt: skip

    @classmethod
    def load(cls, path: str | Path, llm: LLM) -> Context:
        """Read a saved context for the model that made it.

        Raises: ContextError: missing, truncated or foreign file; another model, other heads, another dtype, another
            method or other options of it.
        """
        state, tensors = _read_file(Path(path))
        _check_same(path, state, llm)
        plan = CachePlan(**state["plan"])
        with torch.inference_mode():
            reader = Reader.resume(
                llm.backbone, llm.method, plan, seen=state["seen"], num_protected=state["num_protected"],
                rope_length=state["rope_length"],
            )  # fmt: skip
            for i, layer in enumerate(reader.cache.layers):
                try:
                    own = {name.split(".", 1)[1]: t for name, t in tensors.items() if name.startswith(f"{i}.")}
                    layer.restore(own, evicted=state["evicted"][i])
                except (KeyError, RuntimeError, IndexError) as error:
                    raise ContextError(f"{path}: layer {i} is missing or has other shapes than this model") from error
        context = cls(llm, reader, lead=state["lead"])
        context._pending, context._ids, context._open = list(state["pending"]), [tensors["ids"].clone()], state["open"]
        return context

    def _can_pin(self, count: int) -> bool:
        """Whether a question may stay whole, as what the answer looks at: it fits and is not long for this budget."""
        plan = self.plan
        if plan.budget is None:
            return True
        return count <= plan.budget // 4 and plan.num_sinks + self._reader.num_protected + count <= plan.budget

    def _encode(self, text: str | list[int], join: str, end: str) -> list[int]:
        """Ids of the next user text: what is pending, the template's texts around it, and the text.

        `join` stands between it and text that is already in the same turn.
        """
        self._check_whole()
        if isinstance(text, list):
            return [*self._pending, *chat.token_ids(text, self.llm.backbone.vocab_size)]
        if not isinstance(text, str):
            raise ConfigError(f"a text is a string or a list of token ids, not {text!r}")
        tokenizer = self.llm.backbone.need_tokenizer()
        if not text.strip():
            raise ConfigError("the text is empty; give some words")
        lead = join if self._open else self._lead
        return [*self._pending, *chat.encode(tokenizer, lead + text + end)]

    def _check_whole(self) -> None:
        if self._torn:
            raise ContextError("reading into this context was interrupted, so its layers may hold different units; "
                               "load or compress it again, or go on with a fork from before")  # fmt: skip

    def _read(self, ids: list[int], **options: Any) -> Tensor:
        if not ids:
            raise ConfigError("the text has no tokens; give some words")
        self._torn = True
        logits = self._reader.read(torch.tensor([ids]), **options)
        self._torn = False
        self._ids.append(torch.tensor(ids, dtype=torch.int32))
        self._pending = []
        return logits


def model_digest(llm: LLM) -> str:
    """A short hash of the weights of the model and of the heads, under tensor parallelism of this process's part."""
    heads, shard = getattr(llm.method, "heads", None), llm.backbone.shard
    weights = weights_digest([*llm.backbone.model.parameters(), *(() if heads is None else heads.parameters())])
    return weights if shard.size == 1 else f"{weights}-{shard.rank}-of-{shard.size}"


def weights_digest(parameters: Iterable[Tensor]) -> str:
    """A short hash of the sum of each one's bits, as integers: of all numbers, and the same on every device."""
    digest = hashlib.sha256()
    for parameter in parameters:
        part = local_part(parameter)
        flat = (parameter if part is None else part).detach().contiguous().flatten()
        bits = flat.view(_INTEGERS[flat.element_size()])
        sample = flat[:: max(1, len(flat) // 64)].to(device="cpu", dtype=torch.bfloat16)
        digest.update(int(bits.sum(dtype=torch.int64)).to_bytes(8, "little", signed=True))
        digest.update(sample.view(torch.int16).numpy().tobytes())
    return digest.hexdigest()[:16]


_INTEGERS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}  # by bytes


def _turns(llm: LLM) -> chat.Turns | None:
    return None if llm.backbone.tokenizer is None else chat.Turns.of(llm.backbone.tokenizer)


def encode_document(
    llm: LLM, document: str | list[dict[str, Any]] | list[int], protect: Sequence[str]
) -> tuple[list[int], Tensor | None]:
    """Ids of a document as `Context.compress` reads it, and its protected mask."""
    if not isinstance(document, str | list):
        raise ConfigError(f"a document is text, messages or token ids, not {document!r}")
    if document and not isinstance(document, str) and not isinstance(document[0], dict):
        if protect:
            raise ConfigError("protect names pieces of text; a document of token ids has none")
        return chat.token_ids(document, llm.backbone.vocab_size), None
    tokenizer = llm.backbone.need_tokenizer()
    if isinstance(document, str):
        if not document.strip():
            raise ConfigError("the document is empty; give some text")
        text = chat.Turns.of(tokenizer).begin + document
    else:
        text = chat.before_next_user_turn(tokenizer, cast(list[dict[str, Any]], document))
    return chat.encode(tokenizer, text), chat.protected_mask(tokenizer, text, protect)


def _read_file(path: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    if not path.is_file():
        raise ContextError(
            f"no context file at {path}; make one with `locret compress --file DOCUMENT --output {path}`"
        )
    try:
        with safe_open(path, framework="pt") as file:
            state = json.loads((file.metadata() or {}).get("locret", "null"))
            if not isinstance(state, dict) or state.get("format") != _FORMAT:
                raise ContextError(f"{path} is a safetensors file but not a saved context of this version ({_FORMAT})")
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (SafetensorError, OSError, ValueError) as error:
        raise ContextError(f"{path} is broken or truncated ({error}); save the context again") from error
    if "ids" not in tensors or state.pop("sha256", None) != _digest(tensors, state):
        raise ContextError(f"{path} is damaged: its contents do not match their checksum; save the context again")
    return state, tensors


def _digest(tensors: dict[str, Tensor], state: dict[str, Any]) -> str:
    """sha256 over the state and all names and bytes."""
    digest = hashlib.sha256(json.dumps(state, sort_keys=True).encode())
    for name in sorted(tensors):
        digest.update(name.encode())
        digest.update(tensors[name].detach().cpu().contiguous().view(torch.uint8).numpy().data)
    return digest.hexdigest()


def _check_same(path: str | Path, state: dict[str, Any], llm: LLM) -> None:
    mine = {
        "dtype": str(llm.backbone.dtype), "fingerprint": llm.backbone.fingerprint(), "method": llm.method.name,
        "options": llm.method.describe(), "model": model_digest(llm),
    }  # fmt: skip
    words = {"model": "another model or other heads", "options": "other options of the method"}
    for name, value in mine.items():
        if state[name] != value:
            other = words.get(name, f"another {name}")
            raise ContextError(f"{path} was made with {other}: {state[name]}, now {value}; load the one that made it, "
                               "or compress again")  # fmt: skip
