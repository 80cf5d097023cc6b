"""Checkpoints that contradict their config or the model are refused, naming the tensor."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

import llmq
from tests.fixtures import DISK, float32_checkpoint, logits

PACKED = "model.layers.1.mlp.up_proj.weight_packed"
SCALE = "model.layers.1.mlp.up_proj.weight_scale"
BIAS = "model.layers.1.self_attn.q_proj.bias"


def rewrite(folder: Path, name: str, change: Callable[[torch.Tensor], torch.Tensor] | None) -> None:
    """Change, add or (None) take out one tensor of a checkpoint."""
    tensors = load_file(folder / "model.safetensors")
    if change is None:
        del tensors[name]
    else:
        tensors[name] = change(tensors[name] if name in tensors else torch.zeros(64, 64))
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


BROKEN = [
    (PACKED, None, r"up_proj.weight_packed is missing"),
    (SCALE, None, r"up_proj.weight_scale is missing"),
    (SCALE.replace("scale", "shape"), None, r"up_proj.weight_shape is missing"),
    (PACKED, lambda t: t.float(), r"weight_packed must be torch.int32 \[128, 8\]; got torch.float32"),
    (PACKED, lambda t: t.T.contiguous(), r"weight_packed must be torch.int32 \[128, 8\]; got torch.int32 \[8, 128\]"),
    (PACKED, lambda t: t[:, :4].contiguous(), r"weight_packed must be torch.int32 \[128, 8\]"),
    (SCALE, lambda t: t.int(), "up_proj.weight_scale: compressed-tensors stores scales in .*; got torch.int32"),
    (SCALE, lambda t: t[:, :1].contiguous(), r"weight_scale must be torch.float32 \[128, 2\]; got"),
    (SCALE, lambda t: t * float("nan"), "up_proj.weight_scale holds NaN, inf or zero"),
    (SCALE, lambda t: t / 0, "up_proj.weight_scale holds NaN, inf or zero"),
    (SCALE, lambda t: t * (torch.arange(len(t)) > 0)[:, None], "up_proj.weight_scale holds NaN, inf or zero"),
    (
        SCALE.replace("scale", "shape"),
        lambda t: t.flip(0),
        r"weight_shape must be \[128, 64\], the shape in the model; got \[64, 128\]",
    ),
    (SCALE.replace("scale", "g_idx"), lambda t: t.int(), "weight_g_idx is not part of this scheme"),
    (SCALE.replace("scale", "zero_point"), lambda t: t.int(), "weight_zero_point is not part of this scheme"),
    (PACKED.replace("_packed", ""), lambda t: t, "up_proj.weight is not part of this scheme"),
    ("lm_head.weight_packed", lambda t: t.int(), "lm_head.weight_packed belongs to no linear that the config"),
    ("model.layers.9.mlp.up_proj.weight_scale", lambda t: t, "layers.9.mlp.up_proj.weight_scale belongs to no linear"),
    ("model.norm.weight", lambda t: t[:7].contiguous(), r"model.norm.weight must be \[64\]; got \[7\]"),
]


@pytest.mark.parametrize(("name", "change", "message"), BROKEN)
def test_broken_checkpoints_are_refused_by_name(tmp_path: Path, name: str, change, message: str) -> None:  # type: ignore[no-untyped-def]
    folder = float32_checkpoint(tmp_path / "a", method="rtn")
    rewrite(folder, name, change)
    with pytest.raises(llmq.LlmqError, match=message):
        llmq.load(folder)
    llmq.enable()
    try:
        with pytest.raises(llmq.LlmqError, match=message):
            AutoModelForCausalLM.from_pretrained(folder)
    finally:
        llmq.disable()


@pytest.mark.parametrize(
    ("arch", "name", "change", "message"),
    [
        ("llama", "model.norm.weight", None, "model.norm.weight is missing"),
        ("llama", "model.layers.1.self_attn.q_proj.bias", lambda t: t[0], "q_proj.bias is not part of this scheme"),
        ("qwen2", BIAS, None, "q_proj.bias is missing"),
        ("qwen2", BIAS, lambda t: t[:9].contiguous(), r"q_proj.bias must be torch.float32 \[64\]; got .*\[9\]"),
        ("llama", "model.layers.1.mlp.up_proj", None, "the config says that this linear is quantized"),
    ],
)
def test_incomplete_linears_are_refused_by_name(tmp_path: Path, arch: str, name: str, change, message: str) -> None:  # type: ignore[no-untyped-def]
    folder = float32_checkpoint(tmp_path / "a", arch, method="rtn")
    if name.endswith("proj"):  # dense where the config says packed
        for suffix in ("packed", "scale", "shape"):
            rewrite(folder, f"{name}.weight_{suffix}", None)
        rewrite(folder, f"{name}.weight", lambda _: torch.zeros(128, 64))
    else:
        rewrite(folder, name, change)
    with pytest.raises(llmq.LlmqError, match=message):
        llmq.load(folder)


def test_broken_offloaded_weights_are_refused_too(tmp_path: Path) -> None:
    folder = float32_checkpoint(tmp_path / "a", method="rtn")
    rewrite(folder, SCALE, lambda t: t * float("nan"))
    layers = {f"model.layers.{i}": "disk" if i == 1 else "cpu" for i in range(4)}
    with pytest.raises(llmq.LlmqError, match="up_proj.weight_scale holds NaN"):
        llmq.load(folder, device_map={**DISK, **layers}, offload_folder=tmp_path / "offload")


def test_a_base_model_prefix_may_be_absent_and_pickles_are_refused(tmp_path: Path) -> None:
    folder = float32_checkpoint(tmp_path / "a", method="rtn")
    want = logits(llmq.load(folder))
    tensors = load_file(folder / "model.safetensors")
    short = {name.removeprefix("model."): tensor for name, tensor in tensors.items()}
    save_file(short, folder / "model.safetensors", metadata={"format": "pt"})
    assert torch.equal(logits(llmq.load(folder)), want), "transformers adds the base model's prefix"
    (folder / "model.safetensors").unlink()
    torch.save(tensors, folder / "pytorch_model.bin")
    with pytest.raises(llmq.LlmqError, match=r"pytorch_model\.bin; pickles are not read"):
        llmq.load(folder)
