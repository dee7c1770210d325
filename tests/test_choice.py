"""The choice of a fused prefill kernel: by the table, by the variable, never one that is not here."""

from __future__ import annotations

import dataclasses
import importlib
import itertools
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from test_kernels import TOLERANCE, check, gpu, qkv

from locret.cli import doctor
from locret.errors import ConfigError
from locret.kernels import choice
from locret.kernels.attention import PARTS, reference_attention
from locret.kernels.choice import KERNELS, TABLE, VARIABLE, Measured, by_table, obstacle, prefill_kernel, present

HOPPER, AMPERE, BLACKWELL = (9, 0), (8, 0), (10, 0)
BENCHMARKS = Path(__file__).parent.parent / "benchmarks"


@dataclasses.dataclass
class OnDevice:
    """As much of a query as the choice looks at."""

    rows: int = 3072
    dim: int = 128
    dtype: torch.dtype = torch.bfloat16
    is_cuda = True
    device = torch.device("cuda", 0)

    @property
    def shape(self):
        return 1, 8, self.rows, self.dim


@pytest.fixture(autouse=True)
def nothing_remembered(monkeypatch):
    monkeypatch.delenv(VARIABLE, raising=False)
    choice._by_rows.cache_clear()
    yield
    choice._by_rows.cache_clear()


@pytest.fixture
def card(monkeypatch):
    """A GPU of this compute capability, with cuDNN and with what else is named."""

    def pretend(capability, *installed):
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: capability)
        monkeypatch.setattr(choice, "_has_cudnn", lambda: True)
        packages = {KERNELS[name].package for name in installed}
        module = SimpleNamespace()
        monkeypatch.setattr(choice, "load", lambda package: module if package in packages else "ImportError: none")

    return pretend


def test_hopper_takes_cudnn_for_long_chunks_of_heads_up_to_128_and_flash_otherwise(card):
    card(HOPPER)
    for dim, rows in itertools.product((8, 64, 80, 128, 136, 256), (1, 2, 1023, 1024, 3072, 10**6)):
        want = "cudnn" if dim <= 128 and rows >= 1024 else "flash"
        assert prefill_kernel(OnDevice(rows, dim), rows + 6000) == want, (dim, rows)


@pytest.mark.parametrize("capability", [(7, 5), AMPERE, (8, 6), (8, 9), BLACKWELL, (12, 0), (13, 0)])
def test_a_card_that_was_not_measured_takes_flash(card, capability):
    card(capability, "flash3", "flash4")
    assert by_table(capability, 128) == ((0, "flash"),)


def test_what_no_fused_kernel_takes_goes_its_own_way_whatever_the_variable_says(card, monkeypatch):
    card(HOPPER)
    monkeypatch.setenv(VARIABLE, "no such kernel")
    assert prefill_kernel(torch.zeros(1, 2, 30, 64), 30) == "cpu"
    assert prefill_kernel(OnDevice(dtype=torch.float32), 3072) == "efficient"
    assert prefill_kernel(OnDevice(dim=20), 3072) == "efficient"
    assert prefill_kernel(OnDevice(rows=1), 3072) == "flash"
    assert prefill_kernel(OnDevice(), 1) == "flash"
    check(*qkv(20, 30))


def test_of_an_entry_the_fastest_present_kernel_is_taken(card):
    table = (
        Measured(HOPPER, 64, 512, {"flash": 300.0, "cudnn": 200.0}, "made up"),
        Measured(HOPPER, 128, 2048, {"flash": 300.0, "cudnn": 600.0, "flash3": 700.0}, "made up"),
        Measured(HOPPER, 128, 256, {"flash": 300.0, "cudnn": 400.0, "flash3": 200.0}, "made up"),
        Measured(BLACKWELL, 128, 256, {"flash": 300.0, "flash4": 900.0}, "made up"),
    )
    card(HOPPER, "flash3", "flash4")
    assert by_table(HOPPER, 128, table) == ((2048, "flash3"), (256, "cudnn"), (0, "flash"))
    assert by_table(HOPPER, 96, table) == by_table(HOPPER, 128, table)
    assert by_table(HOPPER, 64, table) == ((0, "flash"),)  # its own entry, not the larger head's
    assert by_table(HOPPER, 256, table) == ((0, "flash"),)
    assert by_table(BLACKWELL, 128, table) == ((256, "flash4"), (0, "flash"))
    assert by_table(BLACKWELL, 80, table) == ((0, "flash"),)  # FlashAttention-4 does not take 80
    card(HOPPER)
    assert by_table(HOPPER, 128, table) == ((256, "cudnn"), (0, "flash"))
    assert by_table(BLACKWELL, 128, table) == ((0, "flash"),)


