"""The kernel for codes: its PTX, instruction by instruction, and that it compiles to what it was written for.

Results are compared in test_decode_attention.py, where Triton's interpreter takes the PTX's place.
"""

import re

import pytest
import torch
from triton_programs import compile_only, interpret

# PTX that a thread runs, for every code and for pairs of numbers, against plain torch. Read in the interpreter's
# process: importing the kernel imports Triton.
PROGRAM = """
import json
from test_decode_codes import wrong_numbers
print(json.dumps(wrong_numbers()))
"""


def bf16(x):
    """Bits of the nearest bfloat16."""
    return int(torch.tensor(x, dtype=torch.float64).to(torch.bfloat16).view(torch.int16)) & 0xFFFF


def value(bits):
    return float(torch.tensor([bits << 16], dtype=torch.int64).to(torch.int32).view(torch.float32))


def lanes(change, *words):
    """A function of bfloat16 numbers on both halves of words."""
    return sum(bf16(change(*(value(word >> at & 0xFFFF) for word in words))) << at for at in (0, 16))


OPERATIONS = {
    "and.b32": lambda a, b: a & b,
    "prmt.b32": lambda a, b, order: sum(
        ((a | b << 32) >> 8 * (order >> 4 * i & 15) & 255) << 8 * i for i in range(4)
    ),
    "fma.rn.bf16x2": lambda a, b, c: lanes(lambda x, y, z: x * y + z, a, b, c),
    "neg.bf16x2": lambda a: a ^ 0x80008000,
    # a product and a difference, not rounded in between, as ptxas makes them
    "mul.bf16x2+sub.bf16x2": lambda a, b, c: lanes(lambda x, y, z: x * y - z, a, b, c),
}  # fmt: skip


def run(program, inputs):
    """Bits that a program leaves in its operands, which hold `inputs` before: {"$8": bits, ...}."""
    held = dict(inputs)

    def read(name):
        return held[name] if name in held else int(name, 0)

    fused = re.sub(r"mul.bf16x2 (\w+), ([^;]+); sub.bf16x2 \1, \1, ", r"mul.bf16x2+sub.bf16x2 \1, \2, ", program)
    for line in fused.removeprefix("{").removesuffix("; }").split(";"):
        operation, operands = line.strip().split(" ", 1)
        if operation == ".reg":
            continue
        if packed := re.fullmatch(r"(\w+), {(\$\d), (\$\d)}", operands):
            held[packed[1]] = read(packed[2]) | read(packed[3]) << 16
        elif parted := re.fullmatch(r"{(\$\d), (\$\d)}, (\w+)", operands):
            held[parted[1]], held[parted[2]] = read(parted[3]) & 0xFFFF, read(parted[3]) >> 16
        else:
            target, *sources = operands.split(", ")
            numbers = [read(x) for x in sources]
            held[target] = numbers[0] if operation == "mov.b32" else OPERATIONS[operation](*numbers)
    return held


def wrong_numbers():
    """What the programs give otherwise than torch in bfloat16, for all codes."""
    from locret.kernels.decode_codes_triton import GROW, PROGRAMS, SCALE, SCALE_16, ZERO

    g = torch.Generator().manual_seed(0)
    found = []
    for (bits, rotated, subtracts), program in PROGRAMS.items():
        for i in range(24 if bits == 4 else 96):
            codes = torch.randint(0, 2**bits, (8,), generator=g).tolist()
            if bits == 4:
                words = [sum((codes[i] | codes[i + 4] << 4) << 8 * i for i in range(4))] * 2
            else:
                words = [sum(codes[i + 4 * half] << 8 * i for i in range(4)) for half in (0, 1)]
            levels = (torch.randn(4, generator=g) * 2.0 ** (4 * i % 64 - 32)).bfloat16()  # scale, zero, of both halves
            levels[0] *= i != 5  # a group of equal numbers has no scale
            angles = torch.rand(4, generator=g) * 6
            tables = torch.cat((angles.cos(), angles.sin())).bfloat16()
            pairs = [bf16(float(tables[i])) | bf16(float(tables[i + 1])) << 16 for i in (0, 2, 4, 6)]
            lifts = (SCALE, ZERO, SCALE_16 if bits == 4 else SCALE, ZERO)
            lifted = [run(x.value, {"$1": bf16(float(y))})["$0"] for x, y in zip(lifts, levels, strict=True)]
            words += [*lifted, *(pairs if rotated else [])]
            held = run(program, {f"${8 + i}": word for i, word in enumerate(words)})
            got = [value(held[f"${i}"]) * GROW.value for i in range(8)]
            level, code, table = levels.double(), torch.tensor(codes).double(), tables.double()

            def near(x):
                return x.bfloat16().double()

            a, b = near(code[:4] * level[0] + level[1]), near(code[4:] * level[2] + level[3])
            if rotated:
                cos, sin = table[:4], table[4:]
                a, b = near(a * cos - near(b * sin)), near(b * cos + near(a * sin))
            want = torch.cat((a, b)).tolist()
            found += [(bits, rotated, subtracts, x, y) for x, y in zip(want, got, strict=True) if x != y]
    return found


