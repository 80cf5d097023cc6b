"""Latency: every token is computed once, with a cache, and prefill and decode are timed separately."""

from types import SimpleNamespace

import pytest
import torch

from llmq.errors import LlmqError
from llmq.eval import latency
from llmq.eval.latency import measure, measure_within_context
from llmq.eval.models import random_ids

transformers = pytest.importorskip("transformers")

VOCABULARY = 61


@pytest.fixture
def model():
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=64,
    )
    return transformers.LlamaForCausalLM(config)


def spy(model, monkeypatch, seconds=lambda _: 1.0):
    """Records (ids, cache length before) of every forward, and advances a fake clock by `seconds(ids.shape[1])` for each."""
    calls = []
    forward = model.forward
    now = [100.0]
    monkeypatch.setattr(latency, "time", SimpleNamespace(perf_counter=lambda: now[0]))

    def recorded(input_ids=None, past_key_values=None, use_cache=None, logits_to_keep=0, **kwargs):
        assert use_cache
        assert not model.training
        calls.append((input_ids.clone(), past_key_values.get_seq_length() if past_key_values is not None else 0))
        now[0] += seconds(input_ids.shape[1])
        output = forward(
            input_ids=input_ids,
            past_key_values=past_key_values,
            use_cache=use_cache,
            logits_to_keep=logits_to_keep,
            **kwargs,
        )
        assert output.logits.shape[1] == 1, "the prefill computed logits that are not used"
        return output

    monkeypatch.setattr(model, "forward", recorded)
    return calls


def test_each_repeat_is_a_prefill_and_single_tokens_on_a_growing_cache(model, monkeypatch):
    calls = spy(model, monkeypatch)
    measure(model, prompt_tokens=7, new_tokens=3, batch_size=2, repeats=2)
    repeat = [(2, 7, 0), (2, 1, 7), (2, 1, 8), (2, 1, 9)]
    shapes = [(*ids.shape, past) for ids, past in calls]
    assert shapes == repeat[:3] + repeat + repeat  # a warm-up of two tokens first


def test_tokens_are_the_greedy_ones(model, monkeypatch):
    calls = spy(model, monkeypatch)
    measure(model, prompt_tokens=5, new_tokens=4, repeats=1)
    prompt, *tokens = [ids for ids, _ in calls[-5:]]
    model.eval()
    monkeypatch.undo()
    ids = prompt
    for token in tokens:
        with torch.no_grad():
            best = model(input_ids=ids, use_cache=False).logits[:, -1].argmax(-1, keepdim=True)
        assert torch.equal(token, best)
        ids = torch.cat([ids, token], dim=1)


def test_prefill_and_decode_are_timed_separately(model, monkeypatch):
    spy(model, monkeypatch, seconds=lambda rows: 0.3 if rows > 1 else 0.05)
    found = measure(model, prompt_tokens=12, new_tokens=4, batch_size=2, repeats=1)
    assert found.prefill_tokens_per_second == pytest.approx(24 / 0.3)
    assert found.decode_tokens_per_second == pytest.approx(8 / 0.2)


def test_the_median_of_the_repeats_is_reported(model, monkeypatch):
    durations = iter([9.0, 9.0, 4.0, 1.0, 2.0, 8.0, 3.0, 5.0])  # (prefill, one token): warm-up, then three repeats
    spy(model, monkeypatch, seconds=lambda _: next(durations))
    found = measure(model, prompt_tokens=10, new_tokens=1, repeats=3)
    assert found.prefill_tokens_per_second == pytest.approx(10 / 3)
    assert found.decode_tokens_per_second == pytest.approx(1 / 5)


def test_memory_and_machine_are_reported(model):
    found = measure(model, prompt_tokens=4, new_tokens=2, repeats=1)
    assert found.device == "cpu"
    assert found.dtype == "float32"
    assert found.threads == torch.get_num_threads()
    assert "resident" in found.memory
    assert found.peak_memory_bytes is None or 50_000_000 < found.peak_memory_bytes < 2**40
    assert (found.prompt_tokens, found.new_tokens, found.batch_size, found.repeats) == (4, 2, 1, 1)
    assert found.prefill_tokens_per_second > 0
    assert found.decode_tokens_per_second > 0


def test_the_model_is_left_as_it_was(model):
    model.train()
    model.model.layers[0].eval()
    measure(model, prompt_tokens=4, new_tokens=2, repeats=1)
    assert model.training
    assert not model.model.layers[0].training
    assert model.model.layers[1].training


@pytest.mark.parametrize("size", ["prompt_tokens", "new_tokens", "batch_size", "repeats"])
def test_sizes_below_one_are_refused(model, size):
    with pytest.raises(LlmqError, match=f"{size} must be at least 1; got 0"):
        measure(model, **{size: 0})


def test_more_tokens_than_the_context_are_refused(model):
    with pytest.raises(LlmqError, match="context of 64; got 65"):
        measure(model, prompt_tokens=60, new_tokens=5)


def test_sizes_fit_the_smallest_context(model):
    """By default 512 + 64 tokens; here 64 positions are split three to one."""
    longer = transformers.LlamaForCausalLM(
        transformers.LlamaConfig(**model.config.to_dict() | {"max_position_embeddings": 128})
    )
    for result in measure_within_context([longer, model]):
        assert (result.prompt_tokens, result.new_tokens) == (48, 16)


def test_random_ids_do_not_depend_on_the_global_state(model):
    expected = random_ids(model, 2, 5)
    torch.manual_seed(99)
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float16)
    torch.set_default_device("meta")
    try:
        ids = random_ids(model, 2, 5)
    finally:
        torch.set_default_device(None)
        torch.set_default_dtype(before)
    assert torch.equal(ids, expected)
    assert ids.dtype == torch.int64
