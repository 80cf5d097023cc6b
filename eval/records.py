"""Files of records: JSON lines, or one JSON array, of objects that hold a conversation (`messages`) or a text (`text`).

A file is recognized by its content; an ending such as `.json` or `.jsonl` in any case says only that nothing else is
accepted. JSON lines end at a line feed and nowhere else: U+2028, U+2029 and U+0085 are valid inside a JSON string.

Left out: tables (CSV, Parquet) and records of other fields, which are refused; nested files.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from llmq.errors import LlmqError

JSON_ENDINGS = (".json", ".jsonl", ".ndjson")
TABLE_ENDINGS = (".csv", ".tsv")
REMEDY = "give every record `messages` (a list of {role, content}) or a `text`, or convert the file to plain text"


@dataclass(frozen=True)
class Record:
    """One object of a file.

    Fields:
        place: where it stands, for messages: file and line, or file and number.
        value: the object.
    """

    place: str
    value: dict[str, Any]


def parse_records(dataset: str, content: str) -> list[Record] | None:
    """The records of a file with this content; None where it is plain text.

    Raises `LlmqError`, naming the line, for broken JSON, for halves of surrogate pairs, and for tables.
    """
    ending = Path(dataset).suffix.lower()
    if ending in TABLE_ENDINGS:
        raise LlmqError(f"dataset files must be plain text or JSON records; {dataset} is a table ({ending}); {REMEDY}")
    declared = ending in JSON_ENDINGS
    if content.lstrip()[:1] not in ("{", "[") and not declared:
        return None
    whole = _whole(dataset, content)
    if whole is None and not declared and not isinstance(_first_line(content), dict):
        return None
    records = whole or _lines(dataset, content)
    for record in records:
        try:
            json.dumps(record.value, ensure_ascii=False).encode()
        except UnicodeEncodeError:
            raise LlmqError(
                f"{record.place}: text must be Unicode, and this holds half a surrogate pair; remove the record"
            ) from None
    return records


def record_text(record: Record) -> str:
    """The text of a record that holds no conversation. Raises `LlmqError` where there is none."""
    text = record.value.get("text")
    if not isinstance(text, str):
        keys = ", ".join(map(str, record.value)) or "none"
        raise LlmqError(f"{record.place}: a record must hold messages or a text; its keys are {keys}; {REMEDY}")
    return text


def record_messages(record: Record) -> list[dict[str, Any]]:
    """The conversation of a record. Raises `LlmqError` where it is none."""
    try:
        messages = record.value["messages"]
        good = isinstance(messages, list) and messages and all(m["role"] and "content" in m for m in messages)
    except (KeyError, TypeError) as error:
        raise LlmqError(f"{record.place}: not an object with messages ({error})") from None
    if not good:
        raise LlmqError(f"{record.place}: messages must be a list of objects with role and content")
    return list(messages)


def _whole(dataset: str, content: str) -> list[Record] | None:
    """The records of a file that is one JSON array of objects, or one object over several lines; else None."""
    try:
        value = json.loads(content)
    except (ValueError, RecursionError):
        return None
    if isinstance(value, dict) and "\n" in content.strip() and ("messages" in value or "text" in value):
        value = [value]
    if not isinstance(value, list) or not value or not all(isinstance(item, dict) for item in value):
        return None
    return [Record(f"{dataset}, record {number}", item) for number, item in enumerate(value, 1)]


def _first_line(content: str) -> object:
    try:
        return json.loads(content.lstrip().split("\n", 1)[0])
    except (ValueError, RecursionError):
        return None


def _lines(dataset: str, content: str) -> list[Record]:
    records = []
    for number, line in enumerate(content.split("\n"), 1):
        if not line.strip():
            continue
        place = f"{dataset}, line {number}"
        try:
            value = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise LlmqError(f"{place}: not an object with messages or a text ({error}); {REMEDY}") from None
        if not isinstance(value, dict):
            raise LlmqError(f"{place}: not an object with messages or a text ({type(value).__name__}); {REMEDY}")
        records.append(Record(place, value))
    return records
