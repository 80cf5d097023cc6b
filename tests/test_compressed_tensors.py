"""compressed-tensors on disk: its config, and the library itself as oracle in both directions.

What holds for every format is in test_formats.py.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from llmq.core.grid import Grid, fit, quantize
from llmq.core.quantized import QuantizedWeight
from llmq.core.scheme import Scheme, scheme_of
from llmq.errors import LlmqError
from llmq.formats.compressed_tensors import CompressedTensors
from tests.fixtures import fit_full_range

FORMAT = CompressedTensors()
BF16 = torch.bfloat16


def quantized(rows: int, columns: int, grid: Grid, dtype: torch.dtype, seed: int) -> QuantizedWeight:
    weight = torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed))
    choose = fit_full_range if grid.symmetric and seed % 2 else fit
    return quantize(weight, *choose(weight, grid, dtype), grid)


def written(grids: dict[str, Grid], ignore: list[str], ordered: bool = False) -> dict[str, object]:
    return FORMAT.config({name: Scheme(grid, None, BF16) for name, grid in grids.items()}, ignore, ordered)


def test_scales_are_stored_in_the_models_dtype() -> None:
    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        assert FORMAT.scale_dtype(dtype) == dtype


def test_the_stored_tensors_are_those_of_the_module_docstring() -> None:
    specs = FORMAT.specs((48, 64), Scheme(Grid(4, 32, False), None, BF16))
    assert {name: str(spec) for name, spec in specs.items()} == {
        "weight_packed": "torch.int32 [48, 8]",
        "weight_scale": "torch.bfloat16 [48, 2]",
        "weight_zero_point": "torch.int32 [6, 2]",
        "weight_shape": "torch.int64 [2]",
    }
    symmetric = FORMAT.specs((48, 64), Scheme(Grid(4, 32, True), None, BF16))
    assert {**specs, **symmetric} == specs
    assert set(specs) - set(symmetric) == {"weight_zero_point"}


GRIDS = [
    {f"layers.{i}.{name}": Grid(4, 64, True) for i in range(12) for name in ("a.q", "a.o", "m.down")},
    {
        **{f"layers.{i}.a.q": Grid(4, 64, True) for i in range(12)},
        **{f"layers.{i}.m.down": Grid(4, 32, True) for i in range(12)},
    },
    {"layers.0.q": Grid(8, 64, False), "layers.1.q": Grid(4, None, True), "layers.2.q": Grid(4, 64, True)},
]


@pytest.mark.parametrize("grids", GRIDS, ids=["one", "by kind", "mixed"])
def test_the_config_gives_back_the_grid_of_every_module(grids: dict[str, Grid]) -> None:
    layout = FORMAT.parse(json.loads(json.dumps(written(grids, ["lm_head"]))))
    for name, grid in grids.items():
        assert layout.scheme_for(name, ("Linear", "Module"), BF16) == Scheme(grid, None, BF16)
    assert layout.scheme_for("lm_head", ("Linear",), BF16) is None
    assert layout.scheme_for("embed", ("Embedding",), BF16) is None


def test_groups_by_kind_are_written_as_short_patterns() -> None:
    groups = written(GRIDS[1], [])["config_groups"]
    assert [group["targets"] for group in groups.values()] == [[r"re:.*\.q$"], [r"re:.*\.down$"]]


@pytest.mark.parametrize("grids", GRIDS, ids=["one", "by kind", "mixed"])
@pytest.mark.parametrize(("ordered", "actorder"), [(True, "weight"), (False, None)])
def test_activation_order_is_recorded_in_every_group(
    grids: dict[str, Grid], ordered: bool, actorder: str | None
) -> None:
    groups = written(grids, [], ordered)["config_groups"]
    assert [group["weights"]["actorder"] for group in groups.values()] == [actorder] * len(groups)


def broken(**changes: object) -> dict[str, object]:
    config = written({"a": Grid(4, 32, True)}, [])
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
def test_unsupported_configs_are_refused_with_the_reason(config: dict[str, object], reason: str) -> None:
    actual = FORMAT.unsupported_reason(config)
    assert actual is not None
    assert reason in actual
    with pytest.raises(LlmqError, match="llmq cannot run this checkpoint") as caught:
        FORMAT.parse(config)
    assert reason in str(caught.value)


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
        FORMAT.parse(config)


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
    """Let the library decode and encode the tensors of 24 cases, and compare bit by bit."""
    from safetensors.torch import load_file, save_file

    cases, weights = [], []
    for bits in (2, 4, 8):
        for size in (None, 32):
            for symmetric in (True, False):
                for dtype in (torch.bfloat16, torch.float32):
                    grid = Grid(bits, size, symmetric)
                    weight = quantized(48, 96, grid, dtype, seed=len(cases))
                    save_file(FORMAT.encode(weight), folder / f"{len(cases)}.safetensors")
                    cases.append(written({"a": grid}, [], ordered=True)["config_groups"]["group_0"])
                    weights.append(weight)
    (folder / "cases.json").write_text(json.dumps(cases))
    environment = None if python_path is None else {"PYTHONPATH": python_path}
    done = subprocess.run([sys.executable, "-c", ORACLE, str(folder)], capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    for index, weight in enumerate(weights):
        decoded = load_file(folder / f"{index}.decoded")["weight"]
        assert torch.equal(decoded, weight.dequantize()), cases[index]
        ours = FORMAT.decode(load_file(folder / f"{index}.packed"), scheme_of(weight)).dequantize()
        assert torch.equal(ours, load_file(folder / f"{index}.again")["weight"]), "we decode what the library writes"


def test_the_library_decodes_our_tensors_and_we_decode_its(tmp_path: Path) -> None:
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