def test_the_table_names_kernels_that_run_on_its_cards(card):
    for entry in TABLE:
        card(entry.capability, *KERNELS)
        assert all(obstacle(name, entry.capability, entry.dim) is None for name in entry.tflops)
        assert min(entry.tflops.values()) > 0
        assert entry.source


def test_a_package_that_is_absent_or_broken_is_never_present(monkeypatch, tmp_path):
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setattr(choice, "_has_cudnn", lambda: True)
    for name, package in (("flash3", "flash_attn_interface"), ("flash4", "flash_attn.cute.interface")):
        monkeypatch.setitem(sys.modules, package, None)  # as if not installed, also where it is
        choice.load.cache_clear()
        assert name not in present(HOPPER, 128)
        monkeypatch.delitem(sys.modules, package)
    (tmp_path / "flash_attn_interface.py").write_text("raise OSError('libcudart.so.12: cannot open')")
    choice.load.cache_clear()
    assert "libcudart.so.12" in (obstacle("flash3", HOPPER, 128) or "")
    assert present(HOPPER, 256) == ["flash", "efficient"]
    choice.load.cache_clear()


def test_no_package_is_imported_unless_it_was_measured_or_asked_for(card, monkeypatch):
    card(HOPPER)
    monkeypatch.setattr(choice, "load", lambda package: pytest.fail(f"imported {package}"))
    assert prefill_kernel(OnDevice(), 6000) == "cudnn"


@pytest.mark.parametrize("name", KERNELS)
def test_the_variable_names_the_kernel_of_all_chunks(card, monkeypatch, name):
    card(HOPPER, "flash3", "flash4")
    monkeypatch.setenv(VARIABLE, name)
    assert [prefill_kernel(OnDevice(rows), rows + 10) for rows in (2, 100, 1024, 8192)] == [name] * 4


@pytest.mark.parametrize(
    ("value", "capability", "dim", "message"),
    [
        ("cudn", HOPPER, 128, r"unknown LOCRET_ATTENTION 'cudn'; valid: .*did you mean 'cudnn'"),
        ("flash3", HOPPER, 128, r"flash_attn_interface cannot be imported .*runs here: cudnn, flash, efficient"),
        ("flash3", AMPERE, 128, r"it needs compute capability 9.x, and this GPU has 8.0"),
        ("flash4", AMPERE, 128, r"it needs compute capability 9.x or 10.x or 11.x, and this GPU has 8.0"),
        ("flash4", HOPPER, 80, r"it takes head dims 64, 96, 128, and the model has 80"),
        ("cudnn", HOPPER, 256, r"it takes head dims up to 128, and the model has 256.*runs here: flash, efficient"),
        ("cudnn", (7, 5), 128, r"it needs compute capability from 8.0 on, and this GPU has 7.5"),
    ],
)
def test_a_name_that_cannot_be_used_is_an_error_with_the_way_out(card, monkeypatch, value, capability, dim, message):
    card(capability)
    monkeypatch.setenv(VARIABLE, value)
    with pytest.raises(ConfigError, match=message):
        prefill_kernel(OnDevice(dim=dim), 6000)


@pytest.mark.parametrize(
    ("value", "ok", "words"),
    [("", True, "cudnn from 1,024 rows, flash below"), ("flash", True, "128): flash"), ("x", False, "unknown LOCRET")],
)
def test_doctor_says_which_kernel_prefill_takes(card, monkeypatch, value, ok, words):
    card(HOPPER)
    monkeypatch.setenv(VARIABLE, value)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda index: "NVIDIA H200")
    found = doctor._device()
    assert found.ok == ok
    assert words in (found.detail if ok else found.advice)
    assert found.detail.count("NVIDIA H200") == 2


