"""The contract of every format in `FORMATS`: exact round trips, specs that match, configs that parse, honest refusals."""

from __future__ import annotations

import json
from itertools import combinations
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from llmq.core.grid import Grid, fit, quantize
from llmq.core.quantized import QuantizedWeight
from llmq.core.scheme import ActivationGrid, Scheme, scheme_of
from llmq.errors import LlmqError
from llmq.formats import DEFAULT_FORMAT, FORMATS, IN_MEMORY, format_named, format_of, unsupported_reason
from llmq.formats.base import Format, Layout, LayoutGroup, check_specs, matches, spec_of
from tests.fixtures import fit_full_range

DTYPES = (torch.bfloat16, torch.float16, torch.float32)
each_format = pytest.mark.parametrize("disk_format", FORMATS, ids=lambda each: each.name)
# One layer's linears: q, k and v share an input, as do gate and up.
NAMES = [f"model.layers.{i}.{name}" for i in range(12) for name in ("attn.q", "attn.o", "mlp.up", "mlp.down")]


def quantized(
    rows: int, columns: int, grid: Grid, dtype: torch.dtype = torch.bfloat16, seed: int = 0
) -> QuantizedWeight:
    weight = torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed))
    choose = fit_full_range if grid.symmetric and seed % 2 else fit
    return quantize(weight, *choose(weight, grid, dtype), grid)


def stored_schemes(disk_format: Format) -> list[Scheme]:
    """Weight-only schemes that the format stores, of all combinations that llmq can round to."""
    candidates = [
        Scheme(Grid(bits, size, symmetric), None, disk_format.scale_dtype(dtype))
        for bits in (2, 3, 4, 8)
        for size in (None, 32, 64, 128)
        for symmetric in (True, False)
        for dtype in DTYPES
    ]
    return [scheme for scheme in dict.fromkeys(candidates) if disk_format.refusal(scheme) is None]


def test_formats_are_found_by_name_and_by_config() -> None:
    assert len({each.name for each in FORMATS}) == len(FORMATS)
    for each in FORMATS:
        assert format_named(each.name) is each
        assert format_of({"quant_method": each.name}) is each
    assert IN_MEMORY in FORMATS
    assert DEFAULT_FORMAT in FORMATS
    assert format_of({"quant_method": "unknown"}) is None
    names = [each.name for each in FORMATS]
    assert unsupported_reason({"quant_method": "unknown"}) == f"quant_method is 'unknown', not {str(names)[1:-1]}"
    with pytest.raises(LlmqError, match=f"format must be one of {', '.join(names)}; got 'unknown'"):
        format_named("unknown")


@each_format
def test_every_format_stores_some_scheme(disk_format: Format) -> None:
    assert stored_schemes(disk_format)
    assert disk_format.scale_name in disk_format.tensor_names
    assert set(disk_format.metadata_names) < set(disk_format.tensor_names) <= set(disk_format.reserved_names)


@each_format
@given(
    st.integers(1, 40), st.integers(1, 5), st.sampled_from((None, 1, 3, 32)), st.sampled_from((2, 3, 4, 5, 6, 8)),
    st.booleans(), st.sampled_from((*DTYPES, torch.float64)), st.integers(0, 99),
)  # fmt: skip
@settings(max_examples=150, deadline=None)
def test_a_scheme_is_refused_or_stored_exactly(disk_format, rows, groups, size, bits, symmetric, dtype, seed) -> None:  # type: ignore[no-untyped-def]
    shape = rows, groups * (size or 7)
    weight = quantized(*shape, Grid(bits, size, symmetric), dtype, seed)
    scheme = scheme_of(weight)
    reason = disk_format.refusal(scheme)
    if reason is not None:
        for refused in (lambda: disk_format.encode(weight), lambda: disk_format.specs(shape, scheme)):
            with pytest.raises(LlmqError) as caught:
                refused()
            assert str(caught.value) == f"{disk_format.name} {reason}"
        return
    tensors = disk_format.encode(weight)
    assert {name: spec_of(tensor) for name, tensor in tensors.items()} == disk_format.specs(shape, scheme)
    assert set(tensors) <= set(disk_format.tensor_names)
    assert tensors[disk_format.scale_name].dtype == scheme.scale_dtype
    disk_format.check_values(tensors, shape)
    again = disk_format.decode(tensors, scheme)
    assert scheme_of(again) == scheme
    assert torch.equal(again.codes, weight.codes)
    assert torch.equal(again.scale, weight.scale)
    assert symmetric or torch.equal(again.zero, weight.zero)


@each_format
def test_specs_count_the_bytes(disk_format: Format) -> None:
    for scheme in stored_schemes(disk_format):
        tensors = disk_format.encode(quantized(48, 128, scheme.weight, scheme.scale_dtype))
        specs = disk_format.specs((48, 128), scheme)
        assert {name: spec.nbytes for name, spec in specs.items()} == {name: t.nbytes for name, t in tensors.items()}


@each_format
def test_decode_refuses_tensors_that_disagree_with_the_scheme(disk_format: Format) -> None:
    scheme = stored_schemes(disk_format)[0]
    tensors = disk_format.encode(quantized(48, 128, scheme.weight, scheme.scale_dtype))
    for name, tensor in tensors.items():
        rest = {other: value for other, value in tensors.items() if other != name}
        with pytest.raises(LlmqError, match=f"{name} is missing"):
            disk_format.decode(rest, scheme)
        if name not in disk_format.metadata_names:
            for wrong in (tensor[:-1], tensor.double()):
                with pytest.raises(LlmqError, match=f"{name} must be .*; got {wrong.dtype!s}"):
                    disk_format.decode({**rest, name: wrong}, scheme)
    with pytest.raises(LlmqError, match="extra is not part of this scheme"):
        disk_format.decode({**tensors, "extra": torch.zeros(1)}, scheme)


