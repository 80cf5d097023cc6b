"""Text for calibration and evaluation: a dataset's name in, one string out.

    builtin     the help topics that Python ships (`pydoc_data.topics`): every fifth topic by name for evaluation, the
                others for calibration; no network, about 17,000 and 74,000 tokens with a small BPE vocabulary
    wikitext2   wikitext-2-raw-v1, lines joined by a blank line (the GPTQ protocol); splits: train / test
    c4          allenai/c4, English: the first documents of training file 0 / the first 1,100 of validation file 0,
                joined by one space (`c4-new`, as in the GPTQ paper's camera-ready; not comparable with `c4` figures)
    PATH        a UTF-8 text file, the same text for both splits; JSON records of texts, which are joined by blank lines, or
                of conversations (`load_conversations`); see `llmq.eval.records`

The topics of `builtin` quote one another: whole sections occur in two or three of them, and almost half of the
evaluation topics' text occurs in other topics as well. Every paragraph is therefore kept once. The evaluation text is
taken first, so that no paragraph is in both texts. The text differs between Python versions; the description states the
version.

Left out: tables, the old random-crop protocol of C4, PTB. `datasets` is imported only by the two corpora
that need it.
"""

from __future__ import annotations

import platform
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any, Literal

from llmq.errors import LlmqError
from llmq.eval.records import Record, parse_records, record_messages, record_text

Split = Literal["calibration", "evaluation"]

OFFLINE_REMEDY = "use `--dataset builtin` or the path of a text file"
EVERY_TOPIC = 5
C4_CALIBRATION_DOCUMENTS = 4096  # about two million tokens: 1,000 windows of 2048
C4_EVALUATION_DOCUMENTS = 1100
C4_EVALUATION_TOKENS = 256 * 2048


@dataclass(frozen=True)
class Corpus:
    """One text and where it comes from.

    Fields:
        name: the requested dataset: `builtin`, `wikitext2`, `c4` or the path.
        text: the whole text.
        description: one line for the report: source, split and how the text was joined.
        max_tokens: maximum number of tokens that the corpus's protocol scores (c4: 256 windows of 2048); None for all.
        note: how a file of records was read; None for plain text.
    """

    name: str
    text: str
    description: str
    max_tokens: int | None = None
    note: str | None = None


def load_text(dataset: str, split: Split) -> Corpus:
    """The text of `dataset` for `split`.

    Raises `LlmqError` for a name that is neither a corpus nor a file, for a file that is unreadable, empty, not UTF-8
    or holds conversations, for an unknown split, and for a corpus that cannot be downloaded.
    """
    if split not in ("calibration", "evaluation"):
        raise LlmqError(f"split must be calibration or evaluation; got {split!r}")
    for name, loader in CORPORA:
        if dataset == name:
            return loader(split)
    return _file(dataset)


def _builtin(split: Split) -> Corpus:
    try:
        from pydoc_data.topics import topics
    except ImportError as error:
        raise LlmqError(
            "dataset builtin is read from pydoc_data.topics, which this Python installation lacks; "
            "use the path of a text file, or a Python with the complete standard library"
        ) from error
    text = split_topics(topics)[split]
    description = (
        f"help topics of Python {platform.python_version()} (pydoc_data.topics), {split} part, every paragraph once"
    )
    return Corpus("builtin", text, description)


def split_topics(topics: Mapping[str, str]) -> dict[Split, str]:
    """Disjoint evaluation and calibration texts made from `topics` alone.

    Paragraphs that differ only in white space count as equal. The evaluation text gets the paragraphs that both have.
    """
    names = sorted(topics)
    seen: set[str] = set()
    evaluation = _new_paragraphs((topics[name] for name in names[::EVERY_TOPIC]), seen)
    rest = (topics[name] for index, name in enumerate(names) if index % EVERY_TOPIC)
    return {"evaluation": evaluation, "calibration": _new_paragraphs(rest, seen)}


def _new_paragraphs(texts: Iterable[str], seen: set[str]) -> str:
    """The paragraphs of `texts` that are not in `seen`, joined by blank lines. They are added to `seen`."""
    kept = []
    for text in texts:
        for paragraph in text.strip().split("\n\n"):
            key = " ".join(paragraph.split())
            if key and key not in seen:
                seen.add(key)
                kept.append(paragraph)
    return "\n\n".join(kept)


def _wikitext2(split: Split) -> Corpus:
    part = {"calibration": "train", "evaluation": "test"}[split]
    lines = _download("wikitext2", lambda load: load("Salesforce/wikitext", "wikitext-2-raw-v1", split=part)["text"])
    return Corpus("wikitext2", "\n\n".join(lines), f"wikitext-2-raw-v1, {part} split, lines joined by a blank line")


