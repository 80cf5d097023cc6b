"""`generate_fast`: the tokens of `generate` on every architecture, and steps that a CUDA graph can capture."""

from __future__ import annotations

from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch

import llmq
from llmq.hf import generation
from llmq.hf.generation import Decoder, generate_fast, host_traffic
from tests.fixtures import checkpoint
from tests.tiny import ARCHITECTURES, VOCAB, tiny_model

CPU = torch.device("cpu")


def prompt(batch: int, tokens: int = 11) -> torch.Tensor:
    return torch.randint(3, VOCAB, (batch, tokens), generator=torch.Generator().manual_seed(batch))


def greedy(model: Any, ids: torch.Tensor, count: int, **options: Any) -> torch.Tensor:
    return model.generate(ids, max_new_tokens=count, do_sample=False, **options)


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_it_writes_the_tokens_of_generate(arch: str) -> None:
    model = tiny_model(arch)
    model.generation_config.eos_token_id = None
    for batch in (1, 3):  # 35 tokens in all, more than sliding windows of 8 hold
        assert torch.equal(generate_fast(model, prompt(batch), 24), greedy(model, prompt(batch), 24))


@pytest.mark.parametrize("arch", [arch for arch in ARCHITECTURES if arch not in ("falcon", "bloom")])
def test_a_step_has_no_host_traffic(arch: str) -> None:
    """Falcon makes a constant from host memory in every step, bloom in some versions; they are decoded eagerly."""
    decoder = Decoder(tiny_model(arch), 2, 40)
    decoder.prefill(prompt(2))
    with torch.inference_mode():
        assert host_traffic(decoder._step, CPU) == ()


def test_host_traffic_names_operators_that_wait_for_the_host() -> None:
    value = torch.zeros(1)
    for step in (lambda: value.item(), lambda: bool(value), lambda: torch.tensor([1]), lambda: value.nonzero()):
        assert host_traffic(step, CPU)
    assert host_traffic(lambda: value.add_(1), CPU) == ()


def test_it_ends_where_generate_ends() -> None:
    model, ids = tiny_model("llama"), prompt(3)
    model.generation_config.eos_token_id = None
    words = greedy(model, ids, 40)[:, 11:]
    for ends in ([int(words[0, 4])], words[:, 6].tolist(), words[0, :2].tolist(), [VOCAB - 1]):
        model.generation_config.eos_token_id = ends
        for pad in (0, None):
            model.generation_config.pad_token_id = pad
            assert torch.equal(generate_fast(model, ids, 40), greedy(model, ids, 40)), ends
    assert torch.equal(generate_fast(model, ids, 1), greedy(model, ids, 1))


@pytest.mark.parametrize("arch", ["llama", "gemma3_text", "opt", "bloom"])
def test_padding_on_the_left(arch: str) -> None:
    model = tiny_model(arch)
    model.generation_config.eos_token_id = None
    mask = torch.ones(3, 11, dtype=torch.long)
    mask[1, :4] = mask[2, :7] = 0
    want = greedy(model, prompt(3), 20, attention_mask=mask)
    decoder = Decoder(model, 3, 40)
    assert torch.equal(generate_fast(model, prompt(3), 20, mask, decoder), want)
    assert torch.equal(generate_fast(model, prompt(3), 20, None, decoder), greedy(model, prompt(3), 20))
    assert torch.equal(generate_fast(model, prompt(3), 20, mask, decoder), want)


@pytest.mark.parametrize("fuse", [False, True], ids=["plain", "fused"])
def test_packed_and_fused_models(tmp_path: Path, fuse: bool) -> None:
    model = llmq.load(checkpoint(tmp_path / "a"), fuse=fuse)
    assert torch.equal(llmq.generate_fast(model, prompt(2), 16), greedy(model, prompt(2), 16))


