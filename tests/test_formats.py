"""compressed-tensors on disk: round trips, the config, and the library itself as oracle in both directions."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from llmq.core.grid import Grid, fit, fit_full_range, quantize
from llmq.core.quantized import QuantizedWeight
from llmq.errors import LlmqError
from llmq.formats import FORMATS
from llmq.formats import compressed_tensors as ct

BITS = (2, 3, 4, 8)


def quantized(
    rows: int, columns: int, grid: Grid, dtype: torch.dtype = torch.bfloat16, seed: int = 0
) -> QuantizedWeight:
    weight = torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed))
    choose = fit_full_range if grid.symmetric and seed % 2 else fit
    return quantize(weight, *choose(weight, grid, dtype), grid)


@pytest.mark.parametrize("layout", FORMATS, ids=lambda module: module.NAME)
@given(
    st.integers(1, 40), st.integers(1, 5), st.sampled_from((None, 1, 3, 32)), st.sampled_from(BITS), st.booleans(),
    st.sampled_from((torch.bfloat16, torch.float16, torch.float32)), st.integers(0, 99),
)  # fmt: skip
@settings(max_examples=120, deadline=None)
def test_encode_and_decode_are_exact(layout, rows, groups, size, bits, symmetric, dtype, seed) -> None:  # type: ignore[no-untyped-def]
    grid = Grid(bits, size, symmetric)
    columns = groups * (size or 7)
    weight = quantized(rows, columns, grid, dtype, seed)
    tensors = layout.encode(weight)
    expected = layout.specs((rows, columns), grid, dtype)
    layout.check(tensors, expected)
    again = layout.decode(tensors, grid)
    assert torch.equal(again.codes, weight.codes)
    assert torch.equal(again.scale, weight.scale)
    assert (again.zero is None) == symmetric
    assert symmetric or torch.equal(again.zero, weight.zero)


def test_specs_count_the_bytes() -> None:
    grid = Grid(4, 32, symmetric=False)
    tensors = ct.encode(quantized(48, 64, grid))
    specs = ct.specs((48, 64), grid, torch.bfloat16)
    assert {name: spec.nbytes for name, spec in specs.items()} == {name: t.nbytes for name, t in tensors.items()}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"weight_packed": None}, "weight_packed is missing"),
        ({"weight_g_idx": torch.zeros(64, dtype=torch.int32)}, "weight_g_idx is not part of this scheme"),
        ({"weight_packed": torch.zeros(48, 8)}, "weight_packed must be torch.int32 .48, 8.; got torch.float32"),
        (
            {"weight_scale": torch.zeros(2, 48, dtype=torch.bfloat16)},
            "weight_scale must be .* got torch.bfloat16 .2, 48.",
        ),
    ],
)
def test_decode_refuses_what_does_not_fit(change: dict[str, torch.Tensor | None], message: str) -> None:
    grid = Grid(4, 32, symmetric=True)
    tensors = {**ct.encode(quantized(48, 64, grid)), **change}
    with pytest.raises(LlmqError, match=message):
        ct.decode({name: tensor for name, tensor in tensors.items() if tensor is not None}, grid)


def test_per_tensor_scales_have_no_place_in_the_format() -> None:
    grid = Grid(4, None, symmetric=True, per_tensor=True)
    with pytest.raises(LlmqError, match="not per tensor"):
        ct.encode(quantized(4, 32, grid, seed=0))


GRIDS = [
    {f"layers.{i}.{name}": Grid(4, 64, True) for i in range(12) for name in ("a.q", "a.o", "m.down")},
    {
        **{f"layers.{i}.a.q": Grid(4, 64, True) for i in range(12)},
        **{f"layers.{i}.m.down": Grid(4, 32, True) for i in range(12)},
    },
    {"layers.0.q": Grid(8, 64, False), "layers.1.q": Grid(4, None, True), "layers.2.q": Grid(4, 64, True)},
]


@pytest.mark.parametrize("grids", GRIDS, ids=["one", "by kind", "mixed"])
def test_config_says_the_grid_of_every_module(grids: dict[str, Grid]) -> None:
    written = json.loads(json.dumps(ct.config(grids, ["lm_head"], ordered=True)))
    layout = ct.parse(written)
    for name, grid in grids.items():
        assert layout.grid_for(name, ("Linear", "Module")) == grid
    assert layout.grid_for("lm_head", ("Linear",)) is None
    assert layout.grid_for("embed", ("Embedding",)) is None


def test_groups_by_kind_are_written_as_short_patterns() -> None:
    groups = ct.config(GRIDS[1], [], ordered=False)["config_groups"]
    assert [group["targets"] for group in groups.values()] == [[r"re:.*\.q$"], [r"re:.*\.down$"]]


def broken(**changes: object) -> dict[str, object]:
    config = ct.config({"a": Grid(4, 32, True)}, [], ordered=False)
    for path, value in changes.items():
        place = config
        *parents, last = path.split("__")
        for parent in parents:
            place = place[parent]
        place[last] = value
    return config


WEIGHTS = "config_groups__group_0__weights__"


@pytest.mark.parametrize(
    ("config", "reason"),
    [
        (broken(quant_method="gptq"), "quant_method is 'gptq'"),
        (broken(quantization_status="frozen"), "quantization_status is 'frozen'"),
        (broken(config_groups={}), "no config_groups"),
        (broken(kv_cache_scheme={"num_bits": 8}), "kv_cache_scheme"),
        (broken(config_groups__group_0__format="float-quantized"), "format is 'float-quantized'"),
        (broken(config_groups__group_0__input_activations={"num_bits": 8}), "activations are quantized"),
        (broken(**{WEIGHTS + "type": "float"}), "not static integers"),
        (broken(**{WEIGHTS + "strategy": "tensor"}), "strategy is 'tensor'"),
        (broken(**{WEIGHTS + "actorder": "group"}), "activation order"),
        (broken(**{WEIGHTS + "num_bits": 5}), "num_bits is 5"),
    ],
)
def test_schemes_that_are_not_ours_are_told_apart(config: dict[str, object], reason: str) -> None:
    found = ct.foreign(config)
    assert found is not None
    assert reason in found
    with pytest.raises(LlmqError, match="not a checkpoint that llmq runs"):
        ct.parse(config)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (broken(**{WEIGHTS + "group_size": "64"}), "group_size must be a positive integer; got '64'"),
        (broken(**{WEIGHTS + "group_size": 0}), "group_size must be a positive integer; got 0"),
        (broken(config_groups__group_0__targets="Linear"), "targets must be a list of strings"),
        (broken(ignore=["re:("]), "broken regex 're:\\('"),
        (broken(ignore=[3]), "patterns must be strings; got 3"),
    ],
)
def test_malformed_configs_are_refused_by_name(config: dict[str, object], message: str) -> None:
    with pytest.raises(LlmqError, match=message):
        ct.parse(config)


ORACLE = """
import json, sys, torch
from safetensors.torch import load_file, save_file
from compressed_tensors.compressors import BaseCompressor
from compressed_tensors.quantization import QuantizationScheme
folder = sys.argv[1]
cases = json.load(open(f"{folder}/cases.json"))
library = BaseCompressor.get_value_from_registry("pack-quantized")
for index, group in enumerate(cases):
    scheme = QuantizationScheme(**group)
    ours = load_file(f"{folder}/{index}.safetensors")
    decoded = library.decompress(ours, scheme)
    dense = {k: decoded[k] for k in ("weight", "weight_scale", "weight_zero_point") if k in decoded}
    theirs = {k: v.contiguous() for k, v in library.compress(dense, scheme).items()}
    save_file({"weight": decoded["weight"].contiguous()}, f"{folder}/{index}.decoded")
    save_file(theirs, f"{folder}/{index}.packed")
    save_file({"weight": library.decompress(theirs, scheme)["weight"].contiguous()}, f"{folder}/{index}.again")
