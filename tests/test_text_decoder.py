"""The text decoder of every architecture runs the decoder blocks and not the output head."""

from __future__ import annotations

import pytest
import torch

from llmq.blocks.capture import find_blocks
from llmq.hf.text_decoder import text_decoder
from tests.fixtures import IDS
from tests.tiny import ARCHITECTURES, HIDDEN, POSITIONS, tiny_model


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_it_runs_every_block_and_no_head(arch: str) -> None:
    model = tiny_model(arch)
    decoder = text_decoder(model.config, model)
    assert model.get_submodule(decoder.name) is decoder.module
    blocks_name, _ = find_blocks(model)
    assert blocks_name.startswith(f"{decoder.name}.")
    heads: list[torch.nn.Module] = []
    model.get_output_embeddings().register_forward_hook(lambda module, *_: heads.append(module))
    with torch.no_grad():
        hidden = decoder.module(input_ids=IDS, use_cache=False).last_hidden_state
    assert hidden.shape == (*IDS.shape, HIDDEN)
    assert heads == []
    assert decoder.config.hidden_size == HIDDEN
    assert getattr(decoder.config, "max_position_embeddings", POSITIONS) == POSITIONS


def test_a_model_without_a_head_is_its_own_decoder() -> None:
    inner = tiny_model("llama").model
    decoder = text_decoder(inner.config, inner)
    assert decoder.module is inner
    assert decoder.name == ""
