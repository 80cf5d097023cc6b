"""Corpora: how texts are joined, that the two splits of the built-in text are disjoint, and that bad input is refused."""

import json
import sys
import types

import pytest

from llmq.errors import LlmqError
from llmq.eval import corpus
from llmq.eval.corpus import is_conversations, load_conversations, load_text, split_topics


def paragraphs(text):
    return [" ".join(paragraph.split()) for paragraph in text.split("\n\n")]


def test_builtin_splits_share_no_paragraph_and_repeat_none():
    calibration, evaluation = load_text("builtin", "calibration"), load_text("builtin", "evaluation")
    assert len(calibration.text) > 200_000
    assert len(evaluation.text) > 40_000
    every = paragraphs(calibration.text) + paragraphs(evaluation.text)
    assert len(every) == len(set(every))
    assert "" not in every


def test_builtin_is_deterministic_and_names_the_python_version():
    first, second = load_text("builtin", "evaluation"), load_text("builtin", "evaluation")
    assert first == second
    assert f"{sys.version_info.major}.{sys.version_info.minor}." in first.description
    assert first.name == "builtin"
    assert "evaluation" in first.description


def test_topics_are_split_by_sorted_name_and_evaluation_comes_first():
    topics = {name: f"\nonly {name}\n\nshared\n  text\n" for name in "gfedcba"}
    parts = split_topics(topics)
    assert parts["evaluation"] == "only a\n\nshared\n  text\n\nonly f"
    assert parts["calibration"] == "\n\n".join(f"only {name}" for name in "bcdeg")
    assert split_topics(dict(sorted(topics.items()))) == parts


def test_builtin_without_the_help_topics_names_the_remedy(monkeypatch):
    monkeypatch.setitem(sys.modules, "pydoc_data.topics", None)
    with pytest.raises(LlmqError, match=r"pydoc_data\.topics, which this Python installation lacks; use the path"):
        load_text("builtin", "calibration")


@pytest.fixture
def fake_datasets(monkeypatch):
    """A stand-in for the `datasets` package: records its calls and answers with `answer`."""
    module = types.ModuleType("datasets")
    module.calls = []
    module.answer = lambda: None

    def load_dataset(*args, **kwargs):
        module.calls.append((args, kwargs))
        return module.answer()

    module.load_dataset = load_dataset
    monkeypatch.setitem(sys.modules, "datasets", module)
    return module


@pytest.mark.parametrize(("split", "part"), [("calibration", "train"), ("evaluation", "test")])
def test_wikitext2_joins_the_lines_of_its_part(fake_datasets, split, part):
    fake_datasets.answer = lambda: {"text": ["", " = Title = \n", "words \n"]}
    loaded = load_text("wikitext2", split)
    assert loaded.text == "\n\n = Title = \n\n\nwords \n"
    assert fake_datasets.calls == [(("Salesforce/wikitext", "wikitext-2-raw-v1"), {"split": part})]
    assert part in loaded.description
    assert loaded.max_tokens is None


def test_c4_evaluation_is_c4_new(fake_datasets):
    fake_datasets.answer = lambda: ({"text": f"d{i}"} for i in range(5000))
    loaded = load_text("c4", "evaluation")
    assert loaded.text == " ".join(f"d{i}" for i in range(1100))
    assert loaded.max_tokens == 256 * 2048
    assert "c4-new" in loaded.description
    ((name,), options), *rest = fake_datasets.calls
    assert not rest
    assert name == "allenai/c4"
    assert options["streaming"]
    assert options["data_files"] == {"validation": "en/c4-validation.00000-of-00008.json.gz"}


def test_c4_calibration_stops_reading_the_stream(fake_datasets):
    def stream():
        for index in range(corpus.C4_CALIBRATION_DOCUMENTS):
            yield {"text": f"d{index}"}
        pytest.fail("read more documents than needed")

    fake_datasets.answer = stream
    loaded = load_text("c4", "calibration")
    assert loaded.text.split("\n\n")[-1] == f"d{corpus.C4_CALIBRATION_DOCUMENTS - 1}"
    assert fake_datasets.calls[0][1]["data_files"] == {"train": "en/c4-train.00000-of-01024.json.gz"}


@pytest.mark.parametrize("dataset", ["wikitext2", "c4"])
def test_no_network_is_one_message_with_the_remedy(fake_datasets, dataset):
    def fail():
        raise ConnectionError("Couldn't reach the Hub\nsecond line")

    fake_datasets.answer = fail
    with pytest.raises(LlmqError, match="use `--dataset builtin` or the path of a text file") as caught:
        load_text(dataset, "evaluation")
    message = str(caught.value)
    assert message.startswith(f"dataset {dataset} could not be downloaded (ConnectionError: Couldn't reach the Hub)")
    assert "\n" not in message
    assert isinstance(caught.value.__cause__, ConnectionError)


def test_a_download_that_breaks_off_is_refused(fake_datasets):
    def stream():
        yield {"text": "d"}
        raise TimeoutError("late")

    fake_datasets.answer = stream
    with pytest.raises(LlmqError, match="c4 could not be downloaded"):
        load_text("c4", "calibration")


@pytest.mark.parametrize("answer", [{"text": []}, {"text": ["", ""]}])
def test_a_corpus_without_text_is_refused(fake_datasets, answer):
    fake_datasets.answer = lambda: answer
    with pytest.raises(LlmqError, match="wikitext2 must hold text; what was downloaded is empty"):
        load_text("wikitext2", "evaluation")


def test_missing_datasets_package_names_the_command(monkeypatch):
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(LlmqError, match="`pip install datasets`, or use `--dataset builtin`"):
        load_text("wikitext2", "evaluation")


