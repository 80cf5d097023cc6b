"""Divergence equals the formula on whole logits in float64, is 0 between equal models, and refuses unequal vocabularies."""

from __future__ import annotations

import copy
import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from transformers.modeling_outputs import CausalLMOutput

from llmq.errors import LlmqError
from llmq.eval import slabs
from llmq.eval.divergence import DIVERGENCE, divergence, kl_divergence
from llmq.eval.perplexity import PERPLEXITY, perplexity
from llmq.eval.scoring import score
from tests.tiny import VOCAB, tiny_config, tiny_model

WINDOW = 40
PADDED_FROM = 100
IDS = torch.randint(3, PADDED_FROM, (3 * WINDOW + 7,), generator=torch.Generator().manual_seed(1))


def reference(original: nn.Module, other: nn.Module) -> tuple[Tensor, Tensor]:
    """KL and top-1 agreement of each window, from whole logits in float64."""
    windows = IDS[: 3 * WINDOW].view(3, WINDOW)
    with torch.no_grad():
        p, q = (model(input_ids=windows).logits[:, :-1].double().log_softmax(-1) for model in (original, other))
    terms = torch.where(p == -math.inf, 0.0, p.exp() * (p - q))
    return terms.sum(-1).mean(-1), (p.argmax(-1) == q.argmax(-1)).double().mean(-1)


