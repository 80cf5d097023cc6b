"""What lies beside the weights: config, generation config, tokenizer, chat template.

From a folder, the tokenizer's files are copied as they are; one that came with a GGUF file, or from the caller, is
written by `save_pretrained`. The config is the model's own with the new dtype and the `quantization_config`. Neither
code nor any reference to code (`auto_map`) is ever carried over.
"""

from __future__ import annotations

import copy
import json
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from transformers import AutoTokenizer, PreTrainedModel

from llmq.errors import LlmqError

GENERATION = "generation_config.json"
# What a tokenizer is made of, as far as it is data: names and folders in which nothing else lies.
TOKENIZER_FILES = (
    "tokenizer*.json",
    "*.model",
    "*.tiktoken",
    "vocab.*",
    "merges.txt",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template*",
    "additional_chat_templates/*",
)
_CODE = (".py", ".bin", ".so", ".pkl", ".pt", ".pth")


class SideFiles:
    """Where a source's tokenizer and generation config come from. The tokenizer is loaded when it is first asked for.

    folder: of the source, None for a loaded model. gguf_file: the file in it that holds the tokenizer.
    tokenizer: one that the caller has already. name: a folder or repo id to look for one, for a loaded model.
    """

    def __init__(
        self, folder: Path | None = None, gguf_file: str | None = None, tokenizer: Any = None, name: str = ""
    ) -> None:
        self._folder, self._gguf_file, self._tokenizer, self._name = folder, gguf_file, tokenizer, name
        self._given = tokenizer is not None
        self.notes: tuple[str, ...] = ()

    def tokenizer(self) -> Any:
        """Raises `LlmqError` with the reason where there is none."""
        if self._tokenizer is None:
            self._tokenizer = self._load()
        return self._tokenizer

    def try_tokenizer(self) -> None:
        """Load the tokenizer now, if there is one; that there is none is said when it is asked for."""
        try:
            self.tokenizer()
        except LlmqError:
            return

    def write(
        self, folder: Path, model: PreTrainedModel, dtype: torch.dtype, quantization_config: Mapping[str, Any]
    ) -> None:
        """Write everything into `folder`. A loaded model without a tokenizer gets a note instead of one."""
        config = copy.deepcopy(model.config)
        config.dtype = dtype
        config.architectures = [type(model).__name__]
        config.quantization_config = json.loads(json.dumps(quantization_config))
        config.save_pretrained(folder)
        _strip_code(folder / "config.json")
        if self._folder is not None and (self._folder / GENERATION).is_file():
            shutil.copyfile(self._folder / GENERATION, folder / GENERATION)
        elif model.can_generate():
            # to_json_file does not refuse settings that only generate() would: they are the source's, not ours
            model.generation_config.to_json_file(folder / GENERATION)
        if self._folder is not None and self._gguf_file is None and not self._given:
            for file in tokenizer_files(self._folder):
                _copy(file, folder / file.relative_to(self._folder))
            return
        try:
            tokenizer = self.tokenizer()
        except LlmqError as error:
            self.notes += (f"no tokenizer was carried over: {error}",)
            return
        tokenizer.save_pretrained(folder)

    def _load(self) -> Any:
        where: Path | str | None = self._folder or self._name or None
        if where is None:
            raise LlmqError("the loaded model does not say where its tokenizer is: give it as `tokenizer`")
        extra = {"gguf_file": self._gguf_file} if self._gguf_file else {}
        try:
            return AutoTokenizer.from_pretrained(where, trust_remote_code=False, **extra)
        except (OSError, ValueError, KeyError, TypeError, ImportError, AttributeError, RuntimeError) as error:
            reason = str(error).strip().splitlines()
            raise LlmqError(
                f"{where} has no tokenizer that can be loaded ({reason[0] if reason else type(error).__name__}); "
                "put its files (tokenizer.json, tokenizer_config.json) beside the weights"
            ) from error


def tokenizer_files(folder: Path) -> Iterator[Path]:
    """The tokenizer's files in `folder`: regular files (a link to one counts), data only."""
    for pattern in TOKENIZER_FILES:
        for file in sorted(folder.glob(pattern)):
            if file.is_file() and file.suffix not in _CODE:
                yield file


def _copy(source: Path, target: Path) -> None:
    target.parent.mkdir(exist_ok=True)
    shutil.copyfile(source, target)
    if source.suffix == ".json" and source.name == "tokenizer_config.json":
        _strip_code(target)


def _strip_code(file: Path) -> None:
    """Remove a reference to code from a JSON file; one without is left as it is, to the byte."""
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise LlmqError(f"{file.name} of the source is not readable JSON: {error}") from None
    if isinstance(content, dict) and content.pop("auto_map", None) is not None:
        file.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
