"""`explain` names each linear's kernel and launch; `warmup` runs each distinct problem once."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

import llmq
from llmq.bench.variants import packed_linears
from llmq.kernels import wna16
from llmq.kernels.launch import Device, TunedLaunch
from llmq.kernels.problem import Problem
from llmq.kernels.registry import KERNELS
from llmq.serving.linear import QuantLinear
from llmq.serving.overrides import kernels_overridden
from tests.fixtures import DISK, IDS, checkpoint, with_run


def test_explain_names_kernels_by_rows_and_fused_linears(tmp_path: Path) -> None:
    folder = checkpoint(tmp_path / "a")
    plain, fused = llmq.load(folder), llmq.load(folder, fuse=True)
    first = llmq.explain(fused)[0]
    assert (first.few_rows, first.launch, first.fused) == ("cpu_int4", None, ("q_proj", "k_proj", "v_proj"))
    assert "; 1 row: cpu_int4 for q_proj, k_proj, v_proj as one; 512 rows: slab" in str(first)
    assert llmq.explain(fused)[3].fused == ()
    assert all(row.fused == () for row in llmq.explain(plain))
    many = llmq.explain(fused, rows=64)[0]
    assert (many.few_rows, many.fused) == ("slab", ())
    assert "(cpu_int4 runs at most 48 rows" in str(many)
    for wrong, message in (
        ({"rows": 0}, "rows must be at least 1; got 0"),
        ({"rows": 1.5}, "rows must be an integer; got 1.5"),
        ({"dtype": "bfloat16"}, "dtype must be a torch.dtype; got 'bfloat16'"),
    ):
        with pytest.raises(llmq.LlmqError, match=message):
            llmq.explain(plain, **wrong)


def test_printing_groups_linears_with_the_same_summary(tmp_path: Path) -> None:
    rows = llmq.explain(llmq.load(checkpoint(tmp_path / "a"), fuse=True))
    assert rows[1].summary == rows[0].summary
    lines = str(rows).splitlines()
    layers = len({row.name.split(".")[2] for row in rows})
    assert lines[0] == f"{3 * layers} linears: {rows[0].summary}"
    assert lines[1] == f"    model.layers.{{0-{layers - 1}}}.self_attn.{{q_proj, k_proj, v_proj}}"


MEASURED = TunedLaunch("float16", group=128, bucket=8, n=4096, k=4096, bn=64, warps=8, stages=3, split=2)


@pytest.mark.parametrize(
    ("table", "launch"),
    [
        ((), "bm8 bn64 split8 stages4 warps4 assembly (by rule)"),
        ((MEASURED,), "bm8 bn64 split2 stages3 warps8 assembly (measured)"),
    ],
    ids=["without a table", "with a table"],
)
def test_a_launch_states_whether_it_was_measured(
    table: tuple[TunedLaunch, ...], launch: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(wna16, "device_of", lambda _: Device("sm_90", 132))
    monkeypatch.setattr(wna16, "table_of", lambda _: table)
    problem = Problem(4096, 4096, 4, 128, True, torch.float16, torch.float16, "cuda")
    assert wna16.describe_launch(problem, 1, torch.device("cuda")) == launch
    assert wna16.describe_launch(problem, 0, torch.device("cuda")) is None


@pytest.mark.parametrize(("fuse", "problems"), [(False, 4), (True, 4)])
def test_each_distinct_problem_is_run_once(
    tmp_path: Path, fuse: bool, problems: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[tuple[str, int]] = []
    recording = with_run(lambda kernel: lambda *args: seen.append((kernel.name, len(args[0]))) or kernel.run(*args))
    monkeypatch.setattr(QuantLinear, "kernels", recording)
    model = llmq.load(checkpoint(tmp_path / "a"), fuse=fuse)
    seen.clear()
    rows = llmq.warmup(model)
    assert {(row.n, row.k) for row in rows} == (
        {(128, 64), (64, 64), (256, 64), (64, 128)} if fuse else {(64, 64), (32, 64), (128, 64), (64, 128)}
    )
    assert seen == [("cpu_int4", 1)] * problems
    seen.clear()
    rows = llmq.warmup(model, rows=[1, 2, 100])
    assert sorted(set(seen)) == [("cpu_int4", 1), ("cpu_int4", 2), ("slab", 100)]
    assert len(seen) == len(rows) == 2 * problems + 4
    with pytest.raises(llmq.LlmqError, match="rows must be at least 1; got 0"):
        llmq.warmup(model, [1, 0])


def test_after_warmup_a_forward_makes_no_layout(tmp_path: Path) -> None:
    folder = checkpoint(tmp_path / "a")
    model = llmq.load(folder, fuse=True, dtype=torch.float32)
    assert all(row.kernel == "slab" for row in llmq.warmup(model))
    llmq.warmup(model.to(torch.bfloat16))
    kernels = [replace(kernel, prepare=lambda _: pytest.fail("a layout was missing")) for kernel in KERNELS]
    with torch.no_grad(), kernels_overridden(packed_linears(model), kernels):
        model(IDS[:1, :1])


def test_warmup_skips_offloaded_weights(tmp_path: Path) -> None:
    layers = {f"model.layers.{i}": "disk" if i > 1 else "cpu" for i in range(4)}
    model = llmq.load(checkpoint(tmp_path / "a"), device_map={**DISK, **layers}, offload_folder=tmp_path / "off")
    assert len(llmq.warmup(model)) == 4
    assert all(m._layouts == {} for m in model.modules() if isinstance(m, QuantLinear) and m.offloaded)
