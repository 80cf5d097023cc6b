"""The correctness checks that a packed model must pass before its speed is measured.

    linears   every packed linear, with random rows, against float32 and its dequantized weight, element by element
    logits    of random prompts, against the same model with linears computed in float32 from dequantized weights: at most
              twice as far from it as dequantized weights in the model's own dtype are
    tokens    those of generate_fast against those of generate; they may differ where two logits are closer than the noise of
              the arithmetic (just measured on the logits), and are not compared after that

The dequantized model is the packed one whose linears run their dequantized weight instead, one dense weight at a time,
through `QuantizedWeight.dequantize`, which no kernel is part of.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from llmq.errors import LlmqError
from llmq.eval.models import random_ids
from llmq.hf.generation import generate_fast
from llmq.serving.linear import QuantLinear
from llmq.serving.overrides import forward_overridden

ROUNDING = {torch.float16: 2**-10, torch.bfloat16: 2**-7, torch.float32: 2**-20}
"""Allowed relative error of one output: two roundings."""
TYPICAL_SHARE = 0.02
"""Allowed error as a share of an output's typical size, for rounded weights and the order of sums. One wrong group of 128
columns in 4096 changes an output by 0.18."""
LOGITS_FLOOR = 2**-9
"""Relative distance of logits that is always allowed: on small models dense arithmetic may be nearly exact."""


@dataclass(frozen=True)
class Prompts:
    """Random prompts."""

    ids: Tensor
    """int64 [sequences, tokens]."""
    new: int
    """Tokens to generate after them."""


def drawn_prompts(model: Any, sequences: int, tokens: int, new: int, seed: int) -> Prompts:
    """Random prompts for a model, on its device."""
    return Prompts(random_ids(model, sequences, tokens, seed), new)


@torch.inference_mode()
def check_model(name: str, model: Any, prompts: Prompts, rows: Sequence[int], seed: int) -> dict[str, Any]:
    """Run all checks; the results as JSON values. Raises `LlmqError` that names the failure.

    name: of the model, for messages. rows: M of the linears, each number that will be measured.
    """
    worst = check_linears(name, model, rows, seed)
    distance, dense, noise = check_logits(name, model, prompts.ids)
    return {
        "model": name,
        "linears_worst": worst,
        "linears_allowed": 1.0,
        "logits_distance": distance,
        "logits_allowed": 2 * dense + LOGITS_FLOOR,
        "logits_noise": noise,
        **check_tokens(name, model, prompts, noise),
    }


def check_linears(name: str, model: nn.Module, rows: Sequence[int], seed: int) -> float:
    """The largest error of any output, as a multiple of the allowed one."""
    generator = torch.Generator().manual_seed(seed)
    dtype, worst = model.dtype, 0.0
    assert isinstance(dtype, torch.dtype)
    linears = {path: module for path, module in model.named_modules() if isinstance(module, QuantLinear)}
    for count in rows:
        inputs: dict[int, Tensor] = {}  # by width: fused linears must get the same tensor
        for path, linear in linears.items():
            width = linear.in_features
            if width not in inputs:
                noise = torch.randn(count, width, generator=generator, dtype=torch.float32)
                inputs[width] = noise.to(linear.device, dtype)
            error = _relative_error(linear(inputs[width]), inputs[width], linear)
            if not error <= 1:
                raise LlmqError(
                    f"{name}: with {count} rows, {path} must compute its dequantized weight; the error of an output is "
                    f"{error:.3g} times the allowed one (kernel {linear.choice(dtype, count).kernel.name}); "
                    "no speed is measured; force another kernel and report this one"
                )
            worst = max(worst, error)
    return worst


def _relative_error(y: Tensor, x: Tensor, linear: QuantLinear) -> float:
    weight, x = linear.dequantize(torch.float32), x.float()  # [N, K], [M, K]
    want = x @ weight.T + (0 if linear.bias is None else linear.bias.float())  # [M, N]
    typical = x.norm(dim=1)[:, None] * weight.norm(dim=1)[None, :] / weight.shape[1] ** 0.5
    allowed = ROUNDING[y.dtype] * want.abs() + TYPICAL_SHARE * typical + torch.finfo(torch.float32).tiny
    return float(((y.float() - want).abs() / allowed).max())


def check_logits(name: str, model: Any, ids: Tensor) -> tuple[float, float, float]:
    """Relative distances of the packed and of the dense model to exact linears, and the largest difference of the dense one."""
    with _dense(model, torch.float32):
        exact = _logits(model, ids)
    with _dense(model, model.dtype):
        dense = _logits(model, ids)
    size = exact.norm()
    packed = _logits(model, ids)
    distance, rounded = float((packed - exact).norm() / size), float((dense - exact).norm() / size)
    if not distance <= 2 * rounded + LOGITS_FLOOR:
        raise LlmqError(
            f"{name}: the relative distance of the logits to exact ones must be at most {2 * rounded + LOGITS_FLOOR:.2g}, "
            f"twice that of dequantized weights; it is {distance:.2g}; no speed is measured"
        )
    return distance, rounded, float((dense - exact).abs().max())


def _logits(model: Any, ids: Tensor) -> Tensor:
    logits: Tensor = model(input_ids=ids, use_cache=False).logits
    return logits.float()


def _dense(model: nn.Module, dtype: torch.dtype) -> AbstractContextManager[None]:
    """While open, packed linears compute with their dequantized weight in `dtype` and round to the input's dtype."""

    def forward_of(linear: QuantLinear) -> Callable[[Tensor], Tensor]:
        def forward(x: Tensor) -> Tensor:
            bias = None if linear.bias is None else linear.bias.to(dtype)
            return nn.functional.linear(x.to(dtype), linear.dequantize(dtype), bias).to(x.dtype)

        return forward

    return forward_overridden([module for module in model.modules() if isinstance(module, QuantLinear)], forward_of)


def check_tokens(name: str, model: Any, prompts: Prompts, noise: float) -> dict[str, Any]:
    """How many tokens were compared, and in how many sequences two logits were too close to decide."""
    ids, new = prompts.ids, prompts.new
    want = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=new, do_sample=False)
    got = generate_fast(model, ids, new)
    length = min(want.shape[1], got.shape[1])
    compared = undecided = 0
    for row in range(len(ids)):
        differ = (want[row, :length] != got[row, :length]).nonzero()
        place = int(differ[0]) if len(differ) else length
        compared += place - ids.shape[1]
        if not len(differ):
            continue
        logits = _logits(model, want[row : row + 1, :place])[0, -1]
        gap = abs(float(logits[want[row, place]] - logits[got[row, place]]))
        if gap > 2 * noise:
            raise LlmqError(
                f"{name}: generate_fast must give the tokens of generate; token {place - ids.shape[1]} of sequence {row} is "
                f"{int(got[row, place])} instead of {int(want[row, place])}, and their logits differ by {gap:.3g} with a "
                f"noise of {noise:.3g}; no speed is measured"
            )
        undecided += 1
    if want.shape != got.shape and not undecided:
        raise LlmqError(f"{name}: generate_fast must stop where generate does, at {want.shape[1]}; got {got.shape[1]}")
    return {"tokens_compared": compared, "sequences": len(ids), "sequences_undecided": undecided}