def test_doctor_without_a_gpu_says_nothing_of_kernels(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setenv(VARIABLE, "x")
    found = doctor._device()
    assert found.ok
    assert "attention" not in found.detail


# ---------------------------------------------------------------------- the sweep that the table is made from


@pytest.fixture
def kernels(monkeypatch):
    pytest.importorskip("triton")
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    yield importlib.import_module("kernel_speed")
    for name in ("kernel_speed", "common"):
        sys.modules.pop(name, None)


def timing(kernel, dim, rows, prefix, part, flops, microseconds, right=True):
    return dict(
        kernel=kernel, dim=dim, rows=rows, prefix=prefix, part=part, flops=flops, median_us=microseconds, right=right
    )  # fmt: skip


def test_the_table_is_made_of_both_parts_of_right_kernels_at_the_longest_prefix(kernels):
    rows = [
        timing("flash", 128, 3072, 16_384, "prefix", 8_000_000_000, 20.0),
        timing("flash", 128, 3072, 16_384, "chunk", 2_000_000_000, 20.0),
        timing("flash", 128, 3072, 6000, "prefix", 10**12, 1.0),
        timing("cudnn", 128, 3072, 16_384, "prefix", 8_000_000_000, 1.0),
        timing("cudnn", 128, 3072, 16_384, "chunk", 2_000_000_000, 1.0, right=False),
        dict(kernel="flash4", dim=128, rows=3072, prefix=16_384, part="prefix", right=False, failed="TypeError: x"),
        timing("flex", 128, 3072, 16_384, "prefix", 8_000_000_000, 1.0),
        timing("flash", 64, 1024, 16_384, "prefix", 1_000_000_000, 10.0),
    ]
    assert kernels.prefill_table(rows, HOPPER) == [
        dict(capability=HOPPER, dim=64, rows=1024, tflops={"flash": 100.0}),
        dict(capability=HOPPER, dim=128, rows=3072, tflops={"flash": 250.0}),
    ]
    entries = [Measured(**entry, source="made up") for entry in kernels.prefill_table(rows, HOPPER)]
    assert by_table(HOPPER, 128, entries) == ((0, "flash"),)


def test_operations_of_the_parts_are_those_of_the_whole(kernels):
    pairs = sum(50 + t + 1 for t in range(20))
    parts = kernels.part_flops(4, 20, 50, 16, False) + kernels.part_flops(4, 20, 20, 16, True)
    assert parts == 4 * 4 * 16 * pairs


@pytest.mark.parametrize("causal", [False, True])
def test_the_sweep_knows_a_right_part_from_a_wrong_one(kernels, causal):
    q, k, v = qkv(100, 0)
    right = PARTS["cpu"](q, k, v, 0.3, causal)
    assert kernels.part_error(right, q, k, v, 0.3, causal) < 1e-5
    assert kernels.part_error(right, q, k, v, 0.3, not causal) > 0.1
    assert kernels.part_error(right._replace(lse=right.lse / 0.693), q, k, v, 0.3, causal) > 0.1  # of another base
    assert kernels.part_error(right._replace(out=right.out * float("nan")), q, k, v, 0.3, causal) == float("inf")


def test_the_sweep_runs_without_a_gpu_and_survives_a_kernel_that_does_not(kernels, monkeypatch):
    bench = kernels.Bench(kernels.Shape(tiny=True))
    rows = kernels.prefill_sweep(bench)
    assert [(row["part"], row["right"]) for row in rows] == [("prefix", True), ("chunk", True)]

    def broken(*given):
        raise TypeError("too many values to unpack")

    monkeypatch.setitem(kernels.PARTS, "cpu", broken)
    rows = kernels.prefill_sweep(bench)
    assert [row["failed"] for row in rows] == ["TypeError: too many values to unpack"] * 2
    assert kernels.prefill_table(rows, HOPPER) == []


# ---------------------------------------------------------------------- on a GPU


@gpu
@pytest.mark.parametrize("dim", [64, 80, 128, 256])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_on_cuda_every_present_kernel_equals_the_reference_in_both_parts(dtype, dim):
    for name in present(torch.cuda.get_device_capability(), dim):
        for t, prefix in ((2, 63), (63, 2), (100, 1000), (1024, 1000), (1100, 3001)):
            q, k, v = qkv(t, prefix, dtype=dtype, device="cuda", dim=dim)
            old, own = (k[:, :, :prefix], v[:, :, :prefix]), (k[:, :, prefix:], v[:, :, prefix:])
            hidden = torch.zeros(k.shape[:3], device="cuda")
            hidden[:, :, prefix:] = float("-inf")
            parts = PARTS[name](q, *old, 0.1, False), PARTS[name](q, *own, 0.1, True)
            wanted = reference_attention(q, k, v, scale=0.1, bias=hidden), reference_attention(q, *own, scale=0.1)
            for part, want in zip(parts, wanted, strict=True):
                error = ((part.out.double() - want).abs().max() / want.abs().max()).item()
                assert error < TOLERANCE[dtype], (name, t, prefix, error)
                assert part.lse.dtype == torch.float32
            lse = (q.double() @ old[0].double().repeat_interleave(4, 1).mT * 0.1).logsumexp(-1)
            torch.testing.assert_close(parts[0].lse.double(), lse, rtol=1e-4, atol=1e-3)


@gpu
@pytest.mark.parametrize("name", KERNELS)
def test_on_cuda_the_variable_changes_the_kernel_and_not_the_result(name, monkeypatch):
    if reason := obstacle(name, torch.cuda.get_device_capability(), 128):
        pytest.skip(reason)
    monkeypatch.setenv(VARIABLE, name)
    for t, prefix in ((1, 1), (1, 1000), (2, 1), (63, 0), (1100, 1), (1100, 2000)):
        check(*qkv(t, prefix, dim=128, dtype=torch.bfloat16, device="cuda"))
