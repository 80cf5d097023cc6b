"""Opens a model for quantization: a folder, a hub repo id, a GGUF file or a loaded model becomes a `Source`.

Every check that needs no weights is made here: configs that transformers does not know, that have no decoder, or whose
weights are quantized already are refused. Code that comes with a model is never run, whatever its files say.

A repo id is downloaded into the hub's cache: the small files first, then the safetensors files that the index names, of
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
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from llmq.checkpoint.reader import INDEX, SINGLE, Checkpoint, open_checkpoint
from llmq.errors import LlmqError
from llmq.hf.model_class import model_class
from llmq.hf.sidefiles import CONFIG, DATA_FILES, GENERATION, SideFiles
from llmq.hf.source_base import Source, quiet
from llmq.hf.source_folder import FolderSource
from llmq.hf.source_gguf import load_gguf
from llmq.hf.source_memory import InMemorySource

__all__ = ["Source", "open_source"]

DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}
# `name` or `owner/name`, as the hub allows them
_REPO_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?")
ADAPTER = "adapter_config.json"
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
    dtype: bfloat16, float16 or float32; `auto` keeps the source's, but casts float32 and GGUF to bfloat16.
    device: where loaded parameters are put.
    revision: branch, tag or commit of a repo id.
    tokenizer: for a source that comes without one.
    Raises `LlmqError` for a source that does not exist, cannot be read, is no causal LM or is quantized already.
    """
    if dtype != "auto" and dtype not in DTYPES:
        raise LlmqError(f"dtype must be one of auto, {', '.join(DTYPES)}; got {dtype!r}")
    if isinstance(source, nn.Module):
        return _open_model(source, dtype, device, tokenizer)
    gguf = _gguf_file(source)
    if gguf is not None:
        if revision is not None:
            raise LlmqError(f"revision is for hub repos; {gguf.name} is a local file; leave revision out")
        return _open_gguf(gguf, dtype, device, tokenizer, getattr(source, "prepare", None))
    folder = _folder(source, revision)
    _refuse_adapters(folder)
    checkpoint = open_checkpoint(folder)
    config = read_config(folder)
    loaded_dtype, notes = _pick_dtype(dtype, _native_dtype(config, checkpoint))
    return FolderSource(checkpoint, config, loaded_dtype, device, SideFiles(folder, tokenizer=tokenizer), notes)


def _refuse_adapters(folder: Path) -> None:
    """Raise `LlmqError` for a folder that holds adapters and no model."""
    file = folder / ADAPTER
    if not file.is_file() or (folder / CONFIG).is_file():
        return
    try:
        base = json.loads(file.read_text(encoding="utf-8")).get("base_model_name_or_path")
    except (OSError, ValueError, AttributeError):
        base = None
    raise LlmqError(
        f"{folder} holds adapters ({ADAPTER}) and no model: load {base or 'their base model'} with peft, merge them into it "
        "(merge_and_unload), save it with save_pretrained, and quantize that folder"
    )


