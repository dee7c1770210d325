"""Work beside the main stream is joined before anybody reads what it wrote, whatever happens in between."""

from __future__ import annotations

import contextlib
import weakref

import pytest
import torch
from conftest import build_tiny_model
from oracles import method_of, reader_of, tokens

from locret import aside
from locret.aside import Aside
from locret.backbone import Backbone
from locret.cache import LayerCache

GPU = torch.device("cuda", 0)


@pytest.fixture
def launched(monkeypatch):
    """What streams were told, in order, on a machine without any."""
    told = []

    class Stream:
        def __init__(self, name):
            self.name = name

        def wait_stream(self, other):
            told.append(f"{self.name} waits for {other.name}")

    main, side = Stream("main"), Stream("side")

    @contextlib.contextmanager
    def stream(chosen):
        told.append(f"to {chosen.name}")
        yield
        told.append("back")

    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: main)
    monkeypatch.setattr(torch.cuda, "stream", stream)
    monkeypatch.setattr(aside, "_side", lambda device: side)
    return told


def test_work_aside_starts_behind_what_was_launched_and_is_joined_at_the_end(launched):
    with Aside() as work:
        with work.run(GPU):
            launched.append("move")
        launched.append("matrices")
    assert launched == ["side waits for main", "to side", "move", "back", "matrices", "main waits for side"]


def test_a_join_comes_before_what_is_launched_next_and_only_once(launched):
    with Aside() as work:
        with work.run(GPU):
            pass
        del launched[:]
        work.join()
        launched.append("next layer")
    assert launched == ["main waits for side", "next layer"]


def test_an_error_in_between_leaves_nothing_running(launched):
    def fail(inside):
        with Aside() as work:
            with work.run(GPU):
                if inside:
                    raise RuntimeError("broken")
            raise RuntimeError("broken")

    for inside in (True, False):
        del launched[:]
        with pytest.raises(RuntimeError, match="broken"):
            fail(inside)
        assert launched[-1] == "main waits for side"


def test_tensors_are_held_until_the_join(launched):
    class Memory:
        pass

    with Aside() as work:
        held = Memory()
        seen = weakref.ref(held)
        with work.run(GPU, held):
            pass
        del held
        assert seen() is not None
        work.join()
        assert seen() is None


def test_outside_and_on_a_cpu_work_is_in_line(launched):
    with Aside() as work, work.run(torch.device("cpu")):
        launched.append("here")
    with work.run(GPU):
        launched.append("there")
    work.join()
    assert launched == ["here", "there"]


# ---------------------------------------------------------------------- a chunk


def test_a_layers_choice_is_joined_before_its_units_move_and_at_the_end(monkeypatch):
    """Nothing is aside when a pass is over, also if it fails."""
    backbone = Backbone(build_tiny_model("llama"))
    open_, most, moved = [], [], []

    class Counted(Aside):
        @contextlib.contextmanager
        def run(self, device, *needed):
            open_.append(needed)
            most.append(len(open_))
            yield

        def join(self):
            open_.clear()

    def keep(layer, indices):
        moved.append(layer)
        assert not open_
        if len(moved) == fail_at:
            raise RuntimeError("broken")
        return whole(layer, indices)

    whole = LayerCache.keep
    monkeypatch.setattr("locret.prefill.Aside", Counted)
    monkeypatch.setattr(LayerCache, "keep", keep)
    for fail_at in (0, 3):
        with contextlib.nullcontext() if not fail_at else pytest.raises(RuntimeError, match="broken"):
            reader = reader_of(backbone, "knorm", 100, budget=40, chunk_size=16, num_stabilizers=6, local_window=6)
            with torch.inference_mode():
                reader.read(tokens(100))
        assert moved
        assert max(most) == 1
        assert not open_
        del moved[:]


@pytest.mark.gpu
@pytest.mark.parametrize("name", ["locret", "knorm", "random"])
def test_a_prompt_read_with_work_aside_leaves_the_same_bits(name, monkeypatch):
    """Chunks long enough that a choice is still going on when the attention beside it is launched."""
    model = build_tiny_model("llama", head_dim=64, num_hidden_layers=4, max_position_embeddings=32_768)
    backbone = Backbone(model.to("cuda", torch.bfloat16))
    method = method_of(name, backbone)
    if hasattr(method, "heads"):
        method.heads.to("cuda", torch.bfloat16)
    ids = tokens(20_000).cuda()
    options = dict(budget=4096, chunk_size=2048, num_stabilizers=64, local_window=64)

    def read():
        with torch.inference_mode():
            reader = reader_of(backbone, method, ids.shape[1], **options)
            logits = reader.read(ids)
        return [logits, *(x for layer in reader.cache.layers for x in layer.units())]

    want = [read() for _ in range(2)][1]  # twice: compiled
    for _ in range(5):
        assert all(torch.equal(a, b) for a, b in zip(read(), want, strict=True))
    monkeypatch.setattr("locret.aside.Aside.__enter__", lambda self: self)  # never on: everything in line
    assert all(torch.equal(a, b) for a, b in zip(read(), want, strict=True))