@pytest.mark.triton_interpret
def test_the_ptx_decodes_and_rotates_as_torch_does_in_bfloat16():
    assert interpret(PROGRAM) == []


COMPILED = """
import re, torch, triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from locret.kernels.decode_attention import Codes
from locret.kernels.decode_attention_triton import codes_tile
from locret.kernels.decode_codes_triton import _split_codes, constants
def build(bits, dim, rotated, capability, spans, tables=False, **other):
    k = Codes(torch.empty(1, 1, 1, dim * bits // 8), torch.empty(1, 1, 1, max(4, dim // 32)), torch.empty(0), bits)
    tile = codes_tile(dim, bits)
    pointers = "q_ptr part_ptr lse_ptr k_scale k_zero v_scale v_zero".split() + rotated * ["cos_ptr", "sin_ptr"]
    types = dict.fromkeys(pointers, "*bf16") | dict(k_ptr="*i32", v_ptr="*i32", part_ptr="*fp32", lse_ptr="*fp32")
    types |= dict.fromkeys(rotated * ["cos_words", "sin_words"], "*i32") | dict(stop_ptr="*i64")
    types |= dict(first_ptr="*i64", bias_ptr="*fp32") if spans else {}
    types |= dict(k_table="*i64", v_table="*i64") if tables else {}
    names = _split_codes.arg_names
    numbers = ["slots", "heads", *(n for n in names if re.fullmatch("[a-z]+_[bht]", n))]
    types |= dict.fromkeys(numbers, "i32") | dict(scale="fp32", softcap="fp32")
    fixed = constants(dim, 4, 1, tile.slots, tile.warps, k, rotated=rotated, subtracts=capability >= 90)
    fixed |= dict(CAPPED=spans) | other
    source = ASTSource(
        fn=_split_codes, signature={n: types.get(n, "constexpr") for n in names},
        constexprs={n: None for n in names if n not in types} | fixed,
        attrs={(names.index(n),): [["tt.divisibility", 16]] for n in types if types[n][0] == "*" or n == "table_t"})
    options = dict(num_warps=tile.warps, num_stages=1)
    made = triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)
    ptx = made.asm["ptx"]
    print(dim, made.metadata.shared, any(word in ptx for word in ("wgmma", "mma.sync")),
          len(re.findall("st.shared[.a-z:0-9]*b16 ", ptx)), len(re.findall("st.shared|stmatrix", ptx)),
          len(re.findall(r"ld.global[.a-zA-Z:0-9_]*v4", ptx)))
for capability in (80, 90):
    for bits in (8, 4):
        build(bits, 128, True, capability, bits == 8)
build(4, 128, True, 90, False, tables=True)
build(4, 64, True, 90, False)
build(8, 256, False, 90, False)
build(8, 128, True, 90, True, DEALT=0)
"""


@pytest.mark.triton_interpret
def test_it_compiles_for_gpus_that_are_not_here(tmp_path):
    """On tensor cores, words in loads of 16 bytes; no number passes shared memory one by one up to head dim 128."""
    lines = compile_only(COMPILED, tmp_path)
    assert len(lines) == 8
    for dim, shared, cores, single, _, wide in lines:
        assert int(shared) <= 48 * 1024
        assert cores == "True"
        assert int(single) == 0 or int(dim) > 128
        assert int(wide) >= 4
    stores = [int(line[4]) for line in lines]
    assert stores[2] < stores[7], "slots are dealt to warps so that keys need not go through shared memory"
