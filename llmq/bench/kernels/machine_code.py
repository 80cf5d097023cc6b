"""Compile a launch of the GPU kernels for a named architecture, without a GPU, and read the machine code.

This needs only triton (its wheel has the assembler and both disassemblers), not torch, so CI can check every launch on any
machine. Triton must not interpret in the process: nothing can be compiled under TRITON_INTERPRET=1.

The loop over K is the only loop with tensor-core instructions. Read from it: instructions per weight (loop instructions *
threads / weights of one iteration), loads of less than 8 bytes, stores to shared memory. Registers, shared memory and spills
come from the assembler, for AMD from the kernel's own metadata.
"""

from __future__ import annotations

import re
import subprocess
import tempfile
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from llmq.errors import LlmqError
from llmq.kernels.launch import Launch, compiler_options

INSTRUCTION = re.compile(r"/\*[0-9a-f]{4,6}\*/\s+(?:@!?U?P\w+\s+)?([A-Z][\w.]*)([^;]*)")
LABEL = re.compile(r"\s*(\.L_x_\d+):")
AMD_INSTRUCTION = re.compile(r"\s+([a-z]\w+)(.*)")
AMD_LABEL = re.compile(r"(\.LBB\d+_\d+):")
PRODUCTS = ("HGMMA", "HMMA", "QGMMA", "UTCHMMA", "UTCMMA", "v_mfma", "v_wmma")
LANES = {"gfx942": 64}  # of a warp; elsewhere 32
POINTERS = ("x", "words", "scales", "zeros", "bias", "y")
SPLIT_POINTERS = ("partials", "counters")
GROUPED_POINTERS = ("experts", "order", "first", "last", "rows")


@dataclass(frozen=True)
class MatmulCase:
    """One specialization of the matmul kernel to compile."""

    arch: str
    """sm_NN or gfxNNN."""
    dtype: str
    """fp16 or bf16."""
    group: int
    """Columns per scale; 0 per channel."""
    symmetric: bool
    """Whether weights have no zero points."""
    launch: Launch
    """The launch configuration."""
    bits: int = 4
    """Of a weight code."""
    grouped: bool = False
    """Whether it is the kernel for packed experts, sorted by expert."""


@dataclass(frozen=True)
class DequantCase:
    """One specialization of the dequantize kernel to compile; fields as in `MatmulCase`. Scales have the output's dtype."""

    arch: str
    dtype: str
    bits: int
    group: int
    symmetric: bool


@dataclass(frozen=True)
class MachineCode:
    """The properties of a compiled kernel. The dequantize kernel has no loop: there all instructions count."""

    registers: int
    """Of a thread."""
    stack: int
    """Bytes of local memory, or spilled registers on AMD."""
    shared: int
    """Bytes of shared memory of a block."""
    product: str
    """The tensor-core instruction."""
    per_weight: float
    """Loop instructions per weight."""
    narrow: int
    """Loads of less than 8 bytes of global memory in the loop."""
    stored: int
    """Stores to shared memory in the loop."""
    conversions: int
    """Conversions of integers to floats."""


def read(case: MatmulCase | DequantCase) -> MachineCode:
    """Compile a case and read its machine code. Raises `LlmqError` while Triton interprets."""
    reader = _amd if case.arch.startswith("gfx") else _nvidia
    if isinstance(case, MatmulCase):
        return reader(compile_matmul(case), case.arch, case.launch.warps, 128 * case.launch.bn, False)
    from llmq.kernels._wna16_dequant import ROWS, WARPS

    return reader(compile_dequant(case), case.arch, WARPS, ROWS * 512, True)


def compile_dequant(case: DequantCase) -> Any:
    """Triton's compiled kernel, as `llmq.kernels.dequant` would launch it for K divisible by 512."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from llmq.kernels._wna16_dequant import ROWS, WARPS, wna16_dequant

    types = {"words": "*i32", "scales": f"*{case.dtype}", "zeros": "*i32", "out": f"*{case.dtype}"}
    aligned = (*types, "K", "width")
    types |= dict.fromkeys(("first", "N", "K", "width", "groups"), "i32")
    constants = {"BN": ROWS, "BITS": case.bits, "GROUP": case.group, "SYMMETRIC": case.symmetric}
    names = list(wna16_dequant.arg_names)
    attributes = {(names.index(name),): [["tt.divisibility", 16]] for name in aligned}
    source = ASTSource(wna16_dequant, types | dict.fromkeys(constants, "constexpr"), constants, attributes)
    options = {"num_warps": WARPS, "enable_fp_fusion": False}
    return triton.compile(source, target=_target(case.arch, GPUTarget), options=options)


def compile_matmul(case: MatmulCase) -> Any:
    """Triton's compiled kernel, as `llmq.kernels.wna16` or `llmq.kernels.grouped` would launch it."""
    import triton
    from triton import language as tl
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from llmq.kernels._grouped import wna16_grouped
    from llmq.kernels._wna16_swap import wna16_swap

    kernel = wna16_grouped if case.grouped else wna16_swap
    if not hasattr(kernel, "cache_key"):
        raise LlmqError("Triton cannot compile while it interprets; unset TRITON_INTERPRET")
    launch, names = case.launch, list(kernel.arg_names)
    pointers = (*POINTERS, *(GROUPED_POINTERS if case.grouped else SPLIT_POINTERS))
    types = dict.fromkeys(pointers, "*i32") | dict.fromkeys(("x", "bias", "y"), f"*{case.dtype}")
    constants = {
        "BM": launch.bm,
        "BN": launch.bn,
        "STAGES": launch.stages,
        "BITS": case.bits,
        "GROUP": case.group,
        "SYMMETRIC": case.symmetric,
        "BIAS": True,
        "RAGGED": False,
        "SCALE": tl.float16 if case.dtype == "fp16" else tl.bfloat16,
        "FORM": launch.form,
    }
    if case.grouped:
        types |= dict.fromkeys(("N", "K", "stride", "tiles", "groups", "E"), "i32")
        constants |= {"PAIRS": False, "ROWS": True}
    else:
        types |= {"partials": "*fp32"} | dict.fromkeys(("M", "N", "K", "stride", "tiles"), "i32")
        constants |= {"SPLIT": launch.split}
    aligned = {(names.index(name),): [["tt.divisibility", 16]] for name in (*pointers, "K", "stride")}
    source = ASTSource(kernel, types | dict.fromkeys(constants, "constexpr"), constants, aligned)
    return triton.compile(
        source, target=_target(case.arch, GPUTarget), options=compiler_options(case.arch, case.launch)
    )