@pytest.mark.parametrize("split", ["calibration", "evaluation"])
def test_a_file_is_the_same_text_for_both_splits(tmp_path, split):
    path = tmp_path / "text.txt"
    path.write_text("zwölf Wörter\n", encoding="utf-8")
    loaded = load_text(str(path), split)
    assert loaded.text == "zwölf Wörter\n"
    assert loaded.name == str(path)
    assert str(path) in loaded.description


def test_an_unknown_name_lists_the_names():
    with pytest.raises(LlmqError, match=r"builtin, wikitext2, c4 or the path of a text file; 'wikitext3' is neither"):
        load_text("wikitext3", "evaluation")


def test_a_folder_is_refused(tmp_path):
    with pytest.raises(LlmqError, match="is a folder; use a file in it"):
        load_text(str(tmp_path), "evaluation")


@pytest.mark.parametrize("content", [b"", b" \n\n"])
def test_an_empty_file_is_refused(tmp_path, content):
    path = tmp_path / "empty.txt"
    path.write_bytes(content)
    with pytest.raises(LlmqError, match=r"empty\.txt is empty; use `--dataset builtin`"):
        load_text(str(path), "calibration")


def test_a_file_that_is_not_utf8_is_refused_with_the_byte(tmp_path):
    path = tmp_path / "latin.txt"
    path.write_bytes("zwölf".encode("latin-1"))
    with pytest.raises(LlmqError, match=r"latin\.txt is not \(byte 2\); convert it"):
        load_text(str(path), "calibration")


GOOD = json.dumps({"messages": [{"role": "user", "content": "hello"}, {"role": "assistant", "content": "hi"}]})


def test_conversations_are_read_line_by_line(tmp_path):
    path = tmp_path / "chat.jsonl"
    path.write_text(f"{GOOD}\n\n{GOOD}\n")
    assert is_conversations(str(path))
    assert not is_conversations("builtin")
    with pytest.raises(LlmqError, match="must hold one text, but it holds conversations"):
        load_text(str(path), "calibration")
    loaded = load_conversations(str(path))
    assert [[m["role"] for m in messages] for messages in loaded] == [["user", "assistant"]] * 2


@pytest.mark.parametrize(
    "line", ["{", "[]", "{}", '{"messages": []}', '{"messages": "text"}', '{"messages": [{"role": "user"}]}']
)
def test_a_broken_line_is_named_by_its_number(tmp_path, line):
    path = tmp_path / "chat.jsonl"
    path.write_text(f"{GOOD}\n{line}\n")
    with pytest.raises(LlmqError, match="chat.jsonl, line 2: "):
        load_conversations(str(path))


def test_no_conversations_at_all(tmp_path):
    path = tmp_path / "chat.jsonl"
    path.write_text("\n")
    with pytest.raises(LlmqError, match="must hold conversations"):
        load_conversations(str(path))
    with pytest.raises(LlmqError, match="no such dataset file"):
        load_conversations(str(tmp_path / "none.jsonl"))


def test_an_unknown_split_is_refused():
    with pytest.raises(LlmqError, match="calibration or evaluation; got 'test'"):
        load_text("builtin", "test")


MESSAGES = [{"role": "user", "content": "one\u2028two\u0085three\u2029"}]


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig"])
@pytest.mark.parametrize("name", ["a.jsonl", "a.JSONL", "a.json", "a.txt"])
def test_conversations_are_recognized_by_content(tmp_path, name, encoding):
    rows = [{"messages": MESSAGES}] * 2
    lines = "\n".join(json.dumps(row, ensure_ascii=False) for row in rows)
    for content in (lines, json.dumps(rows, indent=1), f"\n{lines}\n\n"):
        (tmp_path / name).write_text(content, encoding=encoding)
        assert is_conversations(str(tmp_path / name))
        assert load_conversations(str(tmp_path / name)) == [MESSAGES] * 2


@pytest.mark.parametrize("content", ['{"text": "a\u2028"}\n{"text": "b"}', '[{"text": "a\u2028"}, {"text": "b"}]'])
def test_the_texts_of_records_are_joined_by_blank_lines(tmp_path, content):
    (tmp_path / "a.json").write_text(content, encoding="utf-8")
    corpus = load_text(str(tmp_path / "a.json"), "calibration")
    assert corpus.text == "a\u2028\n\nb"
    assert "2 records of" in str(corpus.note)


@pytest.mark.parametrize("content", ["{ braces } are text", "[1] A footnote.", "[1, 2]", '"quoted"', "{}\\n {"])
def test_text_that_only_begins_like_json_is_text(tmp_path, content):
    (tmp_path / "a.txt").write_text(content, encoding="utf-8-sig")
    corpus = load_text(str(tmp_path / "a.txt"), "calibration")
    assert (corpus.text, corpus.note) == (content, None)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.jsonl", '{"text": "a"}\n{"text": ', "line 2: not an object"),
        ("a.json", "[1, 2]", "line 1: not an object with messages or a text"),
        ("a.txt", '{"text": "a"}\nplain', "line 2: not an object"),
        ("a.jsonl", '{"prompt": "a"}', "line 1: a record must hold messages or a text; its keys are prompt; "),
        ("a.json", '[{"text": "a"}, {"text": 1}]', "record 2: a record must hold"),
        ("a.jsonl", '{"text": "\\ud83d"}', "line 1: text must be Unicode, and this holds half a surrogate pair"),
        ("a.csv", "text\na", "is a table"),
    ],
)
def test_other_records_are_refused_by_their_place(tmp_path, name, content, message):
    (tmp_path / name).write_text(content, encoding="utf-8")
    with pytest.raises(LlmqError, match=message):
        load_text(str(tmp_path / name), "calibration")
