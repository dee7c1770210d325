"""One model on two processes: tensor parallelism and FSDP2 give the tokens, heads and losses of one process."""

from __future__ import annotations

import importlib.util
import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import build_byte_tokenizer, build_tiny_model
from test_train import make_samples, run_of

from locret.backbone import Backbone
from locret.cli.loading import load_backbone
from locret.config import CacheConfig
from locret.engine import LLM
from locret.errors import ConfigError
from locret.heads import HeadsConfig, RetainingHeads
from locret.parallel import Shard, shard_weights
from locret.train import LOG_FILE, TrainConfig, train
from locret.train import run as run_module

WIDE = dict(hidden_size=32, num_attention_heads=8, num_key_value_heads=4, head_dim=8)
CONFIG = dict(
    steps=6, hidden_size=16, accumulate=2, eval_samples=3, eval_every=3, log_every=2, checkpoint_every=3,
    objective="ranking",
)  # fmt: skip
BUDGET = CacheConfig(budget=24, chunk_size=16, num_stabilizers=4, local_window=4, decode_interval=2)

CHILD = """
import hashlib, json, sys
sys.path.insert(0, {tests!r})
import torch
from test_parallel import *
from locret.fused import recognise
torch.set_num_threads(1)
folder = Path({folder!r})
for how in {ways!r}:
    backbone = split(how, folder)
    found = dict(share=backbone.shard.size, heads=[backbone.num_q_heads, backbone.num_kv_heads])
    found["least"] = backbone.shard.least(5 + backbone.shard.rank, backbone.device)
    if how != "fsdp":
        found["tokens"] = answers(backbone, folder)
        backbone.fused = recognise(backbone)  # as on a GPU
        found["fused"] = backbone.fused is not None
        found["tokens"] += answers(backbone, folder)
    result = train(backbone, make_samples(8), folder / how, TrainConfig(**CONFIG))
    weights = b"".join(p.detach().numpy().tobytes() for p in result.heads.parameters())
    found |= dict(digest=hashlib.sha256(weights).hexdigest(), loss=result.loss, overlap=result.overlap_per_head)
    print("FOUND " + json.dumps(found), flush=True)
"""


def whole() -> Backbone:
    return Backbone(build_tiny_model("llama", **WIDE), build_byte_tokenizer())


def split(how: str, folder: Path) -> Backbone:
    """The same model on this process and another."""
    if how in ("tensor", "fsdp"):
        return load_backbone({"model": folder / "model", "device": "cpu", "parallel": how})
    backbone = whole()
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

    from locret.parallel import join

    assert join()
    plan = {f"layers.*.{name}": ColwiseParallel() for name in
            ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "mlp.gate_proj", "mlp.up_proj")}  # fmt: skip
    plan |= {f"layers.*.{name}": RowwiseParallel() for name in ("self_attn.o_proj", "mlp.down_proj")}
    parallelize_module(backbone.model.model, init_device_mesh("cpu", (2,)), plan)
    return Backbone(backbone.model, backbone.tokenizer)


def answers(backbone: Backbone, folder: Path) -> list[list[int]]:
    """Greedy tokens from a small cache, with heads that read q, k, v and with heads that read hidden states."""
    prompts = [[7 + (3 * i * i + j) % 200 for i in range(70)] for j in (0, 11)]
    found = []
    for name in ("qkv", "hidden"):
        llm = LLM.build(backbone, heads=folder / name, config=BUDGET)
        found += [output.tokens for output in llm.generate(prompts, max_new_tokens=8)]
    return found


@pytest.fixture(scope="module")
def one(tmp_path_factory):
    """What one process makes of it."""
    folder = tmp_path_factory.mktemp("one")
    backbone = whole()
    backbone.model.save_pretrained(folder / "model")
    backbone.tokenizer.save_pretrained(folder / "model")
    for seed, name in enumerate(("qkv", "hidden")):
        config = HeadsConfig.of(backbone, hidden_size=16, input=name)
        RetainingHeads(config, generator=torch.Generator().manual_seed(seed)).save_pretrained(folder / name)
    result = train(backbone, make_samples(8), folder / "out", TrainConfig(**CONFIG))
    return folder, answers(backbone, folder), result


