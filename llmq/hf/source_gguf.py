"""A GGUF file as a model in memory. transformers' reader is made to parse each file once and to show no progress bar.

That reader parses the file's header, vocabulary included, once for the config, once for the weights and once for the
tokenizer (three seconds each for 49,000 words), and builds the table of tensor names once per module of the model (five
seconds for 30 layers). Both results are cached while a file is being opened, and dropped afterwards.

Left out: streaming. The tensors of a GGUF file are in another order and, for some architectures, in another form;
transformers converts all of them at once.
"""

from __future__ import annotations

import functools
import importlib.util
import re
from collections.abc import Callable, Collection, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from threading import Lock
from typing import Any

import numpy
import torch
from transformers import AutoModelForCausalLM, GgufConfig, PreTrainedModel
from transformers import modeling_gguf_pytorch_utils as hf_gguf

from llmq.errors import LlmqError
from llmq.hf.sidefiles import SideFiles
from llmq.hf.source_base import quiet
from llmq.names import first_names

_SPLIT = re.compile(r"-(\d+)-of-(\d+)\.gguf$")
_PATCHING = Lock()  # held while functions of other libraries are replaced


def load_gguf(file: Path, dtype: torch.dtype, side: SideFiles) -> PreTrainedModel:
    """The dequantized model in `file`, in `dtype`. The tokenizer of `side` is loaded as well, if there is one.

    Raises `LlmqError` with the reason if the file cannot be read or lacks parameters of the model.
    """
    if not file.is_file():
        raise LlmqError(f"no such file: {file}; use the path of an existing .gguf file")
    if importlib.util.find_spec("gguf") is None:
        raise LlmqError(f"reading {file} needs the gguf package, which is not installed; run `pip install gguf`")
    try:
        with quiet(), _read_once():
            model, info = AutoModelForCausalLM.from_pretrained(
                file.parent,
                gguf_file=file.name,
                quantization_config=GgufConfig(dequantize=True),
                dtype=dtype,
                local_files_only=True,
                trust_remote_code=False,
                output_loading_info=True,
            )
            side.load_tokenizer()
    except Exception as error:  # the reader raises anything on odd files
        lines = str(error).strip().splitlines() or [type(error).__name__]
        raise LlmqError(f"{file} is not a model that transformers reads from GGUF: {lines[0]}") from error
    refuse_incomplete(file, model, info["missing_keys"])
    model.hf_quantizer = None
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config
    return model


def refuse_incomplete(file: Path, model: PreTrainedModel, missing: Collection[str]) -> None:
    """Raise `LlmqError` if the file lacks parameters, which transformers has filled with random numbers."""
    absent = sorted(set(missing) & {name for name, _ in model.named_parameters()})
    if not absent:
        return
    part = _SPLIT.search(file.name)
    remedy = "download or convert it again"
    if part is not None:
        remedy = f"it is part {int(part[1])} of {int(part[2])}: merge the parts first (llama-gguf-split --merge)"
    raise LlmqError(f"{file} lacks {first_names(absent)}, which {type(model).__name__} needs; {remedy}")


@contextmanager
def _read_once() -> Iterator[None]:
    """No GGUF header is parsed twice inside. One thread at a time: the functions that are replaced are global."""
    import gguf

    with _PATCHING, ExitStack() as stack:
        stack.enter_context(_replaced(gguf, "GGUFReader", lambda reader: functools.cache(_plain(reader))))
        stack.enter_context(_replaced(gguf, "get_tensor_name_map", functools.cache))
        stack.enter_context(_replaced(hf_gguf, "tqdm", lambda bar: functools.partial(bar, disable=True)))
        yield


def _plain(reader: Any) -> Any:
    """The class `gguf.GGUFReader`, but on a plain array: slicing a `numpy.memmap` takes half of the reader's time."""

    class PlainReader(reader):  # type: ignore[misc]
        def __setattr__(self, name: str, value: Any) -> None:
            super().__setattr__(name, numpy.asarray(value) if name == "data" else value)

    return PlainReader


@contextmanager
def _replaced(module: Any, name: str, wrap: Callable[[Any], Any]) -> Iterator[None]:
    """`module.name`, if there is one, is `wrap` of it inside."""
    original = getattr(module, name, None)
    if original is None:
        yield
        return
    setattr(module, name, wrap(original))
    try:
        yield
    finally:
        setattr(module, name, original)
