"""The trained model as transformers loads it, and as parts small enough to bring back from a GPU machine."""

from __future__ import annotations

import hashlib
import io
import json
import tarfile
from pathlib import Path

import torch
from lean import LeanLlama
from safetensors.torch import load_file, save_file
from torch import Tensor

from locret.errors import DataError
from locret.files import atomic_write

PART_BYTES = 15 * 2**20


def export(model: LeanLlama, folder: Path) -> None:
    """config.json, generation_config.json and model.safetensors (bf16) as transformers loads them."""
    from transformers import GenerationConfig, LlamaConfig

    folder.mkdir(parents=True, exist_ok=True)
    special = dict(bos_token_id=0, eos_token_id=4, pad_token_id=5)
    config = LlamaConfig(**model.hf_config(), **special, architectures=["LlamaForCausalLM"], dtype="bfloat16")
    config.save_pretrained(folder)
    GenerationConfig(**special, do_sample=False).save_pretrained(folder)
    weights = {name: w.detach().to("cpu", torch.bfloat16).contiguous() for name, w in model.state_dict().items()}
    atomic_write(folder / "model.safetensors", lambda path: save_file(weights, path, metadata={"format": "pt"}))


def exported(folder: Path) -> dict[str, Tensor]:
    """The weights that `export` wrote, fp32."""
    return {name: tensor.float() for name, tensor in load_file(folder / "model.safetensors").items()}


def pack(folder: Path, out: Path) -> None:
    """Write the folder's files as model.tar.00, .01, ... of at most 15 MiB and pack.json with the whole's sha256."""
    out.mkdir(parents=True, exist_ok=True)
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as archive:
        for path in sorted(folder.iterdir()):
            archive.add(path, arcname=path.name)
    data = buffer.getvalue()
    names = []
    for first in range(0, len(data), PART_BYTES):
        names.append(f"model.tar.{len(names):02d}")
        (out / names[-1]).write_bytes(data[first : first + PART_BYTES])
    digest = hashlib.sha256(data).hexdigest()
    (out / "pack.json").write_text(json.dumps({"parts": names, "sha256": digest, "bytes": len(data)}) + "\n")


def unpack(packed: Path, folder: Path) -> None:
    """Join the parts that `pack` wrote, check them and extract the files into `folder`."""
    about = json.loads((packed / "pack.json").read_text())
    data = b"".join((packed / name).read_bytes() for name in about["parts"])
    digest = hashlib.sha256(data).hexdigest()
    if digest != about["sha256"]:
        raise DataError(
            f"{packed}: sha256 of the joined parts is {digest}, pack.json says {about['sha256']}; copy again"
        )
    folder.mkdir(parents=True, exist_ok=True)
    with tarfile.open(fileobj=io.BytesIO(data)) as archive:
        archive.extractall(folder, filter="data")
