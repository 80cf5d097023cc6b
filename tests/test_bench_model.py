"""The benchmark of whole models: one path from a tiny shape to JSON, a gate that fails where it must, time in turns."""

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
from llmq.bench import gate, run, speed
from llmq.bench.overhead import measure_overhead, nothing_to_do
from llmq.bench.run import Asked, bench
from llmq.bench.speed import Sizes
from llmq.bench.turns import in_turns
from llmq.bench.variants import Variant, held_bytes, of_checkpoint, of_shape
from llmq.errors import LlmqError
from llmq.kernels.registry import KERNELS
from llmq.serving.fused import fused_linears
from llmq.serving.linear import QuantLinear
from tests.fixtures import tiny_tokenizer
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


def wrong(monkeypatch: pytest.MonkeyPatch, change: Any) -> None:
    """Every kernel's results pass through `change`."""
    for kernel in KERNELS:
        own = kernel.run
        monkeypatch.setattr(kernel, "run", lambda x, layout, bias=None, own=own: change(own(x, layout, bias)))


def test_the_self_test_measures_everything_and_writes_it(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "argv", ["bench_model.py", "--self-test", "--output", str(tmp_path), "--group-size", "64"])
    script().main()
    out = capsys.readouterr().out
    found = json.loads(out.splitlines()[-1])
    (file,) = tmp_path.glob("bench_model-tiny-*.json")
    assert json.loads(file.read_text()) == found
    assert "fast: eager: CUDA graphs need a CUDA device; the model is on cpu" in out
    cases = {(row["what"], row["how"], row["batch"], row["variant"]) for row in found["rows"]}
    names = ("original", "packed", "fused")
    decoded = {("decode", how, batch, name) for how in ("eager", "fast") for batch in (1, 2) for name in names}
    assert cases == decoded | {("prefill", "eager", 1, name) for name in names}
    assert found["missing"] == []
    for row in found["rows"]:
        assert row["runs"] == 2
        assert row["fastest_ms"] <= row["ms_per_forward"] <= row["slowest_ms"]
        assert row["tokens_per_second"] * row["ms_per_forward"] == pytest.approx(
            1000 * row["batch"] * (row["tokens"] if row["what"] == "prefill" else 1)
        )
        assert row["grown_bytes"] is None
    assert [row["variant"] for row in found["models"]] == list(names)
    assert all(row["seconds"] > 0 and row["held_bytes"] > 0 and row["peak_bytes"] is None for row in found["models"])
    assert [row["model"] for row in found["gate"]] == ["packed", "fused"]
    assert all(0 < row["linears_worst"] <= 1 and row["tokens_compared"] > 0 for row in found["gate"])
    assert [row["variant"] for row in found["overhead"]] == list(names)
    assert all(row["linear_us"] > 0 and row["block_us"] > 0 for row in found["overhead"])
    assert {(row["n"], row["k"]) for row in found["launch"]} == {(128, 128), (64, 128), (384, 128), (128, 384)}
    assert found["command"].startswith("bench_model.py --self-test")
    assert found["versions"]["torch"].startswith(torch.__version__.split("+")[0])
    assert set(found) == {
        *("bench", "date", "command", "device", "threads", "versions", "source", "dtype", "quantized", "seed", "sizes"),
        *("arch", "processors", "cache_bytes", "memory_bytes", "system", "self_test", "measured"),
        *("memory", "process_peak_bytes", "models", "gate", "rows", "missing", "overhead", "launch", "seconds"),
    }


def test_a_checkpoint_is_measured_beside_its_original(tmp_path: Path) -> None:
    model = tiny_model("llama", layers=2).bfloat16()
    model.save_pretrained(tmp_path / "original")
    tiny_tokenizer().save_pretrained(tmp_path / "original")
    llmq.quantize(tmp_path / "original", tmp_path / "packed", RTN)
    found = of_checkpoint(tmp_path / "original", str(tmp_path / "packed"), "bfloat16", "cpu")
    assert [variant.name for variant in found] == ["original", "packed", "fused"]
    assert [len(fused_linears(variant.model)) for variant in found] == [0, 0, 4]
    rows, missing = speed.measure(found, SIZES, 60)
    assert len(rows) == 3 * 5
    assert missing == []
    with pytest.raises(llmq.LlmqError, match="packed is packed itself: the first model must be the one that"):
        of_checkpoint(tmp_path / "packed", str(tmp_path / "packed"), "bfloat16", "cpu")


