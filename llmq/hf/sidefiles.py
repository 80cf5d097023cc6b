"""Files next to the weights: config, generation config, tokenizer, processors, chat template.

The config is the model's own, with the new dtype and the `quantization_config`. All data files are copied unchanged from
a source folder, whatever they are called (`DATA_FILES`); what stays behind is noted. A tokenizer that comes from a GGUF
file or from the caller is written by its `save_pretrained`. Code is never copied, and references to code (`auto_map`) are
removed.

Nothing here depends on quantized weights, so everything can be written, and can fail, before a block is quantized.
"""

from __future__ import annotations

import copy
import json
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

import torch
from transformers import AutoTokenizer, PreTrainedModel

from llmq.errors import LlmqError
from llmq.names import first_names

CONFIG = "config.json"
GENERATION = "generation_config.json"
TOKENIZER_CONFIG = "tokenizer_config.json"
PROCESSOR_CONFIGS = ("preprocessor_config.json", "processor_config.json", "video_preprocessor_config.json")
# Data beside the weights: files of tokenizers and processors, and a folder that holds templates alone.
DATA_FILES = (
    "*.json",
    "*.jsonl",
    "*.txt",
    "*.model",
    "*.tiktoken",
    "*.jinja",
    "vocab.*",
    "additional_chat_templates/*",
)
# What describes the source's weights or its adapters, and what is written anew.
_NOT_COPIED = (
    "config.json",
    "generation_config.json",
    "*.index.json",
    "adapter_*",
    "llmq_report.json",
    "quantize_config.json",
    "quant_config.json",
    "params.json",
)
# Neither code, nor weights of any framework, nor a page for people.
_NOT_DATA = (".py", ".bin", ".so", ".pkl", ".pt", ".pth", ".safetensors", ".gguf", ".h5", ".msgpack", ".onnx")


class SideFiles:
    """Where the tokenizer and the generation config of a source come from. The tokenizer is loaded on first use.

    Arguments:
        folder: the folder of the source; None for a loaded model.
        gguf_file: name of the GGUF file in `folder` that holds the tokenizer, if any.
        tokenizer: a tokenizer that the caller already has.
        name: a folder or repo id from which the tokenizer of a loaded model can be loaded.
    """

    def __init__(
        self, folder: Path | None = None, gguf_file: str | None = None, tokenizer: Any = None, name: str = ""
    ) -> None:
        self._folder, self._gguf_file, self._name = folder, gguf_file, name
        self._tokenizer = tokenizer
        self._failure: str | None = None  # why the tokenizer cannot be loaded, once that was tried
        self._copied = folder if gguf_file is None and tokenizer is None else None  # copy the files of this folder

    def tokenizer(self) -> Any:
        """The tokenizer. Raises `LlmqError` with the reason if there is none; the result is the same on every call."""
        if self._failure is not None:
            raise LlmqError(self._failure)
        if self._tokenizer is None:
            try:
                self._tokenizer = self._load()
            except LlmqError as error:
                self._failure = str(error)
                raise
        return self._tokenizer

    def load_tokenizer(self) -> None:
        """Load the tokenizer now, if there is one."""
        try:
            self.tokenizer()
        except LlmqError:
            return

    @property
    def notes(self) -> tuple[str, ...]:
        """Which files the checkpoint will lack, with the reason. This is known before anything is written."""
        if self._copied is None:
            self.load_tokenizer()
        if self._copied is not None:
            return _left_note(self._copied)
        return () if self._failure is None else (f"the checkpoint has no tokenizer: {self._failure}",)

    def write(
        self, folder: Path, model: PreTrainedModel, dtype: torch.dtype, quantization_config: Mapping[str, Any]
    ) -> None:
        """Write all side files into `folder`. The tokenizer is left out if there is none; `notes` says so.

        model: only its config, its generation config and its class are used; weights may be on meta.
        dtype: what config.json states. quantization_config: JSON values.
        Raises `LlmqError` for what cannot be saved, and `OSError` for what cannot be written.
        """
        with _saving(CONFIG):
            _write_config(folder / CONFIG, model, dtype, quantization_config)
        with _saving(GENERATION):
            if self._folder is not None and (self._folder / GENERATION).is_file():
                shutil.copyfile(self._folder / GENERATION, folder / GENERATION)
            elif model.can_generate():
                # Unlike save_pretrained, to_json_file accepts settings that generate() would refuse. They are the source's.
                model.generation_config.to_json_file(folder / GENERATION)
        with _saving("the tokenizer"):
            self._write_tokenizer(folder)

    def _write_tokenizer(self, folder: Path) -> None:
        if self._copied is not None:
            for file in data_files(self._copied):
                target = folder / file.relative_to(self._copied)
                target.parent.mkdir(exist_ok=True)
                shutil.copyfile(file, target)
        elif not self.notes:
            self.tokenizer().save_pretrained(folder)
        for name in (TOKENIZER_CONFIG, *PROCESSOR_CONFIGS):
            if (folder / name).is_file():
                _strip_code(folder / name)

    def _load(self) -> Any:
        where: Path | str | None = self._folder or self._name or None
        if where is None:
            raise LlmqError(
                "the loaded model does not say where its tokenizer is (name_or_path is empty); "
                "save model and tokenizer to one folder and use that folder"
            )
        return load_tokenizer(where, **({"gguf_file": self._gguf_file} if self._gguf_file else {}))


