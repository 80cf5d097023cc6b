"""What must hold before any speed of a packed model is told: it computes what its weights say.

    linears   every packed linear, with random rows, against float32 and the dequantized weight, element by element
    logits    of fresh prompts, against the same model with its linears computed in float32 from dequantized weights: not
              farther from it than twice what the dequantized weights in the model's own dtype are
    tokens    what generate_fast writes against what generate does; they may part where the model itself is undecided by
              less than its arithmetic is exact (the logits' noise, as just measured), and are not compared after it

The dequantized model is the packed one whose linears answer from their dequantized weight, one dense weight at a time,
through `QuantizedWeight.dequantize`, which no kernel has a part in.
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
from llmq.serving.linear import QuantLinear, forward_overridden

STEP = {torch.float16: 2**-10, torch.bfloat16: 2**-7, torch.float32: 2**-20}
"""Relative error of one result: two roundings."""
SHARE = 0.02
"""Of an output's typical size: what rounded weights and the order of sums may move it by. One wrong group of 128 columns
in 4096 moves it by 0.18."""
FLOOR = 2**-9
"""Relative distance of logits that is never held against a kernel: on small models dense arithmetic may be nearly exact."""


@dataclass(frozen=True)
class Prompts:
    """Fresh random ids. ids: int64 [sequences, tokens]. new: tokens written after them."""

    ids: Tensor
    new: int


def drawn_prompts(model: Any, sequences: int, tokens: int, new: int, seed: int) -> Prompts:
    """Prompts for a model, on its device."""
    return Prompts(random_ids(model, sequences, tokens, seed), new)


@torch.inference_mode()
def check(name: str, model: Any, prompts: Prompts, rows: Sequence[int], seed: int) -> dict[str, Any]:
    """What was found, as JSON values. `LlmqError` naming what is wrong.

    name: of the model, for messages. rows: of the linears' input, each number that will be measured.
    """
    worst = check_linears(name, model, rows, seed)
    apart, dense, noise = check_logits(name, model, prompts.ids)
    return {
        "model": name,
        "linears_worst": worst,
        "linears_allowed": 1.0,
        "logits_apart": apart,
        "logits_allowed": 2 * dense + FLOOR,
        "logits_noise": noise,
        **check_tokens(name, model, prompts, noise),
    }


def check_linears(name: str, model: nn.Module, rows: Sequence[int], seed: int) -> float:
    """The largest error of any output, as a share of what is allowed."""
    generator = torch.Generator().manual_seed(seed)
    dtype, worst = model.dtype, 0.0
    assert isinstance(dtype, torch.dtype)
    linears = {called: module for called, module in model.named_modules() if isinstance(module, QuantLinear)}
    for count in rows:
        given: dict[int, Tensor] = {}  # by width: linears that are one are handed one tensor
        for called, linear in linears.items():
            width = linear.in_features
            if width not in given:
                given[width] = torch.randn(count, width, generator=generator).to(linear.device, dtype)
            found = _share_of_allowed(linear(given[width]), given[width], linear)
            if not found <= 1:
                raise LlmqError(
                    f"{name}: with {count} rows {called} must give what its weight says; an output is "
                    f"{found:.3g} times as far off as allowed ({linear.choice(dtype, count).kernel.NAME}): "
                    "no speed is measured; force another kernel and report this one"
                )
            worst = max(worst, found)
    return worst


def _share_of_allowed(y: Tensor, x: Tensor, linear: QuantLinear) -> float:
    weight, x = linear.dequantize(torch.float32), x.float()  # [N, K], [M, K]
    want = x @ weight.T + (0 if linear.bias is None else linear.bias.float())  # [M, N]
    typical = x.norm(dim=1)[:, None] * weight.norm(dim=1)[None, :] / weight.shape[1] ** 0.5
    allowed = STEP[y.dtype] * want.abs() + SHARE * typical + torch.finfo(torch.float32).tiny
    return float(((y.float() - want).abs() / allowed).max())


def check_logits(name: str, model: Any, ids: Tensor) -> tuple[float, float, float]:
    """Relative distance to exact linears of the packed model, of the dense one, and the dense one's largest difference."""
    with _dense(model, torch.float32):
        exact = _logits(model, ids)
    with _dense(model, model.dtype):
        dense = _logits(model, ids)
    size = exact.norm()
    packed = _logits(model, ids)
    apart, rounded = float((packed - exact).norm() / size), float((dense - exact).norm() / size)
    if not apart <= 2 * rounded + FLOOR:
        raise LlmqError(
            f"{name}: logits must be as near to the dequantized model's as its own arithmetic is "
            f"({2 * rounded + FLOOR:.2g} allowed); they are {apart:.2g} off: no speed is measured"
        )
    return apart, rounded, float((dense - exact).abs().max())


def _logits(model: Any, ids: Tensor) -> Tensor:
    logits: Tensor = model(input_ids=ids, use_cache=False).logits
    return logits.float()


def _dense(model: nn.Module, kind: torch.dtype) -> AbstractContextManager[None]:
    """Packed linears answer from their dequantized weight, computed in `kind` and rounded to the input's dtype."""

    def forward_of(linear: QuantLinear) -> Callable[[Tensor], Tensor]:
        def forward(x: Tensor) -> Tensor:
            bias = None if linear.bias is None else linear.bias.to(kind)
            return nn.functional.linear(x.to(kind), linear.dequantize(kind), bias).to(x.dtype)

        return forward

    return forward_overridden([module for module in model.modules() if isinstance(module, QuantLinear)], forward_of)


def check_tokens(name: str, model: Any, prompts: Prompts, noise: float) -> dict[str, Any]:
    """How many tokens were compared, and in how many sequences the model was undecided."""
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
        said = _logits(model, want[row : row + 1, :place])[0, -1]
        gap = abs(float(said[want[row, place]] - said[got[row, place]]))
        if gap > 2 * noise:
            raise LlmqError(
                f"{name}: generate_fast must write what generate does; token {place - ids.shape[1]} of sequence {row} is "
                f"{int(got[row, place])} for {int(want[row, place])}, whose logits are {gap:.3g} apart with a noise of "
                f"{noise:.3g}: no speed is measured"
            )
        undecided += 1
    if want.shape != got.shape and not undecided:
        raise LlmqError(f"{name}: generate_fast must end where generate does; got {got.shape[1]} for {want.shape[1]}")
    return {"tokens_compared": compared, "sequences": len(ids), "sequences_undecided": undecided}