def read_config(folder: Path) -> PreTrainedConfig:
    """The checked config of the causal LM in `folder`. Raises `LlmqError` with the reason if there is none."""
    file = folder / CONFIG
    if not file.is_file():
        raise LlmqError(f"{folder} has no config.json; use a folder made by `save_pretrained` or by a download")
    try:
        raw = json.loads(file.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise LlmqError(f"{file} is not readable JSON: {error}") from None
    model_type = raw.get("model_type") if isinstance(raw, dict) else None
    if not isinstance(model_type, str) or model_type not in CONFIG_MAPPING:
        own_code = isinstance(raw, dict) and "auto_map" in raw
        why = ", and the code that comes with the model (auto_map) is never run" if own_code else ""
        raise LlmqError(f"{file}: transformers {transformers.__version__} does not know model_type {model_type!r}{why}")
    try:
        with quiet():
            config = AutoConfig.from_pretrained(folder, trust_remote_code=False, local_files_only=True)
    except Exception as error:  # config classes raise anything on odd values
        raise LlmqError(f"{file} does not describe a {model_type} model: {_first_line(error)}") from error
    check_config(config, str(file))
    return config


def check_config(config: PreTrainedConfig, where: str) -> None:
    """Raise `LlmqError` unless `config` belongs to a causal LM that is not quantized. where: begins the message."""
    method = _quantization_method(config)
    if method is not None:
        raise LlmqError(f"{where}: the source is quantized already ({method}); use the original model")
    named = [each for each in getattr(config, "architectures", None) or () if isinstance(each, str)]
    if getattr(config, "is_encoder_decoder", False):
        raise LlmqError(
            f"{where}: only decoder-only models can be quantized; {config.model_type} is an encoder-decoder"
        )
    found = model_class(config)
    if found is None:
        raise LlmqError(
            f"{where}: only decoder-only models can be quantized; transformers has no causal language model for "
            f"{config.model_type}"
        )
    known = MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.values()
    if named and not any(each.endswith(_CAUSAL) or each in known or each == found.__name__ for each in named):
        raise LlmqError(
            f"{where}: only models that predict tokens can be quantized; this is {', '.join(named)}; "
            "use a causal language model"
        )


def _open_model(model: nn.Module, dtype: str, device: str | torch.device, tokenizer: Any) -> Source:
    name = type(model).__name__
    if not isinstance(model, PreTrainedModel):
        raise LlmqError(f"a loaded model must be a transformers PreTrainedModel; got {name}")
    if getattr(model, "hf_quantizer", None) is not None or getattr(model, "is_quantized", False):
        raise LlmqError(f"{name} is quantized already ({_quantization_method(model.config)}); use the original model")
    if getattr(model, "_hf_peft_config_loaded", False):
        raise LlmqError(f"{name} has adapters; merge them into the weights first (merge_and_unload)")
    check_config(model.config, name)
    if model.get_output_embeddings() is None:
        raise LlmqError(
            f"only models that predict tokens can be quantized; {name} has no output embeddings; "
            "use a causal language model"
        )
    loaded_dtype, notes = _pick_dtype(dtype, model.dtype)
    side = SideFiles(tokenizer=tokenizer, name=model.name_or_path or "")
    return InMemorySource(model, loaded_dtype, device, side, f"{name} in memory", notes)


def _gguf_file(source: Any) -> Path | None:
    """The GGUF file that `source` names; None if it names none."""
    if hasattr(source, "folder") and hasattr(source, "file"):
        return Path(source.folder) / str(source.file)
    if isinstance(source, (str, Path)) and str(source).endswith(".gguf"):
        return Path(source)
    return None


def _open_gguf(
    file: Path, dtype: str, device: str | torch.device, tokenizer: Any, prepare: Callable[[nn.Module], None] | None
) -> Source:
    loaded_dtype, notes = _pick_dtype(dtype, None)
    side = SideFiles(file.parent, file.name, tokenizer)
    # Prepared in bfloat16 and cast afterwards, so that every dtype gets the same model.
    model = load_gguf(file, loaded_dtype if prepare is None else torch.bfloat16, side)
    check_config(model.config, str(file))
    if prepare is not None:
        prepare(model)
    streaming = "GGUF files cannot be streamed: the whole model is in memory"
    return InMemorySource(model, loaded_dtype, device, side, str(file), (streaming, *notes))


def _folder(source: Any, revision: str | None) -> Path:
    """The folder that `source` names: an existing one, or the local copy of a hub repo."""
    if not isinstance(source, (str, Path)):
        raise LlmqError(
            f"a source must be a folder, a repo id, a .gguf file or a loaded model; got {type(source).__name__}"
        )
    folder = Path(source).expanduser()
    if str(source) and folder.exists():
        if revision is not None:
            raise LlmqError(f"revision is for hub repos; {folder} is a local folder; leave revision out")
        return folder
    if not _REPO_ID.fullmatch(str(source)) or ".." in str(source):
        raise LlmqError(
            f"no such folder: {source or repr(source)}; use an existing folder or a hub repo id (owner/name)"
        )
    return _download(str(source), revision)


def _download(repo: str, revision: str | None) -> Path:
    small = ["config.json", GENERATION, INDEX, *DATA_FILES]
    try:
        folder = Path(snapshot_download(repo, revision=revision, allow_patterns=small))
        shards = _index_files(folder) or [SINGLE]
        return Path(snapshot_download(repo, revision=folder.name, allow_patterns=shards))
    except (OSError, ValueError) as error:
        at = f" at {revision}" if revision else ""
        raise LlmqError(
            f"there is no folder {repo}, and the hub repo {repo}{at} could not be downloaded: {_first_line(error)}"
        ) from error


def _index_files(folder: Path) -> list[str]:
    """The file names in the index, as patterns for a download. `open_checkpoint` checks them later."""
    try:
        names = json.loads((folder / INDEX).read_text(encoding="utf-8"))["weight_map"].values()
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return []
    return sorted({name for name in names if isinstance(name, str) and name.endswith(".safetensors")})


def _native_dtype(config: PreTrainedConfig, checkpoint: Checkpoint) -> torch.dtype:
    """The dtype that the config states, or else the dtype of the first floating-point tensor."""
    for stated in (config.dtype, config.get_text_config().dtype):
        dtype = getattr(torch, stated, None) if isinstance(stated, str) else stated
        if isinstance(dtype, torch.dtype):
            return dtype
    dtypes = (tensor.dtype for tensor in checkpoint.tensors.values())
    return next((dtype for dtype in dtypes if dtype.is_floating_point), torch.float32)


def _pick_dtype(requested: str, native: torch.dtype | None) -> tuple[torch.dtype, tuple[str, ...]]:
    """The dtype to cast to, and a note if `auto` does not keep the source's. native: the source's; None for GGUF."""
    if requested != "auto":
        return DTYPES[requested], ()
    if native in (torch.bfloat16, torch.float16):
        return native, ()
    name = "GGUF" if native is None else str(native).removeprefix("torch.")
    return torch.bfloat16, (f"the source is {name}: cast to bfloat16 (dtype auto)",)


def _quantization_method(config: PreTrainedConfig) -> str | None:
    """The method by which the weights are quantized, according to the config; None if they are not."""
    stated = getattr(config, "quantization_config", None) or getattr(config, "compression_config", None)
    if not stated:
        return None
    method = stated.get("quant_method") if isinstance(stated, dict) else getattr(stated, "quant_method", None)
    return str(getattr(method, "value", method) or "unknown method")


def _first_line(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__
