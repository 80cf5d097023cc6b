"""Greedy decoding with a static cache and one CUDA graph per step, so that the Python cost of a small step is paid once.

    prefill   the model's forward over the prompt, eager, into a cache of fixed length
    step      token [B, 1] ──► forward ──► argmax ──► token; position, mask and written tokens are tensors on the device

A step reads nothing on the host and makes no tensor from host memory, so it can be captured once and replayed for every
token. `host_traffic` checks that on one step beforehand. Where it does not hold, on a CPU, and where the model is spread
over several devices, the same step runs eagerly: the same tokens, without the speedup. Every layer's cache is as long as
the whole text. transformers' static cache for sliding windows counts on the host, and a mask over a full cache gives the
same result.

transformers' `cache_implementation="static"` with torch.compile works with packed linears too, but spends minutes
compiling code around kernels that exist already.

Left out: sampling, beams, logits processors (repetition penalty, ...), assisted decoding: use `generate`.
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

STEPS_BETWEEN_CHECKS = 16  # checking on the host whether all sequences have ended waits for the device
# Settings of a generation config that change which token greedy decoding chooses. The first do nothing at 1, the others
# at 0 or when empty; None switches each of them off.
NEUTRAL_AT_ONE = ("repetition_penalty", "encoder_repetition_penalty", "guidance_scale", "num_beams")
NEUTRAL_WHEN_EMPTY = (
    "no_repeat_ngram_size",
    "bad_words_ids",
    "sequence_bias",
    "suppress_tokens",
    "begin_suppress_tokens",
    "forced_bos_token_id",
    "forced_eos_token_id",
    "min_length",
    "min_new_tokens",
    "exponential_decay_length_penalty",
)


def generate_fast(
    model: PreTrainedModel,
    input_ids: Tensor,
    max_new_tokens: int = 64,
    attention_mask: Tensor | None = None,
    decoder: Decoder | None = None,
) -> Tensor:
    """`model.generate(input_ids, max_new_tokens=..., do_sample=False)`, with every step a replayed graph on a GPU.

    input_ids: int64 [B, T]. attention_mask: [B, T], zeros for padding, which must be on the left.
    decoder: a `Decoder` to reuse, with its cache and graph (default: a new one for this call).
    Returns int64 [B, T + n] with n <= max_new_tokens: decoding ends when every sequence has written an end-of-text token
    of the generation config. A static cache sums in another order than a growing one, so where the probabilities of two
    tokens differ by less than 16-bit rounding, the other one may be chosen.
    Raises `LlmqError` for cache layers other than plain attention's, and for settings that greedy decoding does not
    support.
    """
    if not isinstance(input_ids, Tensor) or input_ids.dtype not in (torch.int64, torch.int32):
        given = str(input_ids.dtype) if isinstance(input_ids, Tensor) else type(input_ids).__name__
        raise LlmqError(f"input_ids must be an integer tensor, int64 [B, T]; got {given}")
    if input_ids.ndim != 2 or 0 in input_ids.shape:
        raise LlmqError(f"input_ids must be [B, T] with B and T at least 1; got {list(input_ids.shape)}")
    if not isinstance(max_new_tokens, int):
        raise LlmqError(f"max_new_tokens must be an integer; got {max_new_tokens!r}")
    if max_new_tokens < 1:
        raise LlmqError(f"max_new_tokens must be at least 1; got {max_new_tokens}")
    batch, length = input_ids.shape
    return (decoder or Decoder(model, batch, length + max_new_tokens)).generate(
        input_ids, max_new_tokens, attention_mask
    )


class Decoder:
    """A model with a cache for `batch` sequences of up to `length` tokens, and the graph of its decode step.

    graph: the captured step; None until one is captured.
    eager_because: why steps run eagerly; None if they are replayed.
    token: int64 [B, 1], the last token of each sequence. position: int64 [B, 1], its position.
    written: int64 [B, length], all new tokens. place: int64 [1], the column of `written` to write next.
    mask: int64 [B, length], the attention mask over the whole text; passed to the model if `padded`.
    ended: bool [B, 1], whether a sequence has written an end-of-text token.
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
        """As `generate_fast`. Raises `LlmqError` for another batch size, and for more tokens than the cache holds."""
        if len(input_ids) != self.batch or input_ids.shape[1] + max_new_tokens > self.length:
            given = f"{len(input_ids)} of {input_ids.shape[1]} + {max_new_tokens}"
            raise LlmqError(
                f"this decoder holds {self.batch} sequences of at most {self.length} tokens, prompt included; got {given}"
            )
        self.prefill(input_ids, attention_mask)
        remaining = max_new_tokens - 1
        while remaining and not bool(self.ended.all()):
            for _ in range(min(remaining, STEPS_BETWEEN_CHECKS)):
                self.step()
                remaining -= 1
        written = self.written[:, : max_new_tokens - remaining]
        return torch.cat((input_ids.to(self.device), written[:, : self._needed(written)]), 1)

    @torch.inference_mode()
    def prefill(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> None:
        """Run the prompt [B, T] into the cache and write the first new token."""
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
        """Write one more token for every sequence."""
        if self.graph is not None:
            self.graph.replay()
        else:
            self._step()

    def _step(self) -> None:
        self._advance(self.token, self.position)
        self.position.add_(1)

    def _advance(self, ids: Tensor, positions: Tensor, **arguments: Any) -> None:
        """Run the model on ids [B, t] and write the likeliest next token."""
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

    def _set_mask(self, prompt_mask: Tensor | None, length: int) -> None:
        """Fill the mask over the whole text. A model that takes no `position_ids` always gets it.

        prompt_mask: that of the prompt, [B, length]; None without padding.
        """
        padded = "position_ids" not in self.parameters
        self.mask.fill_(1)
        if prompt_mask is not None:
            if prompt_mask.shape != (self.batch, length) or not bool(prompt_mask[:, -1].all()):
                raise LlmqError(f"attention_mask must be {[self.batch, length]} with padding on the left only")
            if not bool(prompt_mask.all()):
                self.mask[:, :length] = prompt_mask.to(self.mask)
                padded = True
        if padded != self.padded:
            self.padded, self.graph = padded, None

    def _capture(self) -> None:
        """Capture the step, after warm-up steps that make layouts, compile kernels and fill allocators."""
        self._rewind()
        self._advance(self.token, self.position)
        operators = host_traffic(self._first_step, self.device)
        if operators:
            self.eager_because = f"a step of this model waits for the host ({', '.join(operators)})"
            return
        side = torch.cuda.Stream(self.device)  # type: ignore[no-untyped-call]
        side.wait_stream(torch.cuda.current_stream(self.device))
        with torch.cuda.stream(side):
            self._first_step()
        torch.cuda.current_stream(self.device).wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.device(self.device), torch.cuda.graph(graph):
            self._step()
        self.graph = graph

    def _rewind(self) -> None:
        """Reset to the state before the prompt."""
        self.cache.reset()
        for state in (self.token, self.position, self.place, self.ended):
            state.zero_()

    def _first_step(self) -> None:
        self._rewind()
        self._step()

    def _needed(self, written: Tensor) -> int:
        """The number of columns until the last sequence has ended."""
        if not self.ends:
            return written.shape[1]
        ended = torch.isin(written, self.end_ids).int()
        first = torch.where(ended.any(1), ended.argmax(1) + 1, written.shape[1])
        return int(first.max())


def static_cache(model: PreTrainedModel, length: int) -> StaticCache:
    """A cache whose layers all hold `length` tokens and count them on the device.

    Raises `LlmqError` for cache layers other than plain and sliding-window attention's.
    """
    cache = StaticCache(config=model.config, max_cache_len=length)
    for index, layer in enumerate(cache.layers):
        if type(layer) not in (StaticLayer, StaticSlidingWindowLayer):
            raise LlmqError(
                f"generate_fast supports attention caches only; layer {index} caches in a {type(layer).__name__}: "
                "use generate"
            )
        cache.layers[index] = StaticLayer(max_cache_len=length)
    return cache


class _HostTraffic(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Records operators that a captured graph may not hold: reads of the device, and copies between it and the host."""

    def __init__(self, device: torch.device) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.device, self.operators = device, dict[str, None]()

    def __torch_dispatch__(self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        name = func._schema.name.removeprefix("aten::")
        places = {x.device.type for x in (*args, result) if isinstance(x, Tensor)}
        on_device = self.device.type in places
        if on_device and (name in ("_local_scalar_dense", "nonzero", "lift_fresh", "equal") or _crosses(name, places)):
            self.operators[name] = None
        return result


def _crosses(name: str, places: set[str]) -> bool:
    """Whether an operator copies between devices."""
    return name in ("_to_copy", "copy_") and len(places) > 1


def host_traffic(step: Callable[[], None], device: torch.device) -> tuple[str, ...]:
    """Run a step; returns the names of its operators that prevent capture, () if there are none."""
    with _HostTraffic(device) as traffic:
        step()
    return tuple(traffic.operators)


def _no_graph(model: PreTrainedModel, device: torch.device) -> str | None:
    """Why no graph can be captured, before a step is tried; None if one may be."""
    if device.type != "cuda":
        return f"CUDA graphs need a CUDA device; the model is on {device.type}"
    places = set((getattr(model, "hf_device_map", None) or {}).values())
    if len(places) > 1:
        return f"the model is spread over {', '.join(sorted(map(str, places)))}"
    return None


def _refuse(model: PreTrainedModel, length: int) -> None:
    """Raise `LlmqError` for settings that change greedy decoding, and for a text longer than the model's context."""
    settings = model.generation_config
    active = [name for name in NEUTRAL_AT_ONE if getattr(settings, name, None) not in (None, 1)]
    active += [name for name in NEUTRAL_WHEN_EMPTY if getattr(settings, name, None) not in (None, 0, [])]
    if active:
        value = getattr(settings, active[0])
        raise LlmqError(
            f"generate_fast is greedy only, but generation_config.{active[0]} is {value}; unset it or use generate"
        )
    context = getattr(text_decoder(model.config, model).config, "max_position_embeddings", None)
    if isinstance(context, int) and length > context:
        raise LlmqError(f"prompt and new tokens must fit in the model's context of {context} tokens; got {length}")
