"""Greedy decoding with a static cache and one CUDA graph for each step: what a small step costs in Python is paid once.

    prefill   the model's forward over the prompt, eager, into a cache of a fixed length
    step      token [B, 1] ──► forward ──► argmax ──► token; the position, the mask and what is written are tensors on the device

A step reads nothing on the host and makes nothing out of host memory, so it can be captured once and replayed for every
token; whether that holds is watched in a step beforehand (`host_traffic`), and where it does not, on a CPU, or where the model is
spread over devices, the same step runs eagerly: the same tokens, without the gain. Every layer's cache is as long as the whole
text: transformers' static cache for sliding windows counts on the host, while a mask over a full one gives the same.

The other way, transformers' `cache_implementation="static"` with torch.compile, works with packed linears too; it compiles
for minutes what needs no compiling here, since the kernels are what matters and they are there.

Left out: sampling, beams, processors of logits (a penalty for repetition, ...), assisted decoding: use `generate`.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import PreTrainedModel, StaticCache
from transformers.cache_utils import StaticLayer, StaticSlidingWindowLayer

from llmq.errors import LlmqError
from llmq.hf.text_decoder import text_decoder

STEPS_BETWEEN_CHECKS = 16  # whether all sequences have ended is read on the host, which waits for the device
# Settings of a generation config that change which token is the likeliest, and what says that they do nothing.
FACTORS = ("repetition_penalty", "encoder_repetition_penalty", "guidance_scale", "num_beams")
RULES = (
    *("no_repeat_ngram_size", "bad_words_ids", "sequence_bias", "suppress_tokens", "begin_suppress_tokens"),
    *("forced_bos_token_id", "forced_eos_token_id", "min_length", "min_new_tokens", "exponential_decay_length_penalty"),
)


def generate_fast(
    model: PreTrainedModel,
    input_ids: Tensor,
    max_new_tokens: int = 64,
    attention_mask: Tensor | None = None,
    decoder: Decoder | None = None,
) -> Tensor:
    """What `model.generate(input_ids, max_new_tokens=..., do_sample=False)` returns, decoded in a replayed graph on a GPU.

    input_ids: int64 [B, T]. attention_mask: [B, T], zeros where there is padding, which must be on the left.
    decoder: one to use again, with its cache and graph (`Decoder`); by default one is made for this call.
    Returns int64 [B, T + n], n <= max_new_tokens: it ends when every sequence has written an end-of-text token of the
    generation config. A static cache sums otherwise than a growing one: of two tokens that are as likely within the rounding
    of 16 bits, it may take the other.
    Raises `LlmqError` for caches that are not plain attention's and settings that greedy decoding lacks.
    """
    if not isinstance(input_ids, Tensor) or input_ids.dtype not in (torch.int64, torch.int32):
        found = str(input_ids.dtype) if isinstance(input_ids, Tensor) else type(input_ids).__name__
        raise LlmqError(f"input_ids must be a tensor of whole numbers, int64 [B, T]; got {found}")
    if input_ids.ndim != 2 or 0 in input_ids.shape:
        raise LlmqError(f"input_ids must be [B, T], neither of them 0; got {list(input_ids.shape)}")
    if not isinstance(max_new_tokens, int):
        raise LlmqError(f"max_new_tokens must be a whole number; got {max_new_tokens!r}")
    if max_new_tokens < 1:
        raise LlmqError(f"max_new_tokens must be at least 1; got {max_new_tokens}")
    batch, length = input_ids.shape
    return (decoder or Decoder(model, batch, length + max_new_tokens)).generate(
        input_ids, max_new_tokens, attention_mask
    )


class Decoder:
    """A model with a cache for `batch` sequences of up to `length` tokens, and the graph of its decode step.

    graph: None while nothing is captured. eager_because: why steps are not replayed; None where they are.
    """

    def __init__(self, model: PreTrainedModel, batch: int, length: int) -> None:
        _refuse(model, length)
        self.model, self.batch, self.length = model, batch, length
        self.device: torch.device = model.get_input_embeddings().weight.device
        self.graph: Any = None
        self.eager_because = _no_graph(model, self.device)
        self.parameters = inspect.signature(model.forward).parameters
        settings = model.generation_config
        ends = settings.eos_token_id
        self.ends = [ends] if isinstance(ends, int) else list(ends or [])
        self.pad = settings.pad_token_id if settings.pad_token_id is not None else (self.ends or [0])[0]
        with torch.inference_mode():
            self._allocate()

    def _allocate(self) -> None:
        self.cache = static_cache(self.model, self.length)
        column, row = (self.batch, 1), (self.batch, self.length)
        self.token, self.position, self.written, self.mask, self.place = (
            torch.zeros(shape, dtype=torch.long, device=self.device) for shape in (column, column, row, row, (1,))
        )
        self.ended = torch.zeros(column, dtype=torch.bool, device=self.device)
        self.end_ids = torch.tensor(self.ends, dtype=torch.long, device=self.device)
        self.padded = False

    @torch.inference_mode()
    def generate(self, input_ids: Tensor, max_new_tokens: int, attention_mask: Tensor | None = None) -> Tensor:
        """As `generate_fast`. `LlmqError` for another batch size, or more tokens than there is room for."""
        if len(input_ids) != self.batch or input_ids.shape[1] + max_new_tokens > self.length:
            found = f"{len(input_ids)} of {input_ids.shape[1]} + {max_new_tokens}"
            raise LlmqError(f"this decoder is for {self.batch} sequences of {self.length} tokens in all; got {found}")
        self.prefill(input_ids, attention_mask)
        left = max_new_tokens - 1
        while left and not bool(self.ended.all()):
            for _ in range(min(left, STEPS_BETWEEN_CHECKS)):
                self.step()
                left -= 1
        written = self.written[:, : max_new_tokens - left]
        return torch.cat((input_ids.to(self.device), written[:, : self._needed(written)]), 1)

    @torch.inference_mode()
    def prefill(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> None:
        """Read the prompt [B, T] into the cache and write the first token."""
        length = input_ids.shape[1]
        self._set_mask(attention_mask, length)
        if self.graph is None and self.eager_because is None:
            self._capture()
        self._rewind()
        positions = self.mask[:, :length].cumsum(1) - 1
        last = {"logits_to_keep": 1} if "logits_to_keep" in self.parameters else {}
        self._advance(input_ids.to(self.device), positions.clamp(min=0), **last)
        self.position.copy_(positions[:, -1:] + 1)

    @torch.inference_mode()
    def step(self) -> None:
        """Write one token more for every sequence."""
        if self.graph is not None:
            self.graph.replay()
        else:
            self._step()

    def _step(self) -> None:
        self._advance(self.token, self.position)
        self.position.add_(1)

    def _advance(self, ids: Tensor, positions: Tensor, **arguments: Any) -> None:
        """Run the model on ids [B, t] and take up what it says next."""
        if "position_ids" in self.parameters:
            arguments["position_ids"] = positions
        if self.padded:
            arguments["attention_mask"] = self.mask
        logits = self.model(input_ids=ids, past_key_values=self.cache, use_cache=True, **arguments).logits[:, -1]
        chosen = logits.float().argmax(-1, keepdim=True).masked_fill(self.ended, self.pad)  # [B, 1]
        self.token.copy_(chosen)
        self.written.index_copy_(1, self.place, chosen)
        self.place.add_(1)
        if self.ends:
            self.ended.logical_or_(torch.isin(chosen, self.end_ids))

    def _set_mask(self, given: Tensor | None, length: int) -> None:
        """The mask over the whole text; a model without positions of its own always gets one."""
        padded = "position_ids" not in self.parameters
        self.mask.fill_(1)
        if given is not None:
            if given.shape != (self.batch, length) or not bool(given[:, -1].all()):
                raise LlmqError(f"attention_mask must be {[self.batch, length]} with padding on the left alone")
            if not bool(given.all()):
                self.mask[:, :length] = given.to(self.mask)
                padded = True
        if padded != self.padded:
            self.padded, self.graph = padded, None

    def _capture(self) -> None:
        """Capture the step, after steps that make layouts, compile kernels and fill allocators."""
        self._rewind()
        self._advance(self.token, self.position)
        found = host_traffic(self._from_start, self.device)
        if found:
            self.eager_because = f"a step of this model waits for the host ({', '.join(found)})"
            return
        side = torch.cuda.Stream(self.device)  # type: ignore[no-untyped-call]
        side.wait_stream(torch.cuda.current_stream(self.device))
        with torch.cuda.stream(side):
            self._from_start()
        torch.cuda.current_stream(self.device).wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.device(self.device), torch.cuda.graph(graph):
            self._step()
        self.graph = graph

    def _rewind(self) -> None:
        """Nothing is read and nothing written."""
        self.cache.reset()
        for state in (self.token, self.position, self.place, self.ended):
            state.zero_()

    def _from_start(self) -> None:
        self._rewind()
        self._step()

    def _needed(self, written: Tensor) -> int:
        """Tokens until the last sequence has ended."""
        if not self.ends:
            return written.shape[1]
        ended = torch.isin(written, self.end_ids).int()
        first = torch.where(ended.any(1), ended.argmax(1) + 1, written.shape[1])
        return int(first.max())


def static_cache(model: PreTrainedModel, length: int) -> StaticCache:
    """A cache whose layers all hold `length` tokens and count them on the device. `LlmqError` for other kinds of layers."""
    cache = StaticCache(config=model.config, max_cache_len=length)
    for index, layer in enumerate(cache.layers):
        if type(layer) not in (StaticLayer, StaticSlidingWindowLayer):
            kind = type(layer).__name__
            raise LlmqError(f"generate_fast is for plain attention; layer {index} caches in a {kind}: use generate")
        cache.layers[index] = StaticLayer(max_cache_len=length)
    return cache


class _Watch(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Notes operators that a captured graph may not have: reads of the device, and copies between it and the host."""

    def __init__(self, device: torch.device) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.device, self.found = device, dict[str, None]()

    def __torch_dispatch__(self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        name = func._schema.name.removeprefix("aten::")
        places = {x.device.type for x in (*args, result) if isinstance(x, Tensor)}
        here = self.device.type in places
        if here and (name in ("_local_scalar_dense", "nonzero", "lift_fresh", "equal") or _crosses(name, places)):
            self.found[name] = None
        return result


def _crosses(name: str, places: set[str]) -> bool:
    return name in ("_to_copy", "copy_") and len(places) > 1


def host_traffic(step: Callable[[], None], device: torch.device) -> tuple[str, ...]:
    """Run a step; the operators in it that keep it from being captured, () where there are none."""
    with _Watch(device) as watch:
        step()
    return tuple(watch.found)


def _no_graph(model: PreTrainedModel, device: torch.device) -> str | None:
    if device.type != "cuda":
        return f"CUDA graphs are for CUDA devices; the model is on {device.type}"
    places = set((getattr(model, "hf_device_map", None) or {}).values())
    if len(places) > 1:
        return f"the model is spread over {', '.join(sorted(map(str, places)))}"
    return None


def _refuse(model: PreTrainedModel, length: int) -> None:
    settings = model.generation_config
    asked = [name for name in FACTORS if getattr(settings, name, None) not in (None, 1)]
    asked += [name for name in RULES if getattr(settings, name, None) not in (None, 0, [])]
    if asked:
        value = getattr(settings, asked[0])
        raise LlmqError(
            f"generate_fast takes the likeliest token, and {asked[0]} is {value}: use generate, or set it to None"
        )
    context = getattr(text_decoder(model.config, model).config, "max_position_embeddings", None)
    if isinstance(context, int) and length > context:
        raise LlmqError(f"prompt and new tokens must fit the model's context of {context}; got {length}")