def _c4(split: Split) -> Corpus:
    if split == "calibration":
        documents = _c4_documents("train", "en/c4-train.00000-of-01024.json.gz", C4_CALIBRATION_DOCUMENTS)
        description = f"allenai/c4 en, the first {len(documents)} documents of training file 00000"
        return Corpus("c4", "\n\n".join(documents), description)
    documents = _c4_documents("validation", "en/c4-validation.00000-of-00008.json.gz", C4_EVALUATION_DOCUMENTS)
    description = (
        f"allenai/c4 en, the first {len(documents)} documents of validation file 00000 joined by a space (c4-new)"
    )
    return Corpus("c4", " ".join(documents), description, C4_EVALUATION_TOKENS)


def _c4_documents(part: str, file: str, count: int) -> Sequence[str]:
    def read(load: Callable[..., Any]) -> list[str]:
        rows = load("allenai/c4", data_files={part: file}, split=part, streaming=True)
        return [row["text"] for row in islice(rows, count)]

    return _download("c4", read)


def _download(name: str, read: Callable[[Callable[..., Any]], Sequence[str]]) -> Sequence[str]:
    """`read(datasets.load_dataset)`, with every failure as an `LlmqError`."""
    try:
        from datasets import load_dataset  # type: ignore[import-untyped, unused-ignore]
    except ImportError as error:
        raise LlmqError(
            f"dataset {name} needs the datasets package, which is not installed; "
            f"`pip install datasets`, or {OFFLINE_REMEDY}"
        ) from error
    try:
        texts = read(load_dataset)
    # The hub client, its HTTP library and the decoders raise exceptions of their own, which change between versions.
    except Exception as error:
        reason = f"{type(error).__name__}: {error}".splitlines()[0]
        raise LlmqError(f"dataset {name} could not be downloaded ({reason}); {OFFLINE_REMEDY}") from error
    if not any(texts):
        raise LlmqError(f"dataset {name} must hold text; what was downloaded is empty; {OFFLINE_REMEDY}")
    return texts


def _file(dataset: str) -> Corpus:
    path = Path(dataset)
    names = ", ".join(name for name, _ in CORPORA)
    if not path.exists():
        raise LlmqError(
            f"dataset must be {names} or the path of a text file; {dataset!r} is neither a name nor an existing file; "
            f"use `--dataset builtin` or an existing file"
        )
    if path.is_dir():
        raise LlmqError(f"dataset must be {names} or the path of a text file; {dataset} is a folder; use a file in it")
    text = _read(path)
    records = parse_records(dataset, text) if text.strip() else []
    if _hold_conversations(records):
        raise LlmqError(f"{dataset} must hold one text, but it holds conversations; convert it to plain text")
    description = f"the text file {dataset}"
    if records:
        text = "\n\n".join(record_text(record) for record in records)
        description = f"{len(records)} records of {dataset}, their texts joined by blank lines"
    if not text.strip():
        raise LlmqError(f"dataset files must hold text; {dataset} is empty; {OFFLINE_REMEDY}")
    return Corpus(dataset, text, description, note=f"calibration text: {description}" if records else None)


def is_conversations(dataset: str) -> bool:
    """Whether `dataset` names a file of conversations (for `load_conversations`) rather than one text.

    Raises `LlmqError` for a file that cannot be read and for broken records.
    """
    if dataset in (name for name, _ in CORPORA) or not Path(dataset).is_file():
        return False
    return _hold_conversations(parse_records(dataset, _read(Path(dataset))))


def _hold_conversations(records: Sequence[Record] | None) -> bool:
    return bool(records) and records is not None and "messages" in records[0].value


def load_conversations(dataset: str) -> list[list[dict[str, Any]]]:
    """The conversations of a file of records, each of which holds `messages`: a list of {role, content}.

    Raises `LlmqError` for an unreadable or empty file, and for any other record, with its line or number.
    """
    path = Path(dataset)
    if not path.is_file():
        raise LlmqError(f"no such dataset file: {dataset}; use an existing file")
    conversations = [record_messages(record) for record in parse_records(dataset, _read(path)) or ()]
    if not conversations:
        raise LlmqError(f"dataset files must hold conversations; {dataset} is empty; {OFFLINE_REMEDY}")
    return conversations


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8-sig")  # a byte order mark is no text
    except UnicodeDecodeError as error:
        raise LlmqError(
            f"dataset files must be UTF-8 text; {path} is not (byte {error.start}); "
            f"convert it, for example with `iconv -t UTF-8`"
        ) from error
    except OSError as error:
        raise LlmqError(f"dataset file {path} cannot be read ({error.strerror}); {OFFLINE_REMEDY}") from error


CORPORA: tuple[tuple[str, Callable[[Split], Corpus]], ...] = (
    ("builtin", _builtin),
    ("wikitext2", _wikitext2),
    ("c4", _c4),
)