"""


def library_versions() -> list[str]:
    return ["0.17.0", "0.18.0", "0.19.0", "0.20.0"]


def run_oracle(folder: Path, python_path: str | None) -> None:
    """Have the library decode and encode our tensors of 16 cases, and compare bit by bit."""
    from safetensors.torch import load_file, save_file

    cases, weights = [], []
    for bits in (2, 4, 8):
        for size in (None, 32):
            for symmetric in (True, False):
                for dtype in (torch.bfloat16, torch.float32):
                    grid = Grid(bits, size, symmetric)
                    weight = quantized(48, 96, grid, dtype, seed=len(cases))
                    save_file(ct.encode(weight), folder / f"{len(cases)}.safetensors")
                    cases.append(ct.config({"a": grid}, [], ordered=True)["config_groups"]["group_0"])
                    weights.append(weight)
    (folder / "cases.json").write_text(json.dumps(cases))
    environment = None if python_path is None else {"PYTHONPATH": python_path}
    done = subprocess.run([sys.executable, "-c", ORACLE, str(folder)], capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    for index, weight in enumerate(weights):
        decoded = load_file(folder / f"{index}.decoded")["weight"]
        assert torch.equal(decoded, weight.dequantize()), cases[index]
        grid = Grid(weight.bits, None if weight.group_size == 96 else weight.group_size, weight.symmetric)
        ours = ct.decode(load_file(folder / f"{index}.packed"), grid).dequantize()
        assert torch.equal(ours, load_file(folder / f"{index}.again")["weight"]), "we decode what the library writes"


def test_the_library_decodes_ours_and_we_decode_the_librarys(tmp_path: Path) -> None:
    pytest.importorskip("compressed_tensors")
    run_oracle(tmp_path, None)


@pytest.mark.slow
@pytest.mark.parametrize("version", library_versions())
def test_every_supported_version_of_the_library_agrees(tmp_path: Path, version: str) -> None:
    target = tmp_path / "site"
    command = [sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--target", str(target)]
    got = subprocess.run([*command, f"compressed-tensors=={version}"], capture_output=True, text=True)
    if got.returncode:
        pytest.skip(f"compressed-tensors {version} could not be installed: {got.stderr.strip().splitlines()[-1:]}")
    run_oracle(tmp_path, str(target))
