"""What held-out text costs a model, in nats a token: python recipes/embedded/nats.py --text FOLDER

It tells reading from knowing by heart: the corpus is small, and training reads it many times.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from locret.backbone import EMBEDDED
from locret.tasks.filler import CorpusFiller


@torch.inference_mode()
def mean_nats(model: torch.nn.Module, ids: np.ndarray, window: int) -> float:
    """Of all tokens but the first of every window; ids [n], n at least `window`."""
    losses = []
    for start in range(0, len(ids) - window + 1, window):
        row = torch.from_numpy(ids[start : start + window].astype(np.int64))[None]
        logits = model(input_ids=row).logits[0, :-1].float()
        losses.append(torch.nn.functional.cross_entropy(logits, row[0, 1:]).item())
    return sum(losses) / len(losses)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", 1)[0])
    parser.add_argument("--text", type=Path, required=True, help="folder with the corpus")
    parser.add_argument("--cache", type=Path, default=Path("runs/tokens"))
    parser.add_argument("--model", type=Path, default=EMBEDDED)
    parser.add_argument("--window", type=int, default=4096)
    parser.add_argument("--tokens", type=int, default=65536, help="of a stretch")
    parser.add_argument("--stretches", type=int, default=2)
    args = parser.parse_args()
    tokenizer = AutoTokenizer.from_pretrained(args.model)
    heldout = CorpusFiller.from_folder(args.text, tokenizer, split="heldout", cache=args.cache)
    model = AutoModelForCausalLM.from_pretrained(args.model, dtype=torch.float32).eval()
    for place in range(args.stretches):
        ids = np.asarray(heldout.ids[place * args.tokens : (place + 1) * args.tokens])
        print(f"tokens {place * args.tokens:,} on: {mean_nats(model, ids, args.window):.2f} nats a token", flush=True)


if __name__ == "__main__":
    main()