def run(ways: list[str], folder: Path) -> dict[str, list[dict]]:
    """What both processes found, by way; `torchrun`'s environment without torchrun."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    program = CHILD.format(tests=str(Path(__file__).parent), ways=ways, folder=str(folder))
    env = {**os.environ, "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    children = [
        subprocess.Popen([sys.executable, "-c", program], env={**env, "RANK": rank, "LOCAL_RANK": rank}, text=True,
                         stdout=subprocess.PIPE, stderr=subprocess.PIPE)
        for rank in "01"
    ]  # fmt: skip
    ranks = []
    try:
        for child in children:
            out, err = child.communicate(timeout=150)
            assert child.returncode == 0, err
            ranks.append([json.loads(line[6:]) for line in out.splitlines() if line.startswith("FOUND ")])
    finally:
        for child in children:
            child.kill()
            child.communicate()
    return {way: [rank[number] for rank in ranks] for number, way in enumerate(ways)}


@pytest.fixture(scope="module")
def two(one):
    """What two processes make of it, by way."""
    ways = ["torch", "fsdp"] + ["tensor"] * (importlib.util.find_spec("accelerate") is not None)
    return run(ways, one[0])


def check_training(folder: Path, ranks: list[dict], alone) -> None:
    assert ranks[0]["digest"] == ranks[1]["digest"]
    assert ranks[0]["loss"] == pytest.approx(alone.loss, rel=1e-4)
    torch.testing.assert_close(torch.tensor(ranks[0]["overlap"]), torch.tensor(alone.overlap_per_head))
    ours = RetainingHeads.from_pretrained(folder)
    for a, b in zip(ours.parameters(), alone.heads.parameters(), strict=True):
        assert (a - b).abs().max() < 1e-4  # sums in another order; Adam magnifies that up to the learning rate, 5e-4
    losses = [json.loads(line).get("loss") for line in (folder / LOG_FILE).read_text().splitlines()]
    theirs = [json.loads(line).get("loss") for line in (alone.output / LOG_FILE).read_text().splitlines()]
    assert losses == [None if x is None else pytest.approx(x, rel=1e-4) for x in theirs]


@pytest.mark.parametrize("how", ["torch", "tensor"])
def test_tensor_parallel_gives_the_tokens_and_the_heads_of_one_process(how, one, two):
    """Each process has half of the heads of every layer; both end with whole heads, equal bit for bit."""
    if how not in two:
        pytest.skip("transformers' tp_plan needs accelerate")
    folder, tokens, alone = one
    ranks = two[how]
    assert [rank["share"] for rank in ranks] == [2, 2]
    assert [rank["heads"] for rank in ranks] == [[4, 2], [4, 2]]
    assert [rank["fused"] for rank in ranks] == [True, True]
    assert [rank["least"] for rank in ranks] == [5, 5]
    assert [rank["tokens"] for rank in ranks] == [tokens * 2, tokens * 2]
    check_training(folder / how, ranks, alone)


def test_a_backbone_in_shares_trains_the_heads_of_one_process(one, two):
    """FSDP2: weights are gathered layer by layer, each process reads its own samples, an odd one out held-out one."""
    folder, _, alone = one
    assert [rank["share"] for rank in two["fsdp"]] == [1, 1]
    check_training(folder / "fsdp", two["fsdp"], alone)


def test_shares_of_a_backbone_need_equally_many_samples_on_all(monkeypatch, tmp_path):
    monkeypatch.setattr(run_module, "gathers_weights", lambda model: True)
    monkeypatch.setattr(run_module.Group, "current", classmethod(lambda cls, share: cls(0, 2)))
    with pytest.raises(ConfigError, match="2 processes each need as many samples a step as the others; set accumulate"):
        run_of(whole(), make_samples(8), tmp_path, accumulate=3)
    with pytest.raises(ConfigError, match="leave pack_tokens out"):
        run_of(whole(), make_samples(8), tmp_path, accumulate=4, pack_tokens=100)


def test_shares_of_a_backbone_have_no_cache(monkeypatch, tmp_path):
    monkeypatch.setattr(run_module, "gathers_weights", lambda model: True)
    with pytest.raises(ConfigError, match="lie in shares on all processes"):
        run_of(whole(), make_samples(8), tmp_path, evict_budget=20)


def test_parallel_options_without_processes_are_errors():
    with pytest.raises(ConfigError, match="torchrun"):
        Backbone.load(options={"tp_plan": "auto"}, device="cpu")
    with pytest.raises(ConfigError, match="torchrun"):
        shard_weights(whole().model, [])
    with pytest.raises(ConfigError, match="splits plain weights; leave out --quantize"):
        load_backbone({"parallel": "tensor", "device_map": "auto"})


def test_heads_that_are_no_equal_share_are_refused(monkeypatch):
    monkeypatch.setattr("locret.parallel.joined", lambda: True)
    monkeypatch.setattr("torch.distributed.get_world_size", lambda: 3)
    monkeypatch.setattr("torch.distributed.get_rank", lambda: 1)
    config = build_tiny_model("llama", **WIDE).config
    assert Shard.of(config, 8, 4) == Shard()
    with pytest.raises(ConfigError, match="4 of 8 query heads and 2 of 4 KV heads, but there are 3 processes"):
        Shard.of(config, 4, 2)
