"""Divergence equals the formula on whole logits in float64, is zero against itself, and refuses what cannot be compared."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor

from llmq.errors import LlmqError
from llmq.eval import slabs
from llmq.eval.divergence import divergence
from llmq.eval.perplexity import perplexity
from tests.tiny import VOCAB, tiny_config, tiny_model

WINDOW = 40
IDS = torch.randint(3, VOCAB, (3 * WINDOW + 7,), generator=torch.Generator().manual_seed(1))


def by_hand(original: torch.nn.Module, other: torch.nn.Module) -> tuple[Tensor, Tensor]:
    """KL and agreement of each window's predicted positions."""
    windows = IDS[: 3 * WINDOW].view(3, WINDOW)
    with torch.no_grad():
        p, q = (model(input_ids=windows).logits[:, :-1].double().log_softmax(-1) for model in (original, other))
    return (p.exp() * (p - q)).sum(-1).mean(-1), (p.argmax(-1) == q.argmax(-1)).double().mean(-1)


@pytest.mark.parametrize("arch", ["llama", "gemma2", "cohere"])
def test_it_is_the_formula_also_in_slabs(arch: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(slabs, "SLAB_LOGITS", 15 * VOCAB)
    original, other = tiny_model(arch), tiny_model(arch, seed=1)
    kl, agreed = by_hand(original, other)
    found = divergence(original, other, IDS, WINDOW)
    torch.testing.assert_close(torch.tensor(found.window_kl).double(), kl, rtol=1e-4, atol=1e-6)
    assert found.kl == pytest.approx(float(kl.mean()), rel=1e-4)
    assert found.kl_stderr == pytest.approx(float(kl.std() / 3**0.5), rel=1e-3)
    assert found.top1 == pytest.approx(float(agreed.mean()))
    assert found.top1_stderr == pytest.approx(float(agreed.std() / 3**0.5))
    assert (found.tokens, found.windows, found.window) == (3 * (WINDOW - 1), 3, WINDOW)
    assert divergence(original, other, IDS, WINDOW, limit=1).kl_stderr is None


def test_a_model_does_not_diverge_from_itself() -> None:
    model = tiny_model("llama").train()
    found = divergence(model, copy.deepcopy(model), IDS, WINDOW)
    assert abs(found.kl) < 1e-6
    assert found.top1 == 1
    assert model.training, "left as it was"


def test_other_vocabularies_and_broken_models_are_refused() -> None:
    model = tiny_model("llama")
    config = tiny_config("llama")
    config.vocab_size = VOCAB + 1
    with pytest.raises(LlmqError, match="the original has 128 words, the other 129"):
        divergence(model, type(model)(config), IDS, WINDOW)
    broken = tiny_model("llama")
    broken.lm_head.weight.data[5] = float("nan")
    with pytest.raises(LlmqError, match="window 0"):
        divergence(model, broken, IDS, WINDOW)


@pytest.mark.parametrize("batch_size", [1, 2])
def test_the_perplexity_comes_out_of_the_same_pass(batch_size: int) -> None:
    original, other = tiny_model("llama"), tiny_model("llama", seed=1)
    found = divergence(original, other, IDS, WINDOW, batch_size=batch_size).perplexity
    alone = perplexity(other, IDS, WINDOW)
    assert found.window_nats == pytest.approx(alone.window_nats, rel=1e-6)
    assert (found.fingerprint, found.tokens, found.protocol) == (alone.fingerprint, alone.tokens, alone.protocol)
    assert found.value == pytest.approx(alone.value, rel=1e-6)


def test_windows_fit_the_shorter_of_both_contexts() -> None:
    long, short = tiny_model("llama"), tiny_model("llama", seed=1)
    short.config.max_position_embeddings = 24
    for original, other in ((long, short), (short, long)):
        found = divergence(original, other, IDS, WINDOW)
        assert (found.window, found.perplexity.window) == (24, 24)
        assert found.perplexity.notes == ("window reduced from 40 to the model's context of 24 tokens",)
