"""The harness's requests against the plain model and our own evaluator; skipped where lm-eval is not installed."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

lm_eval = pytest.importorskip("lm_eval", reason="needs the extra locret[harness]")
pytestmark = pytest.mark.filterwarnings("ignore")  # those of the harness and of what it imports

from conftest import build_byte_tokenizer, build_tiny_model  # noqa: E402
from eval_samples import grid, record, source  # noqa: E402

from locret.backbone import Backbone  # noqa: E402
from locret.config import CacheConfig  # noqa: E402
from locret.engine import LLM  # noqa: E402
from locret.errors import ConfigError  # noqa: E402
from locret.evaluate.lm_harness import LocretLM  # noqa: E402
from locret.evaluate.run import run  # noqa: E402
from locret.methods import get_method  # noqa: E402

TASK = """
task: locret_local
dataset_path: json
dataset_kwargs:
  data_files:
    test: {data}
test_split: test
output_type: generate_until
doc_to_text: "{{{{context}}}}{{{{question}}}}"
doc_to_target: "{{{{answer}}}}"
generation_kwargs:
  until: []
  max_gen_toks: 4
process_results: !function scoring.process
metric_list:
  - metric: fake
    aggregation: mean
    higher_is_better: true
"""
SCORING = """
def process(doc, results):
    return {"fake": float(sum(results[0].encode()) % 101)}
"""


class Request:
    def __init__(self, *args: Any) -> None:
        self.args = args


@pytest.fixture(scope="module")
def backbone() -> Backbone:
    return Backbone(build_tiny_model("llama", dtype=torch.float64), build_byte_tokenizer())


def model(backbone: Backbone, method: str = "recency", **options: Any) -> LocretLM:
    return LocretLM(LLM(backbone, get_method(method), CacheConfig(budget=48)), **options)


def test_a_local_task_scores_as_our_own_evaluator_says(
    backbone: Backbone, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hub"))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    from lm_eval.tasks import TaskManager

    rows = [record(i) for i in range(5)]
    data = tmp_path / "data.jsonl"
    data.write_text("".join(
        json.dumps({"context": r.context, "question": r.question, "answer": r.answers[0]}) + "\n" for r in rows
    ))  # fmt: skip
    (tmp_path / "task.yaml").write_text(TASK.format(data=data))
    (tmp_path / "scoring.py").write_text(SCORING)
    found = lm_eval.simple_evaluate(
        model=model(backbone, batch_size=2), tasks=["locret_local"], apply_chat_template=True, bootstrap_iters=0,
        task_manager=TaskManager(include_path=str(tmp_path), include_defaults=False),
    )  # fmt: skip
    theirs = found["results"]["locret_local"]["fake,none"]
    given = grid(methods=["recency"], samples=5, query_aware=True)
    lines = run(given, backbone, source(), tmp_path / "ours").lines.values()
    assert theirs == pytest.approx(sum(line["score"] for line in lines) / 5)


def test_loglikelihood_over_the_full_cache_is_the_plain_model(backbone: Backbone) -> None:
    lm = model(backbone, "full")
    context, continuation = "The key is", " 4711."
    [(total, greedy)] = lm.loglikelihood([Request(context, continuation)], disable_tqdm=True)
    ids = torch.tensor([lm.tok_encode(context + continuation)])
    with torch.no_grad():
        log_probs = backbone.model(ids).logits[0].log_softmax(-1)
    rows = range(ids.shape[1] - len(continuation) - 1, ids.shape[1] - 1)
    assert total == pytest.approx(sum(log_probs[i, ids[0, i + 1]].item() for i in rows), rel=1e-6)
    assert greedy == all(log_probs[i].argmax() == ids[0, i + 1] for i in rows)


def test_loglikelihood_depends_on_what_was_kept(backbone: Backbone) -> None:
    request = Request(record(0).context, " 4000")
    scores = {m: model(backbone, m).loglikelihood([request], disable_tqdm=True)[0][0] for m in ("full", "recency")}
    assert scores["full"] != scores["recency"]


def test_rolling_likelihood_over_the_full_cache_is_the_plain_model(
    backbone: Backbone, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("locret.evaluate.lm_harness._ROLL", 16)
    text = "There and back again, there and back again."
    [total] = model(backbone, "full").loglikelihood_rolling([Request(text)])
    ids = torch.tensor([[1, *build_byte_tokenizer()(text, add_special_tokens=False).input_ids]])
    with torch.no_grad():
        log_probs = backbone.model(ids).logits[0].log_softmax(-1)
    expected = log_probs[torch.arange(ids.shape[1] - 1), ids[0, 1:]].sum().item()
    assert total == pytest.approx(expected, rel=1e-5)


def test_answers_do_not_depend_on_the_batch(backbone: Backbone) -> None:
    requests = [Request(record(i).context, {"until": ["z"], "max_gen_toks": 5}) for i in range(5)]
    assert model(backbone).generate_until(requests) == model(backbone, batch_size=3).generate_until(requests)


def test_options_that_cannot_be_carried_out_are_refused(backbone: Backbone) -> None:
    with pytest.raises(ConfigError, match="'num_beams'"):
        model(backbone).generate_until([Request("a", {"num_beams": 4})])


def test_the_harness_can_make_one_from_its_flags(tiny_folder: Any) -> None:
    arguments = f"pretrained={tiny_folder('llama')},method=recency,budget=48"
    lm = LocretLM.create_from_arg_string(arguments, {"batch_size": 2, "device": "cpu", "max_batch_size": None})
    assert (lm.llm.config.budget, lm.llm.method.name, lm._batch_size) == (48, "recency", 2)
    assert np.isfinite(lm.loglikelihood([Request("a", "b")], disable_tqdm=True)[0][0])
