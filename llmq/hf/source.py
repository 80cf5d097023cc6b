"""From what a user names to a `Source`: a folder, a hub repo id, a GGUF file, or a loaded model.

Everything that can be refused is refused here, before a weight is read: configs that transformers does not know, that
have no decoder, or that are quantized already. Code that comes with a model is never run, whatever its files say.

A repo id is downloaded into the hub's cache: small files first, then the safetensors files that the index names, of
the same commit. Pickles and code are not downloaded.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import transformers
from huggingface_hub import snapshot_download
from torch import nn
from transformers import CONFIG_MAPPING, AutoConfig, PreTrainedConfig, PreTrainedModel
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING, MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from llmq.checkpoint.reader import INDEX, SINGLE, Checkpoint, open_checkpoint
from llmq.errors import LlmqError
from llmq.hf.sidefiles import GENERATION, TOKENIZER_FILES, SideFiles
from llmq.hf.source_base import Source, quiet
from llmq.hf.source_folder import FolderSource
from llmq.hf.source_gguf import load_gguf
from llmq.hf.source_memory import InMemorySource

__all__ = ["Source", "open_source"]

DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}
# `name` or `owner/name`, as the hub allows them
_REPO_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?")
_CAUSAL = ("ForCausalLM", "LMHeadModel", "ForConditionalGeneration")


def open_source(
    source: Any,
    *,
    dtype: str = "auto",
    device: str | torch.device = "cpu",
    revision: str | None = None,
    tokenizer: Any = None,
) -> Source:
    """The model to quantize.

    source: a folder of safetensors, a hub repo id, a `.gguf` file (or a value with `folder` and `file`), or a loaded
        `PreTrainedModel`, which is never changed.
    dtype: bfloat16, float16 or float32; `auto` keeps the source's, and takes bfloat16 for float32 and GGUF.
    device: where loaded parts are put. revision: of a repo id. tokenizer: where the source does not come with one.
    Raises `LlmqError` for a source that is not there, not readable, no causal LM, or quantized already.
    """
    if dtype != "auto" and dtype not in DTYPES:
        raise LlmqError(f"dtype must be auto, {', '.join(DTYPES)}; got {dtype!r}")
    if isinstance(source, nn.Module):
        return _open_model(source, dtype, device, tokenizer)
    gguf = _gguf_file(source)
    if gguf is not None:
        if revision is not None:
            raise LlmqError(f"revision is for a repo id; {gguf.name} is a local file")
        return _open_gguf(gguf, dtype, device, tokenizer, getattr(source, "prepare", None))
    folder = _folder(source, revision)
    checkpoint = open_checkpoint(folder)
    config = read_config(folder)
    kind, notes = _pick_dtype(dtype, _native_dtype(config, checkpoint))
    return FolderSource(checkpoint, config, kind, device, SideFiles(folder, tokenizer=tokenizer), notes)


def read_config(folder: Path) -> PreTrainedConfig:
    """The checked config of the causal LM in `folder`. Raises `LlmqError` with the reason where there is none."""
    file = folder / "config.json"
    if not file.is_file():
        raise LlmqError(f"{folder} has no config.json: give a folder that `save_pretrained` or a download made")
    try:
        raw = json.loads(file.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise LlmqError(f"{file} is not readable JSON: {error}") from None
    kind = raw.get("model_type") if isinstance(raw, dict) else None
    if not isinstance(kind, str) or kind not in CONFIG_MAPPING:
        own_code = isinstance(raw, dict) and "auto_map" in raw
        why = ", and the code that comes with the model (auto_map) is never run" if own_code else ""
        raise LlmqError(f"{file}: transformers {transformers.__version__} has no model_type {kind!r}{why}")
    try:
        with quiet():
            config = AutoConfig.from_pretrained(folder, trust_remote_code=False, local_files_only=True)
    except Exception as error:  # config classes raise what they like on odd values
        raise LlmqError(f"{file} does not describe a {kind} model: {_first_line(error)}") from error
    check_config(config, str(file))
    return config


def check_config(config: PreTrainedConfig, where: str) -> None:
    """Raise `LlmqError` unless `config` is that of a causal LM that is not quantized."""
    method = _quantized(config)
    if method is not None:
        raise LlmqError(f"{where}: the source is quantized already ({method}); give the original model")
    named = [each for each in getattr(config, "architectures", None) or () if isinstance(each, str)]
    if getattr(config, "is_encoder_decoder", False):
        raise LlmqError(f"{where}: {config.model_type} is an encoder-decoder; only decoder-only models are quantized")
    if type(config) not in MODEL_FOR_CAUSAL_LM_MAPPING:
        raise LlmqError(f"{where}: a config without a decoder: {config.model_type} has no causal language model")
    known = MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.values()
    if named and not any(each.endswith(_CAUSAL) or each in known for each in named):
        what = ", ".join(named)
        raise LlmqError(
            f"{where}: a config without a decoder that predicts tokens ({what}); give a causal language model"
        )


def _open_model(model: nn.Module, dtype: str, device: str | torch.device, tokenizer: Any) -> Source:
    what = type(model).__name__
    if not isinstance(model, PreTrainedModel):
        raise LlmqError(f"a loaded model must be a transformers PreTrainedModel; got {what}")
    if getattr(model, "hf_quantizer", None) is not None or getattr(model, "is_quantized", False):
        raise LlmqError(f"{what} is quantized already ({_quantized(model.config)}); give the original model")
    if getattr(model, "_hf_peft_config_loaded", False):
        raise LlmqError(f"{what} carries adapters; merge them into the weights first (merge_and_unload)")
    check_config(model.config, what)
    if model.get_output_embeddings() is None:
        raise LlmqError(f"{what} predicts no tokens: it has no output embeddings; give a causal language model")
    kind, notes = _pick_dtype(dtype, model.dtype)
    side = SideFiles(tokenizer=tokenizer, name=model.name_or_path or "")
    return InMemorySource(model, kind, device, side, f"{what} in memory", notes)


def _gguf_file(source: Any) -> Path | None:
    if hasattr(source, "folder") and hasattr(source, "file"):
        return Path(source.folder) / str(source.file)
    if isinstance(source, (str, Path)) and str(source).endswith(".gguf"):
        return Path(source)
    return None


def _open_gguf(
    file: Path, dtype: str, device: str | torch.device, tokenizer: Any, prepare: Callable[[nn.Module], None] | None
) -> Source:
    kind, notes = _pick_dtype(dtype, None)
    side = SideFiles(file.parent, file.name, tokenizer)
    # A prepared model is one and the same whatever it is cast to afterwards, as a checkpoint in bfloat16 would be.
    model = load_gguf(file, kind if prepare is None else torch.bfloat16, side)
    check_config(model.config, str(file))
    if prepare is not None:
        prepare(model)
    return InMemorySource(model, kind, device, side, str(file), ("GGUF is read whole: it cannot be streamed", *notes))


def _folder(source: Any, revision: str | None) -> Path:
    """The folder that `source` names: one that is there, or the local copy of a repo."""
    if not isinstance(source, (str, Path)):
        raise LlmqError(f"a source is a folder, a repo id, a .gguf file or a loaded model; got {type(source).__name__}")
    folder = Path(source).expanduser()
    if str(source) and folder.exists():
        if revision is not None:
            raise LlmqError(f"revision is for a repo id; {folder} is a local folder")
        return folder
    if not _REPO_ID.fullmatch(str(source)) or ".." in str(source):
        raise LlmqError(f"no such folder: {source or repr(source)}")
    return _download(str(source), revision)


def _download(repo: str, revision: str | None) -> Path:
    small = ["config.json", GENERATION, INDEX, *TOKENIZER_FILES]
    try:
        folder = Path(snapshot_download(repo, revision=revision, allow_patterns=small))
        shards = _index_files(folder) or [SINGLE]
        return Path(snapshot_download(repo, revision=folder.name, allow_patterns=shards))
    except (OSError, ValueError) as error:
        at = f" at {revision}" if revision else ""
        raise LlmqError(
            f"no folder {repo} here, and no repo {repo}{at} could be fetched from the hub: {_first_line(error)}"
        ) from error


def _index_files(folder: Path) -> list[str]:
    """The file names in the index, as patterns for a download; what is wrong with them `open_checkpoint` will say."""
    try:
        names = json.loads((folder / INDEX).read_text(encoding="utf-8"))["weight_map"].values()
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return []
    return sorted({name for name in names if isinstance(name, str) and name.endswith(".safetensors")})


def _native_dtype(config: PreTrainedConfig, checkpoint: Checkpoint) -> torch.dtype:
    """The dtype that the config states, else that of the first floating tensor."""
    for stated in (config.dtype, config.get_text_config().dtype):
        kind = getattr(torch, stated, None) if isinstance(stated, str) else stated
        if isinstance(kind, torch.dtype):
            return kind
    kinds = (tensor.dtype for tensor in checkpoint.tensors.values())
    return next((kind for kind in kinds if kind.is_floating_point), torch.float32)


def _pick_dtype(asked: str, native: torch.dtype | None) -> tuple[torch.dtype, tuple[str, ...]]:
    """The dtype to work in, and a note where that is not the source's (`native`; None for GGUF's own)."""
    if asked != "auto":
        return DTYPES[asked], ()
    if native in (torch.bfloat16, torch.float16):
        return native, ()
    what = "GGUF" if native is None else str(native).removeprefix("torch.")
    return torch.bfloat16, (f"the source is {what}: cast to bfloat16 (dtype auto)",)


def _quantized(config: PreTrainedConfig) -> str | None:
    """The method that a config says its weights are quantized with; None where they are not."""
    stated = getattr(config, "quantization_config", None) or getattr(config, "compression_config", None)
    if not stated:
        return None
    method = stated.get("quant_method") if isinstance(stated, dict) else getattr(stated, "quant_method", None)
    return str(getattr(method, "value", method) or "unknown method")


def _first_line(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__
