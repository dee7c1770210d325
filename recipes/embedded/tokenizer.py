"""Train the embedded model's tokenizer: byte-level BPE, 8,192 tokens, split so that retrieval is easy to learn.

    python recipes/embedded/tokenizer.py --text FOLDER [--out src/locret/models/embedded] [--sample-mb 30]

Three rules come before GPT-2's own splitting, so that the same value is the same tokens wherever it stands:
- every newline is one token: text may be tokenised line by line and joined;
- every digit is one token;
- in a hexadecimal word with a digit in it (`3fab2c`, a group of a uuid) every letter is one token. A uuid is then
  always 36 tokens. Words of other letters (`file2`, `2nd`) are left to BPE, and so is `face`.
"""

from __future__ import annotations

import argparse
import json
import lzma
from collections.abc import Iterator
from pathlib import Path

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, trainers

VOCAB_SIZE = 8192
SPECIALS = ("<|bos|>", "<|user|>", "<|assistant|>", "<|system|>", "<|end|>", "<|pad|>")  # ids 0..5

CHAT_TEMPLATE = """\
{{- bos_token }}
{%- for message in messages %}
    {%- if message['role'] == 'assistant' %}
        {{- '<|assistant|> ' + (message['content'] | trim) + '<|end|>' }}
    {%- elif message['role'] == 'user' or message['role'] == 'system' %}
        {{- '<|' + message['role'] + '|>' + message['content'] + '<|end|>' }}
    {%- else %}
        {{- raise_exception('unknown role ' + message['role'] + '; valid: system, user, assistant') }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|assistant|>' }}
{%- endif %}
"""


def hex_letter() -> str:
    """A pattern for one letter of a hexadecimal word that holds a digit (Oniguruma; look-behinds of one length)."""
    longest = 12  # the last group of a uuid
    foreign = "|".join(f"[g-zA-Z][0-9a-f]{{{n}}}" for n in range(longest))
    digit_before = "|".join(f"[0-9][a-f]{{{n}}}" for n in range(longest))
    in_a_hex_word = f"(?=[0-9a-f]*(?![0-9a-zA-Z]))(?<!{foreign})"
    beside_a_digit = f"(?:(?<={digit_before})|(?=[a-f]*[0-9]))"
    first = [f"(?<![0-9a-zA-Z][a-f]{{{n}}})(?<=[a-f]{{{n}}})(?=[a-f]{{{8 - n}}}-[0-9a-f]{{4}}-)" for n in range(8)]
    inner = [f"(?<=-[a-f]{{{n}}})(?=[a-f]{{{4 - n}}}-)" for n in range(4)]
    lettered_group = "|".join(first + inner)  # a group of a uuid may hold no digit: edeeefbd-673c-..., ...-dead-...
    return f"(?:{in_a_hex_word}{beside_a_digit}|{lettered_group})[a-f]"


def build() -> Tokenizer:
    """The untrained tokenizer: byte-level BPE behind the three rules."""
    tokenizer = Tokenizer(models.BPE(byte_fallback=False))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split("\n", "isolated"),
            pre_tokenizers.Split(Regex(hex_letter()), "isolated"),
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


def train(texts: Iterator[str]) -> Tokenizer:
    """Learn the merges from `texts`; nothing is added around encoded text (the chat template writes `<|bos|>`)."""
    tokenizer = build()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB_SIZE,
        special_tokens=[AddedToken(token, special=True, normalized=False) for token in SPECIALS],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    if tokenizer.get_vocab_size() != VOCAB_SIZE:
        raise SystemExit(f"the text gave {tokenizer.get_vocab_size()} tokens, not {VOCAB_SIZE}; use more text")
    return tokenizer


def save(tokenizer: Tokenizer, folder: Path) -> None:
    """Write tokenizer.json, tokenizer_config.json and chat_template.jinja as transformers >= 5.4 reads them."""
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(folder / "tokenizer.json"), pretty=False)
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": "<|bos|>",
        "eos_token": "<|end|>",
        "pad_token": "<|pad|>",
        "extra_special_tokens": ["<|user|>", "<|assistant|>", "<|system|>"],
        "clean_up_tokenization_spaces": False,
        "padding_side": "left",
        "model_input_names": ["input_ids", "attention_mask"],
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(config, indent=2) + "\n")
    (folder / "chat_template.jinja").write_text(CHAT_TEMPLATE)


def read_sample(folder: Path, num_bytes: int) -> Iterator[str]:
    """Documents of the folder's *.jsonl.xz (already shuffled), up to `num_bytes` of text."""
    for path in sorted(folder.glob("*.jsonl.xz")):
        with lzma.open(path, "rt", encoding="utf-8") as lines:
            for line in lines:
                text = json.loads(line)["text"]
                yield text
                num_bytes -= len(text.encode())
                if num_bytes <= 0:
                    return


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--text", type=Path, required=True, help="folder with *.jsonl.xz")
    parser.add_argument("--out", type=Path, default=Path("src/locret/models/embedded"))
    parser.add_argument("--sample-mb", type=float, default=30)
    args = parser.parse_args()
    save(train(read_sample(args.text, int(args.sample_mb * 1e6))), args.out)
    print(f"wrote {args.out}/tokenizer.json")


if __name__ == "__main__":
    main()
