"""Windows are full and disjoint, and the seed alone decides which are drawn."""

import json
from types import SimpleNamespace

import pytest
import torch

from llmq.calibration import check_token_ids, cut_windows, read_tokens, tokenize
from llmq.errors import LlmqError


class Tokenizer:
    """One id per character. Fails where a tokenizer of transformers would print a warning."""

    def __call__(self, text, verbose=True):
        assert not verbose, "the warning about a text longer than the context would be printed"
        return {"input_ids": [1, *map(ord, text)]}


SMALL = SimpleNamespace(vocab_size=10, max_position_embeddings=4)


@pytest.mark.parametrize(
    ("ids", "message"),
    [
        ([[1, 12]], "vocabulary of 10; they range from 1 to 12"),
        ([[-1, 2]], "they range from -1"),
        ([[1] * 5], "context of 4 tokens; got 5 tokens"),
        ([1, 2], "windows, tokens"),
        ([[1.5, 2.0]], "must be int64"),
        ("text", "must be a Calibration or token ids"),
    ],
)
def test_the_callers_token_ids_are_checked(ids, message):
    with pytest.raises(LlmqError, match=message):
        check_token_ids(ids, SMALL)
    assert check_token_ids([[1, 2], [3, 4]], SMALL).tolist() == [[1, 2], [3, 4]]


def test_tokenize_is_one_flat_int64_stream_with_special_tokens():
    ids = tokenize(Tokenizer(), "ab")
    assert ids.dtype == torch.int64
    assert ids.tolist() == [1, 97, 98]


def test_tokenize_of_empty_text_is_an_empty_stream():
    ids = tokenize(lambda text, **_: {"input_ids": list(map(ord, text))}, "")
    assert ids.shape == (0,)
    assert ids.dtype == torch.int64


def test_draw_is_the_documented_permutation():
    ids = torch.arange(107)
    drawn = cut_windows(ids, num_samples=4, seq_len=10, seed=3)
    order = torch.randperm(10, generator=torch.Generator().manual_seed(3))[:4]
    assert torch.equal(drawn, torch.stack([ids[10 * i : 10 * i + 10] for i in order.tolist()]))
    assert not torch.equal(drawn, cut_windows(ids, num_samples=4, seq_len=10, seed=4))


def test_draw_leaves_the_global_generator_alone():
    before = torch.random.get_rng_state()
    cut_windows(torch.arange(100), num_samples=2, seq_len=10, seed=0)
    assert torch.equal(before, torch.random.get_rng_state())


@pytest.mark.parametrize("num_samples", [10, 11, 500])
def test_fewer_windows_than_requested_are_all_used_in_the_order_of_the_text(num_samples):
    ids = torch.arange(107)
    assert torch.equal(cut_windows(ids, num_samples, seq_len=10, seed=0), ids[:100].view(10, 10))


def test_one_exact_window_is_enough_and_one_token_less_is_not():
    assert cut_windows(torch.arange(16), 4, 16, 0).shape == (1, 16)
    with pytest.raises(LlmqError, match=r"15 tokens and a window has 16; use a longer text or a seq_len of at most 15"):
        cut_windows(torch.arange(15), 4, 16, 0)


def test_an_empty_stream_is_refused_without_advice_on_seq_len():
    with pytest.raises(LlmqError, match=r"0 tokens and a window has 16; use a longer text$"):
        cut_windows(torch.empty(0, dtype=torch.int64), 4, 16, 0)


@pytest.mark.parametrize("sizes", [{"num_samples": 0, "seq_len": 4}, {"num_samples": 4, "seq_len": 0}])
def test_sizes_below_one_are_refused(sizes):
    with pytest.raises(LlmqError, match="at least 1; got 0"):
        cut_windows(torch.arange(10), seed=0, **sizes)


def test_transformers_prints_no_length_warning(caplog, capfd):
    transformers = pytest.importorskip("transformers")
    tokenizers = pytest.importorskip("tokenizers")
    words = tokenizers.Tokenizer(tokenizers.models.WordLevel({"a": 0, "?": 1}, unk_token="?"))
    words.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=words, model_max_length=4)
    assert tokenize(tokenizer, "a " * 20).tolist() == [0] * 20
    assert "longer than" not in caplog.text + capfd.readouterr().err


class Chat:
    chat_template = "yes"

    def __call__(self, text, add_special_tokens=True, verbose=True):
        assert not add_special_tokens, "the template writes them"
        return {"input_ids": list(map(ord, text))}

    def apply_chat_template(self, messages, tokenize):
        assert not tokenize
        if any(m["role"] == "system" for m in messages):
            raise ValueError("no system role here")
        return "".join(f"<{m['role']}>{m['content']}" for m in messages)


def conversations(path, role="user"):
    line = json.dumps({"messages": [{"role": role, "content": "a"}]})
    path.write_text(f"{line}\n{line}\n")
    return str(path)


def test_conversations_go_through_the_chat_template_and_are_concatenated(tmp_path):
    ids, corpus = read_tokens(conversations(tmp_path / "a.jsonl"), "calibration", Chat())
    assert "".join(map(chr, ids.tolist())) == "<user>a<user>a" == corpus.text
    assert ids.dtype == torch.int64
    assert corpus.description.startswith("2 conversations of ")


def test_conversations_that_no_chat_template_accepts_are_refused(tmp_path):
    with pytest.raises(LlmqError, match="conversations need a chat template; the model's tokenizer has none"):
        read_tokens(conversations(tmp_path / "a.jsonl"), "calibration", Tokenizer())
    with pytest.raises(LlmqError, match="does not fit the model's chat template: no system role here"):
        read_tokens(conversations(tmp_path / "b.jsonl", "system"), "calibration", Chat())
