"""Files of one small trained module a layer, gates and mergers: they give back what was saved or are refused."""

from __future__ import annotations

import pytest
import torch
from conftest import build_tiny_model
from oracles import write_gates, write_mergers
from safetensors import safe_open
from safetensors.torch import save_file

from locret.backbone import Backbone
from locret.errors import HeadsError
from locret.gate import Gates
from locret.lococo import Mergers

KINDS = {"gates": (Gates, write_gates), "mergers": (Mergers, write_mergers)}


@pytest.fixture(scope="module")
def backbone():
    return Backbone(build_tiny_model("llama"))


@pytest.fixture
def files(tmp_path, backbone):
    """Kind -> a file of that kind for the tiny model."""
    return {kind: write(tmp_path / kind, backbone) for kind, (_, write) in KINDS.items()}


def load(kind, path):
    return KINDS[kind][0].load(path)


@pytest.mark.parametrize("kind", KINDS)
def test_a_file_gives_back_what_was_saved(kind, files, tmp_path, backbone):
    first = load(kind, files[kind])
    assert len(first) == 2
    assert first.backbone == backbone.fingerprint()
    assert not any(p.requires_grad for p in first.parameters())
    first.save(tmp_path / "again")
    again = load(kind, tmp_path / "again")
    assert all(torch.equal(a, b) for a, b in zip(first.parameters(), again.parameters(), strict=True))


def test_mergers_come_back_with_their_slots_and_mix(tmp_path, backbone):
    mergers = Mergers.load(write_mergers(tmp_path / "m", backbone, mix=0.25))
    assert (mergers.slots, mergers[1].mix.item()) == (5, 0.25)


@pytest.mark.parametrize(("kind", "change", "message"), [
    ("gates", lambda t: t.pop("0.out.bias"), r"0.out.bias is missing; wanted \[2\] in a file of 2 layers"),
    ("gates", lambda t: t.update({"1.out.weight": torch.zeros(3, 8)}), r"1.out.weight is \[3, 8\]; wanted \[2, 8\]"),
    ("gates", lambda t: t.update({"0.qkv.weight": torch.zeros(20, 64)}), r"qkv \[20, 64\], out \[2, 8\], 2 heads"),
    ("gates", lambda t: t.update({"0.fc1.weight": torch.zeros(4)}), r"unexpected \['0.fc1.weight'\]; wanted N.qkv"),
    ("gates", lambda t: t["1.out.bias"].fill_(float("nan")), r"1.out.bias holds NaN.*train the gates again"),
    ("mergers", lambda t: t.pop("0.mix"), r"0.mix is missing; wanted \[\] in a file of 2 layers"),
    ("mergers", lambda t: t.update({"1.conv.bias": torch.zeros(4)}), r"1.conv.bias is \[4\]; wanted \[5\]"),
    ("mergers", lambda t: t.update({"0.fc1.weight": torch.zeros(4)}), r"unexpected \['0.fc1.weight'\]"),
    ("mergers", lambda t: t.update({"3.mix": torch.zeros(())}), r"2.conv.bias is missing"),
    ("mergers", lambda t: t["1.mix"].fill_(float("nan")), r"1.mix holds NaN"),
    ("mergers", lambda t: t.update({"0.mix": torch.zeros((), dtype=torch.int64)}), r"0.mix holds NaN, .* whole num"),
    ("mergers", lambda t: t.update({"0.conv.weight": torch.zeros(5, 15, 5)}), r"is \[5, 15, 5\]; wanted \[slots"),
])  # fmt: skip
def test_a_file_with_other_tensors_is_refused(files, kind, change, message):
    with safe_open(files[kind], framework="pt") as opened:
        tensors, about = {name: opened.get_tensor(name) for name in opened.keys()}, opened.metadata()  # noqa: SIM118
    change(tensors)
    save_file(tensors, files[kind], metadata=about)
    with pytest.raises(HeadsError, match=message):
        load(kind, files[kind])


@pytest.mark.parametrize(("kind", "other"), [("gates", "mergers"), ("mergers", "gates")])
def test_files_that_are_something_else_are_refused(files, tmp_path, kind, other):
    with pytest.raises(HeadsError, match="is no file"):
        load(kind, tmp_path / "nowhere")
    save_file({"0.mix": torch.zeros(())}, tmp_path / "bare")
    for path in (files[other], tmp_path / "bare"):
        with pytest.raises(HeadsError, match=f"holds no {kind} of this version"):
            load(kind, path)
    files[kind].write_bytes(files[kind].read_bytes()[:-9])
    with pytest.raises(HeadsError, match="truncated"):
        load(kind, files[kind])
