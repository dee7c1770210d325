"""Reference rows: they hold what they say under the same budget and pins, and say so where they cannot exist."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import build_byte_tokenizer, build_tiny_model
from eval_samples import fake_score, grid, record, source

from locret.backbone import Backbone
from locret.config import CacheConfig, Sampling
from locret.data import Sample
from locret.engine import LLM
from locret.errors import ConfigError, DataError
from locret.evaluate.oracle import REFERENCES, informed
from locret.evaluate.prompts import Encoder, Prompt
from locret.evaluate.run import run
from locret.evaluate.session import Session
from locret.evaluate.source import ListSource
from locret.evaluate.summary import finish
from locret.methods import list_methods
from locret.train.passes import LabelPass

CONFIG = CacheConfig(budget=64, num_sinks=4, num_stabilizers=8, chunk_size=32)


@pytest.fixture(scope="module")
def backbone() -> Backbone:
    return Backbone(build_tiny_model("llama", dtype=torch.float64), build_byte_tokenizer())


def read(backbone: Backbone, name: str, prompts: list[Prompt]) -> list[list[list[int]]]:
    """Positions kept of the last prompt's context, per layer and KV head."""
    llm = informed(LLM(backbone, REFERENCES[name](), CONFIG), prompts)
    session = Session.compress(llm, [prompt.context for prompt in prompts])
    assert session.units == 64
    return [layer.units().position[-1].tolist() for layer in session._reader.cache.layers]


def prompts(backbone: Backbone, **options: Any) -> list[Prompt]:
    encoder = Encoder(backbone.need_tokenizer())
    return [encoder.prompt(record(i, **options)) for i in (0, 3)]  # equally long


def test_the_gold_facts_and_the_newest_units_are_kept(backbone: Backbone) -> None:
    both = prompts(backbone)
    length = len(both[1].context)
    newest = [at for at in range(length - 1, 3, -1) if at not in both[1].gold]
    expected = sorted([*range(4), *both[1].gold, *newest[: 60 - len(both[1].gold)]])
    assert read(backbone, "oracle_gold", both) == [[expected] * 2] * 2


@pytest.mark.parametrize("turns", [0, 2])
@pytest.mark.parametrize(("name", "label"), [("oracle_cis", "max-logit"), ("oracle_mass", "log-mass")])
def test_the_largest_labels_of_the_right_answers_are_kept(
    backbone: Backbone, name: str, label: str, turns: int
) -> None:
    """As one pass of full attention gives them; of several questions any may ask for a unit."""
    both = prompts(backbone, turns=turns)
    prompt, length = both[1], len(both[1].context)
    labels: dict[int, torch.Tensor] = {}
    label_pass = LabelPass(backbone, [0, 1], label=label, wants_hidden=False, max_length=length)
    assert len(prompt.asks) == turns + 1
    for ask in prompt.asks:
        label_pass(
            Sample([*prompt.context.tolist(), *ask.first], ask.target),
            lambda layer, _, found: labels.update({layer: torch.maximum(found, labels.get(layer, found))}),
        )
    for layer, heads in enumerate(read(backbone, name, both)):
        for head, kept in enumerate(heads):
            ranked = labels[layer][0, head].clone()
            ranked[:4] = float("inf")  # the sinks
            best = ranked.topk(64).indices.tolist()
            pinned = 8  # stabilizers take places while chunks come in, and what they pushed out is gone
            assert len(set(best) - set(kept)) <= pinned
            assert set(range(4)) <= set(kept)


def test_rows_of_a_table_beside_the_methods(backbone: Backbone, tmp_path: Path) -> None:
    """Same bytes, all gold kept; the ceiling of methods that know no question is not theirs. Twice the same."""
    given = grid(methods=["full", "recency", "oracle_gold", "oracle_cis"], budgets=[96], tasks=["key", "turns"])
    found = run(given, backbone, source(), tmp_path)
    cells = finish(tmp_path, given, backbone, source(), found)["cells"]
    by_name = {(c["task"], c["method"]): c for c in cells}
    assert len(by_name) == 8
    recency, *others = (by_name["key", name]["kv_bytes"] for name in ("recency", "oracle_gold", "oracle_cis"))
    assert others == [recency + recency // 96] * 2  # who scores by the token has a unit to spare for a replayed step
    assert by_name["key", "oracle_gold"]["retention"] == 1.0
    assert by_name["key", "recency"]["retention"] < 1.0
    assert [name for name, cell in by_name.items() if "ceiling" in cell] == [("key", "recency")]
    before = (tmp_path / "results.json").read_bytes()
    assert finish(tmp_path, given, backbone, source(), run(given, backbone, source(), tmp_path))["cells"] == cells
    assert (tmp_path / "results.json").read_bytes() == before


def test_query_aware_every_question_has_a_cache_of_its_own(backbone: Backbone, tmp_path: Path) -> None:
    given = grid(methods=["oracle_gold", "oracle_cis"], budgets=[96], tasks=["turns"], samples=1, query_aware=True)
    lines = run(given, backbone, source(), tmp_path).ordered()
    llm = LLM(backbone, REFERENCES["oracle_cis"](), CacheConfig(budget=96))
    [prompt] = [Encoder(backbone.need_tokenizer()).prompt(record(0, "turns", 2))]
    for turn, ask in enumerate(prompt.asks):
        text = np.concatenate((prompt.context, np.array(ask.first, dtype=np.int32)))
        sampling = Sampling(max_new_tokens=4)
        session = Session.read(informed(llm, [prompt], turn), [text], sampling)
        assert lines[1]["turns"][turn]["prediction"] == session.answer(sampling)[0].text


def test_they_are_no_methods_to_use() -> None:
    assert not set(REFERENCES) & {info.name for info in list_methods()}
    with pytest.raises(ConfigError, match="did you mean 'oracle_gold'"):
        grid(methods=["oracle_gould"])
    with pytest.raises(ConfigError, match="is a reference row and has no options"):
        grid(methods=["oracle_cis:window=3"])


def test_rows_that_cannot_exist_are_refused_before_anything_is_computed(
    backbone: Backbone, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Backbone, "run", lambda *args, **kwargs: pytest.fail("computed something"))
    with pytest.raises(ConfigError, match="'oracle_cis' looks at all of it at once, and length 1024 is more than"):
        run(grid(methods=["oracle_cis"], lengths=[1024]), backbone, source(), tmp_path)
    bare = ListSource({"key": [record(0, spans=())]}, fake_score)
    public = grid(methods=["oracle_gold"], tasks=["key"], public={"key": {"path": "x"}})
    with pytest.raises(ConfigError, match="sample 0 of task 'key' does not say where its gold facts lie"):
        run(public, backbone, bare, tmp_path)
    with pytest.raises(DataError, match="says no gold spans"):
        informed(LLM(backbone, REFERENCES["oracle_gold"](), CONFIG), [Encoder(backbone.need_tokenizer()).prompt(
            record(0, spans=()))])  # fmt: skip


def test_lines_say_what_was_kept(backbone: Backbone, tmp_path: Path) -> None:
    run(grid(methods=["oracle_gold"], budgets=[96], samples=2), backbone, source(), tmp_path)
    lines = [json.loads(line) for line in (tmp_path / "journal/000.jsonl").read_text().splitlines()]
    assert all(line["kept"] == [[line["gold"]] * 2] * 2 for line in lines)
