"""What held-out text costs a model, in nats a token: python recipes/embedded/nats.py --text FOLDER

It tells reading from knowing by heart: the corpus is small, and training reads it many times.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
import torch
from export import exported
from lean import LeanLlama, ModelConfig
from transformers import AutoTokenizer
from validate import text_loss

from locret.backbone import EMBEDDED
from locret.tasks.filler import CorpusFiller


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", 1)[0])
    parser.add_argument("--text", type=Path, required=True, help="folder with the corpus")
    parser.add_argument("--cache", type=Path, default=Path("runs/tokens"))
    parser.add_argument("--model", type=Path, default=EMBEDDED, help="folder of an exported model")
    parser.add_argument("--window", type=int, default=4096)
    parser.add_argument("--tokens", type=int, default=65536, help="of a stretch")
    parser.add_argument("--stretches", type=int, default=2)
    args = parser.parse_args()
    tokenizer = AutoTokenizer.from_pretrained(args.model)
    heldout = CorpusFiller.from_folder(args.text, tokenizer, split="heldout", cache=args.cache)
    model = LeanLlama(ModelConfig(), dtype=torch.float32, attention="flash")
    model.load_state_dict(exported(args.model))
    for start in range(0, args.stretches * args.tokens, args.tokens):
        loss = text_loss(model, np.asarray(heldout.ids[start : start + args.tokens]), args.window, torch.device("cpu"))
        print(f"tokens {start:,} on: {loss:.2f} nats a token", flush=True)


if __name__ == "__main__":
    main()
