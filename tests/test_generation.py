"""`generate_fast`: the tokens of `generate`, on every architecture, and steps that a CUDA graph could hold."""

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
def test_it_writes_what_generate_writes(arch: str) -> None:
    model = tiny_model(arch)
    model.generation_config.eos_token_id = None
    for batch in (1, 3):  # 24 tokens more than windows of 8 have
        assert torch.equal(generate_fast(model, prompt(batch), 24), greedy(model, prompt(batch), 24))


@pytest.mark.parametrize("arch", [arch for arch in ARCHITECTURES if arch not in ("falcon", "bloom")])
def test_a_step_leaves_the_host_alone(arch: str) -> None:
    """Falcon makes a constant of host memory in every step, bloom does in some versions: they are decoded eagerly."""
    decoder = Decoder(tiny_model(arch), 2, 40)
    decoder.prefill(prompt(2))
    with torch.inference_mode():
        assert host_traffic(decoder._step, CPU) == ()


def test_what_waits_for_the_host_is_seen() -> None:
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
def test_packed_models(tmp_path: Path, fuse: bool) -> None:
    model = llmq.load(checkpoint(tmp_path / "a"), fuse=fuse)
    assert torch.equal(llmq.generate_fast(model, prompt(2), 16), greedy(model, prompt(2), 16))


def test_a_graph_is_captured_once_and_replayed(monkeypatch: pytest.MonkeyPatch) -> None:
    """CUDA's calls stood in for: a graph that runs the step it was captured from."""
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
    assert len(captured) == 2, "a step with a mask is another one"
    monkeypatch.setattr(generation, "host_traffic", lambda *_: ("item",))
    other = Decoder(model, 1, 40)
    other.eager_because = None
    assert torch.equal(other.generate(prompt(1), 9), greedy(model, prompt(1), 9))
    assert other.eager_because == "a step of this model waits for the host (item)"


def test_bad_requests_are_refused() -> None:
    model, ids = tiny_model("llama"), prompt(2)
    decoder = Decoder(model, 2, 20)
    assert decoder.eager_because == "CUDA graphs are for CUDA devices; the model is on cpu"
    mask = torch.ones(2, 11)
    mask[0, 10] = 0
    refused = [
        ((ids[0], 4), r"input_ids must be \[B, T\], neither of them 0; got \[11\]"),
        ((ids[:, :0], 4), r"neither of them 0; got \[2, 0\]"),
        ((ids, 0), "max_new_tokens must be at least 1; got 0"),
        ((ids, 200), "must fit the model's context of 128; got 211"),
        ((ids, 10, None, decoder), r"is for 2 sequences of 20 tokens in all; got 2 of 11 \+ 10"),
        ((ids[:1], 4, None, decoder), "got 1 of 11"),
        ((ids, 4, mask), r"attention_mask must be \[2, 11\] with padding on the left alone"),
        ((ids, 4, torch.ones(2, 10)), r"attention_mask must be \[2, 11\]"),
        ((ids.float(), 4), "must be a tensor of whole numbers, int64 .*; got torch.float32"),
        ((ids.tolist(), 4), "must be a tensor of whole numbers, int64 .*; got list"),
        ((ids, 1.5), "max_new_tokens must be a whole number; got 1.5"),
    ]
    for arguments, message in refused:
        with pytest.raises(llmq.LlmqError, match=message):
            generate_fast(model, *arguments)
    for name, value in (("repetition_penalty", 1.1), ("num_beams", 2), ("bad_words_ids", [[5]])):
        other = tiny_model("llama")
        setattr(other.generation_config, name, value)
        with pytest.raises(llmq.LlmqError, match=f"takes the likeliest token, and {name} is"):
            generate_fast(other, ids, 4)


def test_caches_of_other_kinds_are_refused() -> None:
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.for_model(
        "qwen3_next", vocab_size=VOCAB, hidden_size=64, intermediate_size=64, num_hidden_layers=2, num_experts=0,
        layer_types=["linear_attention", "full_attention"],
    )  # fmt: skip
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    with pytest.raises(
        llmq.LlmqError, match="generate_fast is for plain attention; layer 0 caches in a .*: use generate"
    ):
        generation.static_cache(model, 16)