def _target(arch: str, make: Any) -> Any:
    if arch.startswith("sm_"):
        return make("cuda", int(arch[3:]), 32)
    return make("hip", arch, 64 if arch.startswith("gfx9") else 32)


def _nvidia(compiled: Any, arch: str, warps: int, weights: int, whole: bool) -> MachineCode:
    import triton

    tools = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        used = _run(tools / "cuobjdump", "-res-usage", file.name)
        code = _run(tools / "nvdisasm", "-c", file.name)
    loop = k_loop(code, whole=whole)
    names = Counter(name for name, _ in loop)
    roots = Counter(name.split(".")[0] for name, _ in loop)
    loads = {name: n for name, n in names.items() if name.split(".")[0] in ("LDG", "LDGSTS")}
    return MachineCode(
        registers=_number(r"REG:(\d+)", used),
        stack=_number(r"STACK:(\d+)", used) + len(re.findall(r"\b(?:LDL|STL)\b", code)),
        shared=compiled.metadata.shared,
        product=next((root for root in PRODUCTS if roots[root]), "none"),
        per_weight=round(len(loop) * LANES.get(arch, 32) * warps / weights, 2),
        narrow=sum(n for name, n in loads.items() if ".128" not in name and ".64" not in name),
        stored=roots["STS"] + roots["STSM"],
        conversions=sum(n for root, n in roots.items() if root in ("I2F", "I2FP")),
    )


def k_loop(
    code: str, label: re.Pattern[str] = LABEL, one: re.Pattern[str] = INSTRUCTION, whole: bool = False
) -> list[tuple[str, str]]:
    """(name, operands) of the instructions of the loop with the most tensor-core instructions, or of the whole listing."""
    labels: dict[str, int] = {}
    instructions: list[tuple[str, str]] = []
    loops: list[list[tuple[str, str]]] = []
    for line in code.splitlines():
        here = label.match(line)
        if here:
            labels[here[1]] = len(instructions)
        instruction = one.search(line) if one is INSTRUCTION else one.fullmatch(line)
        if instruction:
            instructions.append((instruction[1], instruction[2]))
            target = re.search(r"\.L\w+", instruction[2]) if re.match(r"BRA|s_c?branch", instruction[1]) else None
            if target and target[0] in labels:
                loops.append(instructions[labels[target[0]] :])
    if whole:
        return instructions
    # Of nested loops take the inner one, which is shorter.
    return max(loops, key=lambda loop: (_products(loop), -len(loop)), default=[])


def _products(loop: list[tuple[str, str]]) -> int:
    return sum(name.split(".")[0].startswith(PRODUCTS) for name, _ in loop)


def _amd(compiled: Any, arch: str, warps: int, weights: int, whole: bool) -> MachineCode:
    code = compiled.asm["amdgcn"]
    loop = k_loop(code, AMD_LABEL, AMD_INSTRUCTION, whole)
    names = [name for name, _ in loop]
    product = next((root[2:] for root in PRODUCTS for name in names if name.startswith(root)), "none")
    return MachineCode(
        registers=_number(r"\.vgpr_count:\s+(\d+)", code),
        stack=_number(r"\.vgpr_spill_count:\s+(\d+)", code) + _number(r"\.private_segment_fixed_size:\s+(\d+)", code),
        shared=compiled.metadata.shared,
        product=product,
        per_weight=round(len(loop) * LANES.get(arch, 32) * warps / weights, 2),
        narrow=sum(
            bool(re.match(r"(global|buffer)_load_(u?short|u?byte|dword$|b32|[ui]16|d16)", name)) for name in names
        ),
        stored=sum(name.startswith(("ds_write", "ds_store")) for name in names),
        conversions=len(re.findall(r"v_cvt_f(?:32|16)_[iu]\d+", code)),
    )


def _number(pattern: str, text: str) -> int:
    match = re.search(pattern, text)
    if match is None:
        raise LlmqError(f"the compiler's output has no {pattern}: this version of Triton is not supported")
    return int(match[1])


def _run(*command: object) -> str:
    done = subprocess.run([str(part) for part in command], capture_output=True, text=True, check=True)
    return done.stdout + done.stderr
