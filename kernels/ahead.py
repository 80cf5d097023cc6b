"""Compile a launch of the GPU kernels for a named architecture, without a GPU, and read the machine code.

Needs triton alone (its wheel has the assembler and both disassemblers), no torch: what CI can gate on every machine.
Triton must not interpret in the process: under TRITON_INTERPRET=1 nothing can be compiled.

What is read of the loop over K, the only loop with tensor-core instructions: how many instructions it has for each weight
(loop instructions * threads / weights that one turn takes), its loads that are narrower than 16 bytes, its stores to shared
memory. For AMD: registers spilled and shared memory, from the kernel's own metadata.
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
from llmq.kernels.launch import Launch

INSTRUCTION = re.compile(r"/\*[0-9a-f]{4,6}\*/\s+(?:@!?U?P\w+\s+)?([A-Z][\w.]*)([^;]*)")
LABEL = re.compile(r"\s*(\.L_x_\d+):")
PRODUCTS = ("HGMMA", "HMMA", "QGMMA", "UTCHMMA", "UTCMMA")
POINTERS = ("x", "words", "scales", "zeros", "bias", "y", "partials", "counters")


@dataclass(frozen=True)
class Case:
    """One compiled specialization. arch: sm_NN or gfxNNN. dtype: fp16 or bf16. group: columns per scale, 0 per channel."""

    arch: str
    dtype: str
    group: int
    symmetric: bool
    launch: Launch


@dataclass(frozen=True)
class Report:
    """What the machine code says. product: the tensor-core instruction. per_weight: loop instructions, None if not read.

    narrow: loads in the loop of less than 16 bytes. stored: stores to shared memory in the loop. stack: bytes of local
    memory, or spilled registers on AMD.
    """

    registers: int
    stack: int
    shared: int
    product: str
    per_weight: float | None
    narrow: int
    stored: int
    conversions: int


def read(case: Case) -> Report:
    """Compile a case and read it. `LlmqError` where Triton interprets."""
    compiled = compile_case(case)
    return _amd(compiled) if case.arch.startswith("gfx") else _nvidia(compiled, case)


def compile_case(case: Case) -> Any:
    """Triton's compiled kernel, as `llmq.kernels.w4` would launch it."""
    import triton
    from triton import language as tl
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from llmq.kernels._w4_swap import w4_swap

    if not hasattr(w4_swap, "cache_key"):
        raise LlmqError("nothing can be compiled while Triton interprets: unset TRITON_INTERPRET")
    launch, element = case.launch, f"*{case.dtype}"
    types = dict.fromkeys(POINTERS, element) | dict.fromkeys(("words", "scales", "zeros", "counters"), "*i32")
    types |= {"partials": "*fp32"} | dict.fromkeys(("M", "N", "K", "stride", "tiles"), "i32")
    constants = {
        "BM": launch.bm,
        "BN": launch.bn,
        "STAGES": launch.stages,
        "SPLIT": launch.split,
        "GROUP": case.group,
        "SYMMETRIC": case.symmetric,
        "BIAS": True,
        "RAGGED": False,
        "SCALE": tl.float16 if case.dtype == "fp16" else tl.bfloat16,
        "FORM": launch.form,
    }
    names = list(w4_swap.arg_names)
    aligned = {(names.index(name),): [["tt.divisibility", 16]] for name in (*POINTERS, "K", "stride")}
    source = ASTSource(w4_swap, types | dict.fromkeys(constants, "constexpr"), constants, aligned)
    options = {"num_warps": launch.warps, "num_stages": launch.stages, "enable_fp_fusion": True}
    return triton.compile(source, target=_target(case.arch, GPUTarget), options=options)


def _target(arch: str, make: Any) -> Any:
    if arch.startswith("sm_"):
        return make("cuda", int(arch[3:]), 32)
    return make("hip", arch, 64 if arch.startswith("gfx9") else 32)


def _nvidia(compiled: Any, case: Case) -> Report:
    import triton

    tools = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        used = _run(tools / "cuobjdump", "-res-usage", file.name)
        code = _run(tools / "nvdisasm", "-c", file.name)
    loop = k_loop(code)
    names = Counter(name for name, _ in loop)
    roots = Counter(name.split(".")[0] for name, _ in loop)
    loads = {name: n for name, n in names.items() if name.split(".")[0] in ("LDG", "LDGSTS")}
    threads, weights = 32 * case.launch.warps, 128 * case.launch.bn
    return Report(
        registers=_number(r"REG:(\d+)", used),
        stack=_number(r"STACK:(\d+)", used) + len(re.findall(r"\b(?:LDL|STL)\b", code)),
        shared=compiled.metadata.shared,
        product=next((root for root in PRODUCTS if roots[root]), "none"),
        per_weight=round(len(loop) * threads / weights, 2),
        narrow=sum(n for name, n in loads.items() if ".128" not in name and ".64" not in name),
        stored=roots["STS"] + roots["STSM"],
        conversions=sum(n for root, n in roots.items() if root in ("I2F", "I2FP")),
    )


def k_loop(code: str) -> list[tuple[str, str]]:
    """(name, operands) of the instructions of the loop with the most tensor-core instructions in a listing."""
    labels: dict[str, int] = {}
    found: list[tuple[str, str]] = []
    loops: list[list[tuple[str, str]]] = []
    for line in code.splitlines():
        label = LABEL.match(line)
        if label:
            labels[label[1]] = len(found)
        instruction = INSTRUCTION.search(line)
        if instruction:
            found.append((instruction[1], instruction[2]))
            target = re.search(r"\.L_x_\d+", instruction[2]) if instruction[1].startswith("BRA") else None
            if target and target[0] in labels:
                loops.append(found[labels[target[0]] :])
    # Of nested loops the inner one, which is the shorter.
    return max(loops, key=lambda loop: (_products(loop), -len(loop)), default=[])


def _products(loop: list[tuple[str, str]]) -> int:
    return sum(name.split(".")[0] in PRODUCTS for name, _ in loop)


def _amd(compiled: Any) -> Report:
    code = compiled.asm["amdgcn"]
    product = re.search(r"v_(mfma|wmma)\w*", code)
    return Report(
        registers=_number(r"\.vgpr_count:\s+(\d+)", code),
        stack=_number(r"\.vgpr_spill_count:\s+(\d+)", code) + _number(r"\.private_segment_fixed_size:\s+(\d+)", code),
        shared=compiled.metadata.shared,
        product=product[1] if product else "none",
        per_weight=None,
        narrow=0,
        stored=0,
        conversions=len(re.findall(r"v_cvt_f(?:32|16)_[iu]\d+", code)),
    )


def _number(pattern: str, text: str) -> int:
    found = re.search(pattern, text)
    if found is None:
        raise LlmqError(f"the compiler's output has no {pattern}: this version of Triton is not known")
    return int(found[1])


def _run(*command: object) -> str:
    done = subprocess.run([str(part) for part in command], capture_output=True, text=True, check=True)
    return done.stdout + done.stderr
