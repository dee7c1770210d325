"""Chunks that are recorded and replayed leave what launched ones leave, and only those are that may be."""

from __future__ import annotations

import pytest
import torch
from conftest import build_tiny_model
from oracles import method_of, reader_of, tokens

from locret import prefill
from locret.backbone import Backbone
from locret.config import CacheConfig
from locret.errors import NumericsError
from locret.prefill import WORTH, Reader
from locret.replay import Race, Replay

SMALL = dict(budget=40, chunk_size=16, num_sinks=2, num_stabilizers=6, local_window=5, decode_interval=4)


@pytest.fixture(scope="module")
def backbone():
    return Backbone(build_tiny_model("llama", max_position_embeddings=4096))


@pytest.fixture
def replayed(monkeypatch):
    """Readers replay on the CPU too, kernel by kernel; the starts of the chunks that did."""
    monkeypatch.setattr(prefill, "can_capture", lambda backbone: True)
    starts, run = [], Replay.run

    def counted(self, ids, start):
        starts.append(start)
        return run(self, ids, start)

    monkeypatch.setattr(Replay, "run", counted)
    return starts


def held(reader):
    return [x for layer in reader.cache.layers for x in layer.units()]


def same(a, b):
    return len(a) == len(b) and all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


@torch.inference_mode()
@pytest.mark.parametrize("batch", [1, 2])
@pytest.mark.parametrize("name", ["locret", "knorm"])
def test_replayed_chunks_leave_the_same_bits(backbone, name, batch, replayed, monkeypatch):
    method, ids = method_of(name, backbone), tokens(300, batch=batch)
    reader = reader_of(backbone, method, 300, batch=batch, **SMALL)
    got = reader.read(ids)
    # 40 units are full after three chunks; the fourth is launched, and the last ends where the local window begins
    assert replayed == list(range(64, 288, 16))
    monkeypatch.setattr(prefill, "can_capture", lambda backbone: False)
    twin = reader_of(backbone, method, 300, batch=batch, **SMALL)
    assert torch.equal(got, twin.read(ids))
    assert same(held(reader), held(twin))
    assert reader.cache.seen == twin.cache.seen == 300
    assert reader.cache.peak_bytes == twin.cache.peak_bytes
    assert torch.equal(reader.step(ids[:, 0]), twin.step(ids[:, 0]))


@torch.inference_mode()
def test_readers_that_take_turns_do_not_disturb_each_other(backbone, replayed):
    texts = [tokens(300, seed=seed) for seed in (1, 2)]
    alone = []
    for text in texts:
        reader = reader_of(backbone, "knorm", 300, **SMALL)
        reader.read(text)
        alone.append(held(reader))
    del replayed[:]
    readers = [reader_of(backbone, "knorm", 300, **SMALL) for _ in texts]
    for _ in zip(*(reader.chunks(text) for reader, text in zip(readers, texts, strict=True)), strict=True):
        pass
    assert len(replayed) == 28
    assert all(same(held(reader), want) for reader, want in zip(readers, alone, strict=True))


@torch.inference_mode()
def test_a_turn_behind_a_full_cache_is_replayed_too(backbone, replayed):
    reader = reader_of(backbone, "knorm", None, **SMALL)
    reader.read(tokens(80), more=True)
    assert not replayed
    reader.read(tokens(300))
    assert replayed == [80 + start for start in range(16, 288, 16)]  # the first is launched: shapes may be new


@torch.inference_mode()
@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("random", {}),  # its scores depend on the position
        ("snapkv", {}),
        ("full", {}),
        ("knorm", {"positions": "original"}),
        ("knorm", {"storage": "int8"}),
        ("knorm", {"length": 16 * (3 + WORTH) + 5}),  # too few chunks are left
        ("knorm", {"protected": True}),
    ],
)
def test_other_chunks_are_launched(backbone, name, options, replayed):
    length = options.pop("length", 300)
    mask = torch.arange(length) == 7 if options.pop("protected", False) else None
    config = CacheConfig(**(SMALL | options))
    reader = Reader.start(backbone, method_of(name, backbone), config, batch=1, prompt_len=length,
                          num_protected=0 if mask is None else 1)  # fmt: skip
    reader.read(tokens(length), protected=mask)
    assert not replayed


@torch.inference_mode()
def test_scores_that_are_nan_in_a_replayed_chunk_are_reported(backbone, replayed):
    method = method_of("locret", backbone)
    reader = reader_of(backbone, method, 300, **SMALL)
    chunks = reader.chunks(tokens(300))
    for _ in range(6):
        next(chunks)
    assert replayed
    method.heads.layers[1].fc2.weight[0, 0] = float("nan")
    with pytest.raises(NumericsError, match="between tokens 96 and 112"):
        for _ in chunks:
            pass


def test_chunks_are_recorded_only_where_the_gpu_waits_for_the_host(monkeypatch):
    """Three times in a row: the first chunk of a shape takes the host longer."""
    done: list[bool] = []

    class Event:
        def record(self, stream):
            pass

        def query(self):
            return done.pop(0)

    gpu = torch.device("cuda")
    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: None)
    race, lost = Race(), []
    done += [True, True, False, True, True, True, False]  # whether the GPU had come to the last layer
    race.launched()  # nothing was marked: a chunk that has no layers of ours
    for _ in range(7):
        race.last_layer(gpu)
        race.launched()
        lost.append(race.lost(gpu))
    assert lost == [False] * 5 + [True, False]
    assert Race().lost(torch.device("cpu"))


def test_the_last_layer_of_every_launched_chunk_is_marked(backbone, replayed, monkeypatch):
    """And never while a chunk is recorded: its events cannot be asked."""
    marks = []
    monkeypatch.setattr(Race, "last_layer", lambda race, device: marks.append("layer"))
    monkeypatch.setattr(Race, "launched", lambda race: marks.append("launched"))
    reader = reader_of(backbone, "knorm", 400, **SMALL)
    with torch.inference_mode():
        reader.read(tokens(400))
    assert replayed
    assert marks == ["layer", "launched"] * (len(reader.edges(400, 5)) - 1 - len(replayed))


@pytest.mark.gpu
@torch.inference_mode()
@pytest.mark.parametrize("name", ["locret", "knorm"])
def test_captured_chunks_leave_the_same_bits(name, monkeypatch):
    """Long chunks, so that cuDNN, the side stream and all kernels take part; twice, so that memory is used again."""
    model = build_tiny_model("llama", head_dim=64, num_hidden_layers=4, max_position_embeddings=65_536)
    backbone = Backbone(model.to("cuda", torch.bfloat16))
    assert backbone.fused is not None
    method, ids = method_of(name, backbone), tokens(45_000).cuda()
    if name == "locret":
        method.heads.to("cuda", torch.bfloat16)
    captured, record = [], Replay._record

    def counted(self):
        captured.append(self)
        record(self)

    monkeypatch.setattr(Replay, "_record", counted)
    monkeypatch.setattr(Race, "lost", lambda race, device: True)
    options = dict(budget=4096, chunk_size=2048, num_stabilizers=64, local_window=64)

    def read():
        reader = reader_of(backbone, method, ids.shape[1], **options)
        return [reader.read(ids), *held(reader)]

    got = [read() for _ in range(3)]
    assert len(captured) == 3
    monkeypatch.setattr(prefill, "WORTH", 10**9)
    want = read()
    assert len(captured) == 3
    assert all(same(mine, want) for mine in got)