def test_the_step_is_captured_once_per_mask_and_then_replayed(monkeypatch: pytest.MonkeyPatch) -> None:
    """The order of calls only. Fakes replace CUDA's: the fake graph runs the step eagerly when it is replayed."""
    model = tiny_model("llama")
    model.generation_config.eos_token_id = None
    decoder, captured, replayed = Decoder(model, 1, 40), [], []

    class Graph:
        def replay(self) -> None:
            replayed.append(1)
            decoder._step()

    @contextmanager
    def capture(graph: Graph) -> Any:
        captured.append(graph)
        yield

    stream = type("Stream", (), {"__init__": lambda *_: None, "wait_stream": lambda *_: None})
    for name, stand_in in (("CUDAGraph", Graph), ("graph", capture), ("Stream", stream)):
        monkeypatch.setattr(torch.cuda, name, stand_in)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda _: stream())
    for name in ("stream", "device"):
        monkeypatch.setattr(torch.cuda, name, lambda _: nullcontext())
    decoder.eager_because = None
    for length in (11, 5, 11):
        assert torch.equal(decoder.generate(prompt(1, length), 24), greedy(model, prompt(1, length), 24))
    assert (len(captured), len(replayed)) == (1, 3 * 23)
    mask = torch.tensor([[0] * 4 + [1] * 7])
    assert torch.equal(decoder.generate(prompt(1), 9, mask), greedy(model, prompt(1), 9, attention_mask=mask))
    assert len(captured) == 2, "a step with a mask is captured anew"
    monkeypatch.setattr(generation, "host_traffic", lambda *_: ("item",))
    other = Decoder(model, 1, 40)
    other.eager_because = None
    assert torch.equal(other.generate(prompt(1), 9), greedy(model, prompt(1), 9))
    assert other.eager_because == "a step of this model waits for the host (item)"


def test_bad_requests_are_refused() -> None:
    model, ids = tiny_model("llama"), prompt(2)
    decoder = Decoder(model, 2, 20)
    assert decoder.eager_because == "CUDA graphs need a CUDA device; the model is on cpu"
    mask = torch.ones(2, 11)
    mask[0, 10] = 0
    refused = [
        ((ids[0], 4), r"input_ids must be \[B, T\] with B and T at least 1; got \[11\]"),
        ((ids[:, :0], 4), r"with B and T at least 1; got \[2, 0\]"),
        ((ids, 0), "max_new_tokens must be at least 1; got 0"),
        ((ids, 200), "must fit in the model's context of 128 tokens; got 211"),
        ((ids, 10, None, decoder), r"holds 2 sequences of at most 20 tokens, prompt included; got 2 of 11 \+ 10"),
        ((ids[:1], 4, None, decoder), "got 1 of 11"),
        ((ids, 4, mask), r"attention_mask must be \[2, 11\] with padding on the left only"),
        ((ids, 4, torch.ones(2, 10)), r"attention_mask must be \[2, 11\]"),
        ((ids.float(), 4), "must be an integer tensor, int64 .*; got torch.float32"),
        ((ids.tolist(), 4), "must be an integer tensor, int64 .*; got list"),
        ((ids, 1.5), "max_new_tokens must be an integer; got 1.5"),
    ]
    for arguments, message in refused:
        with pytest.raises(llmq.LlmqError, match=message):
            generate_fast(model, *arguments)
    for name, value in (("repetition_penalty", 1.1), ("num_beams", 2), ("bad_words_ids", [[5]])):
        other = tiny_model("llama")
        setattr(other.generation_config, name, value)
        with pytest.raises(llmq.LlmqError, match=f"is greedy only, but generation_config.{name} is"):
            generate_fast(other, ids, 4)


def test_other_kinds_of_cache_are_refused() -> None:
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.for_model(
        "qwen3_next", vocab_size=VOCAB, hidden_size=64, intermediate_size=64, num_hidden_layers=2, num_experts=0,
        layer_types=["linear_attention", "full_attention"],
    )  # fmt: skip
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    with pytest.raises(
        llmq.LlmqError, match="generate_fast supports attention caches only; layer 0 caches in a .*: use generate"
    ):
        generation.static_cache(model, 16)