class Wrapped(nn.Module):
    """A causal LM around another one, which changes its logits."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.base_model, self.lm_head = inner.model, inner.lm_head
        self.get_input_embeddings = inner.get_input_embeddings

    def forward(self, input_ids: Tensor, use_cache: bool | None = None) -> CausalLMOutput:
        logits = self.lm_head(self.base_model(input_ids=input_ids, use_cache=use_cache).last_hidden_state)
        return CausalLMOutput(logits=self.changed(logits))


class Padded(Wrapped):
    """The last tokens of the vocabulary are padding, which is never predicted."""

    def changed(self, logits: Tensor) -> Tensor:
        return logits.index_fill(-1, torch.arange(PADDED_FROM, VOCAB), -math.inf)


class Mixing(Wrapped):
    """The head mixes positions, so that it cannot run on slabs of rows."""

    def changed(self, logits: Tensor) -> Tensor:
        return logits - logits.mean(1, keepdim=True)


class PaddedMixing(Mixing):
    """Both: masked logits must not hide that the others differ."""

    def changed(self, logits: Tensor) -> Tensor:
        return super().changed(logits).index_fill(-1, torch.arange(PADDED_FROM, VOCAB), -math.inf)


class Narrow(Wrapped):
    """Gives logits for fewer tokens than it embeds."""

    def changed(self, logits: Tensor) -> Tensor:
        return logits[..., :PADDED_FROM]


@pytest.mark.parametrize("arch", ["llama", "gemma2", "cohere"])
def test_equals_the_formula_in_slabs(arch: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(slabs, "SLAB_LOGITS", 15 * VOCAB)
    original, other = tiny_model(arch), tiny_model(arch, seed=1)
    kl, top1 = reference(original, other)
    result = divergence(original, other, IDS, WINDOW)
    torch.testing.assert_close(torch.tensor(result.window_kl).double(), kl, rtol=1e-4, atol=1e-6)
    assert result.kl == pytest.approx(float(kl.mean()), rel=1e-4)
    assert result.kl_stderr == pytest.approx(float(kl.std() / 3**0.5), rel=1e-3)
    assert result.top1 == pytest.approx(float(top1.mean()))
    assert result.top1_stderr == pytest.approx(float(top1.std() / 3**0.5))
    assert (result.tokens, result.windows, result.window) == (3 * (WINDOW - 1), 3, WINDOW)
    assert divergence(original, other, IDS, WINDOW, limit=1).kl_stderr is None


@pytest.mark.parametrize("wrapped", ["original", "other"])
def test_slabs_match_if_only_one_head_needs_all_positions(wrapped: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(slabs, "SLAB_LOGITS", 15 * VOCAB)
    original, other = tiny_model("llama"), tiny_model("llama", seed=1)
    if wrapped == "original":
        original = Mixing(original).eval()
    else:
        other = Mixing(other).eval()
    results = score((PERPLEXITY, DIVERGENCE), other, IDS, original=original, window=WINDOW)
    assert results["divergence"].kl == pytest.approx(float(reference(original, other)[0].mean()), rel=1e-4)
    assert results["perplexity"].notes == (
        "logits were computed all at once: the model's head cannot be run on slabs of rows",
    )


def test_a_model_does_not_diverge_from_itself() -> None:
    model = tiny_model("llama").train()
    result = divergence(model, copy.deepcopy(model), IDS, WINDOW)
    assert abs(result.kl) < 1e-6
    assert result.top1 == 1
    assert model.training, "the training flag is restored"


logit = st.one_of(st.floats(-200, 200, width=32), st.just(-math.inf))
rows = st.lists(st.tuples(logit, logit), min_size=1, max_size=8).filter(
    lambda pairs: all(max(side) > -math.inf for side in zip(*pairs, strict=True))
)


def kl_in_float64(p: list[float], q: list[float]) -> float:
    """The definition, one token at a time, with 0 log 0 = 0."""

    def log_softmax(logits: list[float]) -> list[float]:
        top = max(logits)
        total = math.log(math.fsum(math.exp(x - top) for x in logits))
        return [x - top - total for x in logits]

    total = 0.0
    for log_p, log_q in zip(log_softmax(p), log_softmax(q), strict=True):
        if log_p > -math.inf:
            total += math.inf if log_q == -math.inf else math.exp(log_p) * (log_p - log_q)
    return total


@given(rows)
@settings(max_examples=300, deadline=None)
def test_kl_of_a_row_equals_the_definition(pairs: list[tuple[float, float]]) -> None:
    p, q = map(list, zip(*pairs, strict=True))
    kl = kl_divergence(torch.tensor([p]), torch.tensor([q]))
    assert kl.dtype == torch.float32
    assert float(kl) == pytest.approx(kl_in_float64(p, q), rel=1e-4, abs=1e-4)


@pytest.mark.parametrize(
    ("p", "q", "expected"),
    [
        ([0.0, -math.inf], [0.0, 0.0], math.log(2)),
        ([0.0, -math.inf], [0.0, -math.inf], 0.0),
        ([0.0, 0.0], [0.0, -math.inf], math.inf),
        ([0.0, -150.0], [0.0, -math.inf], math.inf),  # p > 0, although it underflows in float32
    ],
)
def test_kl_with_excluded_tokens(p: list[float], q: list[float], expected: float) -> None:
    assert float(kl_divergence(torch.tensor([p]), torch.tensor([q]))) == pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_kl_of_broken_logits_is_nan(bad: float) -> None:
    good, broken = torch.tensor([[0.0, 1.0]]), torch.tensor([[0.0, bad]])
    assert kl_divergence(good, broken).isnan()
    assert kl_divergence(broken, good).isnan()


def test_a_padded_vocabulary_adds_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(slabs, "SLAB_LOGITS", 15 * VOCAB)
    plain, other = tiny_model("llama"), tiny_model("llama", seed=1)
    padded = Padded(plain).eval(), Padded(other).eval()
    results = score((PERPLEXITY, DIVERGENCE), padded[1], IDS, original=padded[0], window=WINDOW)
    assert results["divergence"].kl == pytest.approx(float(reference(*padded)[0].mean()), rel=1e-4)
    assert results["perplexity"].notes == (), "logits of -inf do not prevent slabs"
    assert "at once" in perplexity(PaddedMixing(plain).eval(), IDS, WINDOW).notes[0]
    assert divergence(padded[0], other, IDS, WINDOW).kl > results["divergence"].kl
    with pytest.raises(LlmqError, match=r"KL must be finite; window 0 \(counted from 0\) has inf"):
        divergence(plain, padded[1], IDS, WINDOW)


@pytest.mark.parametrize("padded", ["original", "other"])
def test_a_vocabulary_padded_in_one_model_is_compared_on_the_common_tokens(padded: str, monkeypatch: Any) -> None:
    monkeypatch.setattr(slabs, "SLAB_LOGITS", 15 * VOCAB)
    original, other = tiny_model("llama"), tiny_model("llama", seed=1)
    expected = divergence(original, other, IDS, WINDOW)
    (original if padded == "original" else other).resize_token_embeddings(VOCAB + 32)
    found = divergence(original, other, IDS, WINDOW)
    assert found.kl == pytest.approx(expected.kl, rel=1e-4)
    assert "compared on the first 128 tokens" in " ".join(found.notes)
    assert divergence(original, original, IDS, WINDOW).kl == pytest.approx(0, abs=1e-6)


def test_fewer_logits_than_embedded_tokens_are_compared_on_the_common_ones() -> None:
    model = tiny_model("llama")
    assert divergence(model, Narrow(model).eval(), IDS, WINDOW).kl == pytest.approx(0, abs=1e-6)


def test_other_vocabularies_and_broken_models_are_refused() -> None:
    model = tiny_model("llama")
    config = tiny_config("llama")
    config.vocab_size = 2 * VOCAB
    with pytest.raises(LlmqError, match="the original has 128 tokens, the other model 256"):
        divergence(model, type(model)(config), IDS, WINDOW)
    with pytest.raises(LlmqError, match="divergence needs the original model; got None"):
        score((DIVERGENCE,), model, IDS, window=WINDOW)
    broken = tiny_model("llama")
    broken.lm_head.weight.data[5] = float("nan")
    with pytest.raises(LlmqError, match="KL must be finite; window 0"):
        divergence(model, broken, IDS, WINDOW)


@pytest.mark.parametrize("batch_size", [1, 2])
def test_one_pass_gives_the_same_perplexity(batch_size: int) -> None:
    original, other = tiny_model("llama"), tiny_model("llama", seed=1)
    both = (PERPLEXITY, DIVERGENCE)
    result = score(both, other, IDS, original=original, window=WINDOW, batch_size=batch_size)["perplexity"]
    assert result == perplexity(other, IDS, WINDOW, batch_size=batch_size)


def test_windows_fit_the_shorter_context() -> None:
    long, short = tiny_model("llama"), tiny_model("llama", seed=1)
    short.config.max_position_embeddings = 24
    for original, other in ((long, short), (short, long)):
        results = score((PERPLEXITY, DIVERGENCE), other, IDS, original=original, window=WINDOW)
        assert (results["divergence"].window, results["perplexity"].window) == (24, 24)
        assert results["perplexity"].notes == ("window reduced from 40 to the model's context of 24 tokens",)


def test_results_do_not_depend_on_the_default_dtype() -> None:
    original, other = tiny_model("llama"), tiny_model("llama", seed=1)
    expected = divergence(original, other, IDS, WINDOW)
    torch.set_default_dtype(torch.float16)
    try:
        result = divergence(original, other, IDS, WINDOW)
    finally:
        torch.set_default_dtype(torch.float32)
    assert result == expected
