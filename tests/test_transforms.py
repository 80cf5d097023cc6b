"""The contract of transforms, over the method table: the function of a block is kept, and nothing changes unasked."""

from __future__ import annotations

import copy

import pytest
import torch

from llmq.blocks.capture import capture, find_blocks
from llmq.blocks.replay import Stage, replay, staged
from llmq.blocks.statistics import observe
from llmq.blocks.topology import input_groups, linears
from llmq.config import METHODS, resolve
from llmq.core.grid import Grid
from llmq.methods.base import Target
from llmq.methods.rtn import rtn
from llmq.transforms.base import TransformContext
from llmq.transforms.discovery import find_pairs
from llmq.transforms.pairs import Pair
from tests.tiny import VOCAB, tiny_model

TRANSFORMS = sorted({row.transform for row in METHODS if row.transform})
IDS = torch.randint(3, VOCAB, (8, 32), generator=torch.Generator().manual_seed(2))
TARGET = Target(Grid(3, 32, True), torch.float32, "search", 0.01)


@pytest.mark.parametrize("arch", ["llama", "gemma2", "opt"])
@pytest.mark.parametrize("name", TRANSFORMS)
def test_a_transform_keeps_the_blocks_function_and_names_what_it_did(name: str, arch: str) -> None:
    model = tiny_model(arch)
    block = find_blocks(model)[1][0]
    captured = capture(model, lambda ids: model.base_model(input_ids=ids, use_cache=False), list(IDS.split(4)))
    calls, hidden = captured.calls[0], captured.hidden
    one = capture(model, lambda ids: model.base_model(input_ids=ids, use_cache=False), [IDS[:1, :16]])
    groups = input_groups(block, one.calls[0][0], one.hidden[0])
    pairs = [pair for pair in find_pairs(block, one.calls[0][0], one.hidden[0], groups).pairs if isinstance(pair, Pair)]
    context = TransformContext(rtn, dict.fromkeys(linears(block), TARGET))
    before, want = copy.deepcopy(block.state_dict()), replay(block, calls, hidden)
    stages = [Stage.at(linears(block)[pair.consumers[0]]) for pair in pairs]
    proposals = []
    for pair, inputs in zip(pairs, staged(block, calls, hidden, stages), strict=False):
        statistics = observe(((0, x) for (x,) in inputs), pair.consumers[0], 192, apart=True)
        proposals.append(resolve(name)(block, pair, statistics, context))
    assert all(torch.equal(before[key], value) for key, value in block.state_dict().items()), (
        "proposing changes nothing"
    )
    reports = [proposal.applied() for proposal in proposals]
    assert [report.consumers for report in reports] == [pair.consumers for pair in pairs]
    changed = any(not torch.equal(before[key], value) for key, value in block.state_dict().items())
    assert changed == any(report.note is None for report in reports)
    for got, expected in zip(replay(block, calls, hidden), want, strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-3, atol=1e-3)