@each_format
@pytest.mark.parametrize("broken", [0.0, float("nan"), float("inf")])
def test_broken_scales_and_shapes_are_found_by_value(disk_format: Format, broken: float) -> None:
    scheme = stored_schemes(disk_format)[0]
    tensors = disk_format.encode(quantized(48, 128, scheme.weight, scheme.scale_dtype))
    tensors[disk_format.scale_name] = tensors[disk_format.scale_name].clone()
    tensors[disk_format.scale_name][-1, -1] = broken
    with pytest.raises(LlmqError, match=f"a.b.{disk_format.scale_name} holds NaN, inf or zero"):
        disk_format.check_values(tensors, (48, 128), "a.b.")


@each_format
def test_quantized_activations_are_refused_by_name(disk_format: Format) -> None:
    """No format stores them yet. One that does returns no refusal, and then must write and parse them."""
    weight_only = stored_schemes(disk_format)[0]
    for activation in (ActivationGrid(8, "token", True, True), ActivationGrid(8, "tensor", False, False)):
        scheme = Scheme(weight_only.weight, activation, weight_only.scale_dtype)
        reason = disk_format.refusal(scheme)
        if reason is None:
            assert scheme_in(disk_format, {"a": scheme}, "a") == scheme
            continue
        assert str(activation) in reason
        for refused in (
            lambda s=scheme: disk_format.specs((48, 128), s),
            lambda s=scheme: disk_format.config({"a": s}, [], True),
        ):
            with pytest.raises(LlmqError, match=str(activation)):
                refused()


def parsed(disk_format: Format, schemes: dict[str, Scheme], ignore: list[str], ordered: bool) -> Layout:
    """The config of `schemes`, written to JSON and parsed again."""
    config: dict[str, Any] = json.loads(json.dumps(disk_format.config(schemes, ignore, ordered)))
    assert format_of(config) is disk_format
    assert disk_format.unsupported_reason(config) is None
    return disk_format.parse(config)


def scheme_in(disk_format: Format, schemes: dict[str, Scheme], name: str) -> Scheme | None:
    return parsed(disk_format, schemes, [], False).scheme_for(name, ("Linear", "Module"), schemes[name].scale_dtype)


@each_format
@pytest.mark.parametrize("ordered", [True, False])
def test_the_config_gives_back_the_scheme_of_every_module(disk_format: Format, ordered: bool) -> None:
    for scheme in stored_schemes(disk_format):
        layout = parsed(disk_format, dict.fromkeys(NAMES, scheme), ["lm_head"], ordered)
        assert {layout.scheme_for(name, ("Linear", "Module"), scheme.scale_dtype) for name in NAMES} == {scheme}
        assert layout.scheme_for("lm_head", ("Linear", "Module"), scheme.scale_dtype) is None
        assert layout.scheme_for("model.embed", ("Embedding", "Module"), scheme.scale_dtype) is None


@each_format
def test_mixed_schemes_are_refused_or_given_back(disk_format: Format) -> None:
    scale_dtype = stored_schemes(disk_format)[0].scale_dtype
    for pair in combinations([s for s in stored_schemes(disk_format) if s.scale_dtype == scale_dtype], 2):
        by_kind = {name: pair[name.endswith("down")] for name in NAMES}
        by_layer = {name: pair["layers.3." in name] for name in NAMES}
        for schemes in (by_kind, by_layer):
            try:
                layout = parsed(disk_format, schemes, ["lm_head"], True)
            except LlmqError:
                continue
            for name, scheme in schemes.items():
                assert layout.scheme_for(name, ("Linear", "Module"), scale_dtype) == scheme


@each_format
def test_configs_of_other_formats_are_not_supported(disk_format: Format) -> None:
    config = disk_format.config({"a": stored_schemes(disk_format)[0]}, [], False)
    for changed in ({**config, "quant_method": "unknown"}, {}):
        assert disk_format.unsupported_reason(changed) is not None
        with pytest.raises(LlmqError, match="llmq cannot run this checkpoint: "):
            disk_format.parse(changed)


def test_a_target_by_name_wins_over_one_by_class() -> None:
    wide, narrow = Grid(8, None, True), Grid(4, 32, True)
    layout = Layout((LayoutGroup(("Linear",), narrow), LayoutGroup(("re:.*down$",), wide)), ("lm_head",))
    for name, grid in (("mlp.down", wide), ("mlp.up", narrow)):
        assert layout.scheme_for(name, ("Linear",), torch.float16) == Scheme(grid, None, torch.float16)
    assert layout.scheme_for("lm_head", ("Linear",), torch.float16) is None


def test_patterns_are_names_classes_or_regexes_that_match_from_the_start() -> None:
    assert matches("a.b", "a.b", ())
    assert not matches("a", "a.b", ())
    assert matches("Linear", "a.b", ("Linear", "Module"))
    assert matches("re:a", "a.b", ())
    assert not matches("re:b", "a.b", ("b",))


def test_specs_that_differ_are_named() -> None:
    spec = spec_of(torch.zeros(2, 3))
    check_specs({"a": spec}, {"a": spec})
    with pytest.raises(LlmqError, match="x.b is missing"):
        check_specs({"a": spec}, {"a": spec, "b": spec}, "x.")
    with pytest.raises(LlmqError, match=r"a must be torch.float32 \[2, 3\]; got torch.float32 \[3, 2\]"):
        check_specs({"a": spec_of(torch.zeros(3, 2))}, {"a": spec})
