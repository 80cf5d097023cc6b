"""The benchmark of whole models: one path from a tiny shape to JSON, correctness checks that fail, timings in turns."""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

import llmq
from llmq.bench import correctness, run, speed
from llmq.bench.kernels import options
from llmq.bench.overhead import kernels_stubbed, measure_overhead
from llmq.bench.run import BenchConfig, bench
from llmq.bench.speed import Sizes
from llmq.bench.turns import in_turns
from llmq.bench.variants import Variant, of_checkpoint, of_shape, packed_linears, resident_bytes
from llmq.errors import LlmqError
from llmq.kernels.kernel import Kernel
from llmq.kernels.registry import KERNELS
from llmq.serving.fused import fused_linears
from llmq.serving.linear import QuantLinear
from llmq.serving.overrides import kernels_overridden
from tests.fixtures import tiny_tokenizer, with_run
from tests.tiny import tiny_model

ROOT = Path(__file__).resolve().parent.parent
SIZES = Sizes((1, 2), 24, 5, 3, 2)
RTN = llmq.QuantConfig(method="rtn", group_size=64)


def script() -> ModuleType:
    spec = importlib.util.spec_from_file_location("bench_model", ROOT / "scripts" / "bench_model.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def variants() -> list[Variant]:
    return of_shape("tiny", RTN, torch.bfloat16, "cpu", 1)


def changed(change: Any) -> tuple[Kernel, ...]:
    """The registry's kernels with `change` applied to every result."""
    return with_run(lambda kernel: lambda x, layout, bias=None: change(kernel.run(x, layout, bias)))


def test_the_self_test_measures_and_writes_everything(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "argv", ["bench_model.py", "--self-test", "--output", str(tmp_path), "--group-size", "64"])
    with pytest.raises(SystemExit, match="0"):
        options.run(script().main)
    out = capsys.readouterr().out
    record = json.loads(out.splitlines()[-1])
    (file,) = tmp_path.glob("bench_model-tiny-*.json")
    assert json.loads(file.read_text()) == record
    assert "fast: eager: CUDA graphs need a CUDA device; the model is on cpu" in out
    cases = {(row["what"], row["how"], row["batch"], row["variant"]) for row in record["rows"]}
    names = ("original", "packed", "fused")
    decoded = {("decode", how, batch, name) for how in ("eager", "fast") for batch in (1, 2) for name in names}
    assert cases == decoded | {("prefill", "eager", 1, name) for name in names}
    assert record["missing"] == []
    for row in record["rows"]:
        assert row["runs"] == 2
        assert row["fastest_ms"] <= row["ms_per_forward"] <= row["slowest_ms"]
        assert row["tokens_per_second"] * row["ms_per_forward"] == pytest.approx(
            1000 * row["batch"] * (row["tokens"] if row["what"] == "prefill" else 1)
        )
        assert row["grown_bytes"] is None
    assert [row["variant"] for row in record["models"]] == list(names)
    assert all(
        row["seconds"] > 0 and row["resident_bytes"] > 0 and row["peak_bytes"] is None for row in record["models"]
    )
    assert [row["model"] for row in record["correctness"]] == ["packed", "fused"]
    assert all(0 < row["linears_worst"] <= 1 and row["tokens_compared"] > 0 for row in record["correctness"])
    assert [row["variant"] for row in record["overhead"]] == list(names)
    assert all(row["linear_us"] > 0 and row["block_us"] > 0 for row in record["overhead"])
    assert {(row["n"], row["k"]) for row in record["launch"]} == {(128, 128), (64, 128), (384, 128), (128, 384)}
    assert record["command"].startswith("bench_model.py --self-test")
    assert record["versions"]["torch"].startswith(torch.__version__.split("+")[0])
    assert " ".join(sorted(record)) == (
        "arch bench cache_bytes command correctness date device dtype launch measured memory memory_bytes missing models "
        "overhead process_peak_bytes processors quantized rows seconds seed self_test sizes source system threads versions"
    )


def test_a_checkpoint_is_compared_with_its_original(tmp_path: Path) -> None:
    model = tiny_model("llama", layers=2).bfloat16()
    model.save_pretrained(tmp_path / "original")
    tiny_tokenizer().save_pretrained(tmp_path / "original")
    llmq.quantize(tmp_path / "original", tmp_path / "packed", RTN)
    forms = of_checkpoint(tmp_path / "original", str(tmp_path / "packed"), "bfloat16", "cpu")
    assert [variant.name for variant in forms] == ["original", "packed", "fused"]
    assert [len(fused_linears(variant.model)) for variant in forms] == [0, 0, 4]
    rows, missing = speed.measure_speed(forms, SIZES, 60)
    assert len(rows) == 3 * 5
    assert missing == []
    with pytest.raises(llmq.LlmqError, match="packed is packed; the first model must be the original of"):
        of_checkpoint(tmp_path / "packed", str(tmp_path / "packed"), "bfloat16", "cpu")


def test_forms_share_their_tensors(variants: list[Variant]) -> None:
    original, packed, fused = (variant.model for variant in variants)
    assert packed.model.embed_tokens.weight is original.model.embed_tokens.weight
    assert fused.lm_head.weight is original.lm_head.weight
    first, other = (model.model.layers[0].self_attn.q_proj for model in (packed, fused))
    assert isinstance(first, QuantLinear)
    assert first.weight_packed is other.weight_packed
    assert first.fusion is None
    assert isinstance(original.model.layers[0].self_attn.q_proj, torch.nn.Linear)
    assert resident_bytes(original) == sum(t.nbytes for t in (*original.parameters(), *original.buffers()))
    stored = sum(t.nbytes for t in (*packed.parameters(), *packed.buffers()))
    assert resident_bytes(packed) > stored, "layouts are counted"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda y: y * 1.05, "must compute its dequantized weight; the error of an output is .* times the allowed one"),
        (
            lambda y: torch.cat((-y[:, :1], y[:, 1:]), 1),
            "packed: with 1 rows, model.layers.0.self_attn.q_proj must compute",
        ),
        (lambda y: y * float("nan"), "the error of an output is nan times"),
    ],
    ids=["scaled", "one row of the weight", "nan"],
)
def test_a_wrong_kernel_is_caught_before_anything_is_timed(
    change: Any, message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(QuantLinear, "kernels", changed(change))
    monkeypatch.setattr(run, "measure_speed", lambda *_: pytest.fail("timed"))
    with pytest.raises(LlmqError, match=message):
        bench(BenchConfig(shape="tiny", config=RTN, device="cpu", sizes=SIZES), ["test"])


def test_wrong_logits_are_caught(variants: list[Variant]) -> None:
    model = variants[1].model
    ids = correctness.drawn_prompts(model, 2, 16, 4, 3).ids
    correctness.check_logits("packed", model, ids)
    with (
        kernels_overridden(packed_linears(model), changed(lambda y: y * 1.05)),
        pytest.raises(LlmqError, match="packed: the relative distance of the logits to exact ones must be at most"),
    ):
        correctness.check_logits("packed", model, ids)


def test_wrong_tokens_are_caught_unless_logits_are_too_close(
    variants: list[Variant], monkeypatch: pytest.MonkeyPatch
) -> None:
    model = variants[1].model
    prompts = correctness.drawn_prompts(model, 2, 16, 6, 3)
    own = correctness.generate_fast

    def other(*arguments: Any) -> torch.Tensor:
        written = own(*arguments).clone()
        written[1, 18:] = (written[1, 18:] + 1) % 512
        return written

    assert correctness.check_tokens("packed", model, prompts, 1e-3)["sequences_undecided"] == 0
    monkeypatch.setattr(correctness, "generate_fast", other)
    with pytest.raises(
        LlmqError, match="packed: generate_fast must give the tokens of generate; token 2 of sequence 1 is"
    ):
        correctness.check_tokens("packed", model, prompts, 1e-3)
    assert correctness.check_tokens("packed", model, prompts, 1e3) == {
        "tokens_compared": 6 + 2,
        "sequences": 2,
        "sequences_undecided": 1,
    }


def test_turns_alternate_and_end_in_time() -> None:
    clock, order = [0.0], []

    def one(name: str, lasts: float) -> Any:
        def call() -> float:
            order.append(name)
            clock[0] += lasts
            return lasts

        return call

    groups = [[one("a", 1), one("b", 1)], [one("long", 50)]]
    timings = in_turns(groups, 120, 3, now=lambda: clock[0])
    assert "".join(order[:4]) == "aabb"
    assert order[4:] == ["long", "long", "b", "a", "a", "b"], "a second turn of the long run would end too late"
    assert timings == [[[1.0] * 3, [1.0] * 3], [[50.0]]]
    assert clock[0] <= 120
    assert in_turns(groups, 0, 3, now=lambda: clock[0]) == [[[], []], [[]]]


def test_unmeasured_cases_are_reported(variants: list[Variant]) -> None:
    rows, missing = speed.measure_speed(variants, SIZES, 1e-9)
    assert rows == []
    assert len(missing) == 5
    assert missing[0]["why"] == "no time left of 0 s; raise seconds or measure fewer cases"
    with pytest.raises(LlmqError, match="0 seconds are too few for one round of each form; raise seconds"):
        measure_overhead(variants, 0)


def test_a_model_without_a_static_cache_is_measured_without_it(
    variants: list[Variant], monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: Any) -> None:
        raise LlmqError("use generate")

    monkeypatch.setattr(speed, "Decoder", refuse)
    rows, missing = speed.measure_speed(variants, Sizes((1,), 8, 4, 2, 1), 60)
    assert {row["how"] for row in rows} == {"eager"}
    assert missing == [{"what": "decode", "how": "fast", "batch": 1, "why": "use generate"}]


def test_stubs_are_removed_afterwards(variants: list[Variant]) -> None:
    original, packed = variants[0].model, variants[1].model
    name = "model.layers.0.mlp.down_proj"
    x = torch.ones(1, 1, 384, dtype=torch.bfloat16)
    linears = packed_linears(variants[2].model)
    assert len(linears) > len([module for module in variants[2].model.modules() if isinstance(module, QuantLinear)])
    with kernels_stubbed(variants[2].model, []):
        assert all(linear.kernels is not KERNELS for linear in linears), "fused linears too"
    assert all(linear.kernels is KERNELS for linear in linears)
    assert not any("kernels" in vars(linear) for linear in linears)
    with torch.no_grad():
        for model in (original, packed):
            linear = model.get_submodule(name)
            with kernels_stubbed(model, [name]):
                assert not linear(x).any()
            assert linear(x).any()
    assert "forward" not in vars(original.get_submodule(name))


def test_invalid_arguments_are_refused(variants: list[Variant]) -> None:
    refused = [
        (lambda: BenchConfig(), "give either a checkpoint .* or --shape, not both"),
        (lambda: BenchConfig(shape="tiny", folder="x"), "not both"),
        (lambda: BenchConfig(shape="tiny", dtype="float32"), "dtype must be bfloat16 or float16.*; got 'float32'"),
        (lambda: BenchConfig(shape="tiny", seconds=0), "seconds must be above 0; got 0"),
        (lambda: of_shape("huge", RTN, torch.bfloat16, "cpu"), "shape must be one of tiny, llama-3-8b; got 'huge'"),
        (lambda: Sizes((0,)), "batches must be at least 1; got 0"),
        (lambda: Sizes(()), "batches must have at least one"),
        (lambda: Sizes(new=0), "new must be at least 1; got 0"),
        (
            lambda: speed.planned(variants, Sizes(prompt=5000)),
            "prompt . new must be below the model's context length 4096",
        ),
        (lambda: measure_overhead(variants[:1], 1), "one of the models must be packed; none is"),
        (lambda: script().main(models=["a"]), "give two models, ORIGINAL PACKED; got a"),
        (
            lambda: script().main(self_test=True, shape="tiny"),
            "--self-test has its own model; give no model and no --shape",
        ),
        (
            lambda: script().main(shape="tiny", batches="1,x"),
            "--batches must be whole numbers separated by commas; got '1,x'",
        ),
    ]
    for call, message in refused:
        with pytest.raises(LlmqError, match=message):
            call()
