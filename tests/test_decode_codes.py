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
    "shr.u32": lambda a, n: a >> n,
    "mul.lo.u32": lambda a, b: a * b & 0xFFFFFFFF,
    "prmt.b32": lambda a, b, order: sum(
        ((a | b << 32) >> 8 * (order >> 4 * i & 15) & 255) << 8 * i for i in range(4)
    ),
    "lop3.b32": lambda a, b, c, table: sum(
        (table >> ((a >> i & 1) << 2 | (b >> i & 1) << 1 | c >> i & 1) & 1) << i for i in range(32)
    ),
    "fma.rn.bf16x2": lambda a, b, c: lanes(lambda x, y, z: x * y + z, a, b, c),
    "neg.bf16x2": lambda a: a ^ 0x80008000,
}  # fmt: skip


def run(program, inputs):
    """The eight outputs of a program, bits, for 32-bit inputs $8, $9, ..."""
    held = {f"${8 + i}": word for i, word in enumerate(inputs)}

    def read(name):
        return held[name] if name in held else int(name, 0)

    for line in program.split(";"):
        match = re.fullmatch(r"\s*([a-z0-9.]+) ([{}$\w, ]+)", line)
        if match is None or match[1] == ".reg":
            continue
        operation, operands = match[1], match[2]
        if operation == "mov.b32" and "{" in operands:
            low, high, source = re.fullmatch(r"{(\$\d), (\$\d)}, (\w+)", operands).groups()
            held[low], held[high] = read(source) & 0xFFFF, read(source) >> 16
        else:
            target, *sources = operands.split(", ")
            numbers = [read(x) for x in sources]
            held[target] = numbers[0] if operation == "mov.b32" else OPERATIONS[operation](*numbers)
    return [held[f"${i}"] for i in range(8)]


def wrong_numbers():
    """What the programs give otherwise than torch in bfloat16, for all codes."""
    from locret.kernels.decode_codes_triton import PROGRAMS

    g = torch.Generator().manual_seed(0)
    found = []
    for (bits, rotated), program in PROGRAMS.items():
        for _ in range(24 if bits == 4 else 96):
            codes = torch.randint(0, 2**bits, (8,), generator=g).tolist()
            if bits == 4:
                words = [sum((codes[i] | codes[i + 4] << 4) << 8 * i for i in range(4))] * 2
            else:
                words = [sum(codes[i + 4 * half] << 8 * i for i in range(4)) for half in (0, 1)]
            levels = torch.randn(4, generator=g).bfloat16()
            angles = torch.rand(4, generator=g) * 6
            tables = torch.cat((angles.cos(), angles.sin())).bfloat16()
            pairs = [bf16(float(tables[i])) | bf16(float(tables[i + 1])) << 16 for i in (0, 2, 4, 6)]
            got = run(program, [*words, *(bf16(float(x)) * 65537 for x in levels), *(pairs if rotated else [])])
            level, code, table = levels.double(), torch.tensor(codes).double(), tables.double()

            def near(x):
                return x.bfloat16().double()

            a, b = near(code[:4] * level[0] + level[1]), near(code[4:] * level[2] + level[3])
            if rotated:
                cos, sin = table[:4], table[4:]
                a, b = near(near(a * cos) - b * sin), near(b * cos + near(a * sin))
            want = torch.cat((a, b)).tolist()
            found += [(bits, rotated, x, value(y)) for x, y in zip(want, got, strict=True) if x != value(y)]
    return found


@pytest.mark.triton_interpret
def test_the_ptx_decodes_and_rotates_as_torch_does_in_bfloat16():
    assert interpret(PROGRAM) == []


COMPILED = """
import re, torch, triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from locret.kernels.decode_attention import Codes
from locret.kernels.decode_codes_triton import _split_codes, constants
def build(bits, dim, rotated, capability, spans, tables=False):
    k = Codes(torch.empty(1, 1, 1, dim * bits // 8), torch.empty(1, 1, 1, max(4, dim // 32)), torch.empty(0), bits)
    pointers = "q_ptr part_ptr lse_ptr k_scale k_zero v_scale v_zero".split() + rotated * ["cos_ptr", "sin_ptr"]
    types = dict.fromkeys(pointers, "*bf16") | dict(k_ptr="*i32", v_ptr="*i32", part_ptr="*fp32", lse_ptr="*fp32")
    types |= dict.fromkeys(rotated * ["cos_words", "sin_words"], "*i32") | dict(stop_ptr="*i64")
    types |= dict(first_ptr="*i64", bias_ptr="*fp32") if spans else {}
    types |= dict(k_table="*i64", v_table="*i64") if tables else {}
    names = _split_codes.arg_names
    numbers = ["slots", "heads", *(n for n in names if re.fullmatch("[a-z]+_[bht]", n))]
    types |= dict.fromkeys(numbers, "i32") | dict(scale="fp32", softcap="fp32")
    fixed = constants(dim, 4, 1, 64, k, rotated=rotated) | dict(CAPPED=spans)
    source = ASTSource(
        fn=_split_codes, signature={n: types.get(n, "constexpr") for n in names},
        constexprs={n: None for n in names if n not in types} | fixed,
        attrs={(names.index(n),): [["tt.divisibility", 16]] for n in types if types[n][0] == "*" or n == "table_t"})
    made = triton.compile(source, target=GPUTarget("cuda", capability, 32), options=dict(num_warps=4, num_stages=1))
    ptx = made.asm["ptx"]
    print(dim, made.metadata.shared, "mma.sync" in ptx, len(re.findall("st.shared[.a-z:0-9]*b16 ", ptx)),
          len(re.findall(r"ld.global[.a-zA-Z:0-9_]*v4", ptx)))
for capability in (80, 90):
    for bits in (8, 4):
        build(bits, 128, True, capability, bits == 8)
build(4, 128, True, 90, False, tables=True)
build(4, 64, True, 90, False)
build(8, 256, False, 90, False)
"""


@pytest.mark.triton_interpret
def test_it_compiles_for_gpus_that_are_not_here(tmp_path):
    """On tensor cores, words in loads of 16 bytes; no number passes shared memory one by one up to head dim 128."""
    lines = compile_only(COMPILED, tmp_path)
    assert len(lines) == 7
    for dim, shared, cores, single, wide in lines:
        assert int(shared) <= 48 * 1024
        assert cores == "True"
        assert int(single) == 0 or int(dim) > 128
        assert int(wide) >= 4