def test_one_copy_of_everything(variants: list[Variant]) -> None:
    original, packed, fused = (variant.model for variant in variants)
    assert packed.model.embed_tokens.weight is original.model.embed_tokens.weight
    assert fused.lm_head.weight is original.lm_head.weight
    first, other = (model.model.layers[0].self_attn.q_proj for model in (packed, fused))
    assert isinstance(first, QuantLinear)
    assert first.weight_packed is other.weight_packed
    assert first.fusion is None
    assert isinstance(original.model.layers[0].self_attn.q_proj, torch.nn.Linear)
    assert held_bytes(original) == sum(t.nbytes for t in (*original.parameters(), *original.buffers()))
    stored = sum(t.nbytes for t in (*packed.parameters(), *packed.buffers()))
    assert held_bytes(packed) > stored, "layouts are counted"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda y: y * 1.05, "must give what its weight says; an output is .* times as far off as allowed"),
        (
            lambda y: torch.cat((-y[:, :1], y[:, 1:]), 1),
            "packed: with 1 rows model.layers.0.self_attn.q_proj must give",
        ),
        (lambda y: y * float("nan"), "an output is nan times"),
    ],
    ids=["scaled", "one row of the weight", "nan"],
)
def test_a_wrong_kernel_is_caught_before_anything_is_timed(
    change: Any, message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    wrong(monkeypatch, change)
    monkeypatch.setattr(run, "measure", lambda *_: pytest.fail("timed"))
    with pytest.raises(LlmqError, match=message):
        bench(Asked(shape="tiny", config=RTN, device="cpu", sizes=SIZES), ["test"])


def test_a_kernel_that_is_right_alone_and_wrong_in_the_model_is_caught(
    variants: list[Variant], monkeypatch: pytest.MonkeyPatch
) -> None:
    model = variants[1].model
    ids = gate.drawn_prompts(model, 2, 16, 4, 3).ids
    gate.check_logits("packed", model, ids)
    wrong(monkeypatch, lambda y: y * 1.05)
    with pytest.raises(LlmqError, match="packed: logits must be as near to the dequantized model's as its own arith"):
        gate.check_logits("packed", model, ids)


def test_other_tokens_are_caught_unless_the_model_is_undecided(
    variants: list[Variant], monkeypatch: pytest.MonkeyPatch
) -> None:
    model = variants[1].model
    prompts = gate.drawn_prompts(model, 2, 16, 6, 3)
    own = gate.generate_fast

    def other(*arguments: Any) -> torch.Tensor:
        written = own(*arguments).clone()
        written[1, 18:] = (written[1, 18:] + 1) % 512
        return written

    assert gate.check_tokens("packed", model, prompts, 1e-3)["sequences_undecided"] == 0
    monkeypatch.setattr(gate, "generate_fast", other)
    with pytest.raises(
        LlmqError, match="packed: generate_fast must write what generate does; token 2 of sequence 1 is"
    ):
        gate.check_tokens("packed", model, prompts, 1e-3)
    assert gate.check_tokens("packed", model, prompts, 1e3) == {
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
    found = in_turns(groups, 120, 3, now=lambda: clock[0])
    assert "".join(order[:4]) == "aabb"
    assert order[4:] == ["long", "long", "b", "a", "a", "b"], "a second turn of the long one would end too late"
    assert found == [[[1.0] * 3, [1.0] * 3], [[50.0]]]
    assert clock[0] <= 120
    assert in_turns(groups, 0, 3, now=lambda: clock[0]) == [[[], []], [[]]]


def test_what_there_was_no_time_for_is_told(variants: list[Variant]) -> None:
    rows, missing = speed.measure(variants, SIZES, 1e-9)
    assert rows == []
    assert len(missing) == 5
    assert missing[0]["why"] == "no time was left of 0 s: give more seconds, or ask for less"
    with pytest.raises(LlmqError, match="seconds must suffice for one round"):
        measure_overhead(variants, 0)


def test_a_model_without_a_static_cache_is_measured_without_it(
    variants: list[Variant], monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: Any) -> None:
        raise LlmqError("use generate")

    monkeypatch.setattr(speed, "Decoder", refuse)
    rows, missing = speed.measure(variants, Sizes((1,), 8, 4, 2, 1), 60)
    assert {row["how"] for row in rows} == {"eager"}
    assert missing == [{"what": "decode", "how": "fast", "batch": 1, "why": "use generate"}]


def test_stubs_leave_no_trace(variants: list[Variant]) -> None:
    original, packed = variants[0].model, variants[1].model
    name = "model.layers.0.mlp.down_proj"
    x = torch.ones(1, 1, 384, dtype=torch.bfloat16)
    before = [kernel.run for kernel in KERNELS]
    with torch.no_grad():
        for model in (original, packed):
            linear = model.get_submodule(name)
            with nothing_to_do(model, [name]):
                assert not linear(x).any()
            assert linear(x).any()
    assert [kernel.run for kernel in KERNELS] == before
    assert "forward" not in vars(original.get_submodule(name))


def test_bad_requests_are_refused(variants: list[Variant]) -> None:
    refused = [
        (lambda: Asked(), "either a checkpoint .* or --shape must be given, and not both"),
        (lambda: Asked(shape="tiny", folder="x"), "and not both"),
        (lambda: Asked(shape="tiny", dtype="float32"), "dtype must be bfloat16 or float16.*; got 'float32'"),
        (lambda: Asked(shape="tiny", seconds=0), "seconds must be above 0; got 0"),
        (lambda: of_shape("huge", RTN, torch.bfloat16, "cpu"), "shape must be one of tiny, llama-3-8b; got 'huge'"),
        (lambda: Sizes((0,)), "batches must be at least 1; got 0"),
        (lambda: Sizes(()), "batches must name at least one"),
        (lambda: Sizes(new=0), "new must be at least 1; got 0"),
        (lambda: speed.planned(variants, Sizes(prompt=5000)), "prompt . new must be below the model's context of 4096"),
        (lambda: measure_overhead(variants[:1], 1), "one of the models must be packed; none is"),
        (lambda: script().measured(script().parsed(["a"]), "", None), "MODEL must be two, ORIGINAL PACKED; got a"),
        (lambda: script().measured(script().parsed(["--self-test", "--shape", "tiny"]), "", None), "has its own"),
    ]
    for call, message in refused:
        with pytest.raises(LlmqError, match=message):
            call()
