"""Values that several test modules share: ids, a tokenizer, checkpoints, packed weights."""

from __future__ import annotations

from pathlib import Path

import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from torch import Tensor, nn
from transformers import PreTrainedTokenizerFast

import llmq
from llmq.core.grid import Grid, checked_scale, fit, grouped, quantize
from llmq.core.packing import pack
from llmq.core.quantized import QuantizedWeight
from llmq.kernels.problem import Packed
from tests.tiny import VOCAB, tiny_model

BF16 = torch.bfloat16
N, K = 48, 96


IDS = torch.randint(3, VOCAB, (2, 24), generator=torch.Generator().manual_seed(1))


WINDOWS = torch.randint(3, VOCAB, (8, 32), generator=torch.Generator().manual_seed(2))


def logits(model: nn.Module) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=IDS).logits


def tiny_tokenizer() -> PreTrainedTokenizerFast:
    words = {"<pad>": 0, "<s>": 1, "</s>": 2} | {f"w{i}": i for i in range(3, VOCAB)}
    model = Tokenizer(WordLevel(words, unk_token="<pad>"))
    model.pre_tokenizer = Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=model, pad_token="<pad>", eos_token="</s>")


DISK = {"model.embed_tokens": "cpu", "model.norm": "cpu", "model.rotary_emb": "cpu", "lm_head": "cpu"}


def checkpoint(folder: Path, arch: str = "llama", **changes: object) -> Path:
    config = llmq.QuantConfig(**{"method": "rtn", "group_size": 32, "dtype": "bfloat16", **changes})  # type: ignore[arg-type]
    llmq.quantize(tiny_model(arch), folder, config, None if config.method == "rtn" else WINDOWS)
    return folder


def float32_checkpoint(folder: Path, arch: str = "llama", **changes: object) -> Path:
    """`checkpoint` in float32 and by the default method."""
    return checkpoint(folder, arch, **{"method": llmq.QuantConfig().method, "dtype": "float32", **changes})


def fit_full_range(weight: Tensor, grid: Grid, dtype: torch.dtype) -> tuple[Tensor, None]:
    """Signed full-range symmetric scales: the largest |w| of each group gets code 0, whatever its sign.

    weight: [N, K]. Returns scale [N, G] in `dtype`, negative where that weight is positive.
    """
    groups = grouped(weight.float(), grid)
    extreme = groups.gather(-1, groups.abs().argmax(-1, keepdim=True)).squeeze(-1)
    return checked_scale(-extreme / grid.middle, dtype), None


def quantized_weight(
    grid: Grid, dtype: torch.dtype = BF16, rows: int = N, columns: int = K, seed: int = 0
) -> QuantizedWeight:
    weight = torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed))
    scale, zero = (fit_full_range if grid.symmetric else fit)(weight, grid, dtype)
    return quantize(weight, scale, zero, grid)


def rows(*shape: int, dtype: torch.dtype = BF16) -> Tensor:
    return torch.randn(*shape, K, generator=torch.Generator().manual_seed(2)).to(dtype)


def drawn(
    rows: int, columns: int, size: int, symmetric: bool, dtype: torch.dtype, seed: int = 0, bits: int = 4
) -> Packed:
    """A weight whose every stored bit is drawn: scales of any sign, zero points and codes from 0 to the largest."""
    generator = torch.Generator().manual_seed(seed)
    codes = torch.randint(0, 1 << bits, (rows, columns), generator=generator, dtype=torch.uint8)
    scale = torch.randn(rows, columns // size, generator=generator).to(dtype)
    zero = None
    if not symmetric:
        points = torch.randint(0, 1 << bits, (columns // size, rows), generator=generator, dtype=torch.uint8)
        zero = pack(points, bits).T.contiguous()
    return Packed(rows, columns, bits, size, pack(codes, bits), scale, zero)