def load_tokenizer(source: Any, **options: Any) -> Any:
    """The tokenizer of a folder or repo id. options: of `AutoTokenizer.from_pretrained`.

    Raises `LlmqError`, with the reason and a remedy, where it cannot be loaded.
    """
    try:
        return AutoTokenizer.from_pretrained(source, trust_remote_code=False, **options)
    except (OSError, ValueError, KeyError, TypeError, ImportError, AttributeError, RuntimeError) as error:
        raise LlmqError(
            f"{source} has no tokenizer that can be loaded ({_first_line(error)}); "
            "put its files (tokenizer.json, tokenizer_config.json) next to the weights"
        ) from error


def data_files(folder: Path) -> Iterator[Path]:
    """The files of the tokenizer and of processors in `folder`: data only, and regular files only (a link to one counts)."""
    found = sorted({file for pattern in DATA_FILES for file in folder.glob(pattern) if file.is_file()})
    for file in found:
        if file.suffix not in _NOT_DATA and not any(fnmatch(file.name, pattern) for pattern in _NOT_COPIED):
            yield file


def left_behind(folder: Path) -> tuple[str, ...]:
    """The names of what `folder` holds beside its safetensors and that no checkpoint gets: adapters, code, other weights, ...

    Hidden entries and pages for people (README, licences, pictures) are not counted.
    """
    copied = {file.relative_to(folder).parts[0] for file in data_files(folder)}
    written = {CONFIG, GENERATION}
    return tuple(
        entry.name
        for entry in sorted(folder.iterdir())
        if entry.name not in copied | written
        and not entry.name.startswith(".")
        and entry.suffix.lower() not in (".md", ".png", ".jpg", ".jpeg", ".gif", ".svg", ".pdf")
        and not entry.name.upper().startswith(("LICEN", "NOTICE", "USE_POLICY"))
        and not (fnmatch(entry.name, "model*.safetensors") or entry.name.endswith(".safetensors.index.json"))
    )


def _left_note(folder: Path) -> tuple[str, ...]:
    """Notes on adapters, which change what a model computes, and on all else that is left behind."""
    left = left_behind(folder)
    notes: tuple[str, ...] = ()
    if any(name.startswith("adapter_") for name in left):
        notes = (
            f"{folder} holds adapters beside the model: they are not applied; merge them first to quantize with them",
        )
    others = [name for name in left if not name.startswith("adapter_")]
    return (*notes, f"not copied from the source: {first_names(others)}") if others else notes


def _write_config(
    file: Path, model: PreTrainedModel, dtype: torch.dtype, quantization_config: Mapping[str, Any]
) -> None:
    config = copy.deepcopy(model.config)
    config.dtype = dtype
    config.architectures = [type(model).__name__]
    config.quantization_config = json.loads(json.dumps(quantization_config))
    config.save_pretrained(file.parent)
    _strip_code(file)


@contextmanager
def _saving(what: str) -> Iterator[None]:
    """Turn whatever a library raises in the body into an `LlmqError`, apart from `OSError`."""
    try:
        yield
    except (LlmqError, OSError):
        raise
    except Exception as error:  # third-party configs and tokenizers raise anything
        raise LlmqError(f"{what} of the source cannot be saved: {_first_line(error)}") from error


def _strip_code(file: Path) -> None:
    """Remove a reference to code from a JSON file. A file without one is left unchanged."""
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise LlmqError(f"{file.name} of the source is not readable JSON: {error}; repair or replace it") from None
    if isinstance(content, dict) and content.pop("auto_map", None) is not None:
        file.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def _first_line(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__
