"""Configuration values: every field is checked, the round trip is exact, unknown keys are refused, nothing imports torch."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import fields
from inspect import isfunction
from pathlib import Path
from typing import Any

import pytest

from llmq.config import METHODS, SCALES, Calibration, Method, QuantConfig, method, resolve
from llmq.errors import LlmqError

IGNORE = "ignore must be a tuple or list of module names, class names or re:REGEX"
DATASET = "dataset must be a string: builtin, wikitext2, c4, self or the path of a text file"


def test_round_trip_through_json() -> None:
    config = QuantConfig(
        method="rtn",
        bits=8,
        group_size=-1,
        symmetric=False,
        scales="search",
        ignore=("re:.*down",),
        damping=0.05,
        dtype="float16",
        all_experts=True,
    )
    assert all(getattr(config, field.name) != field.default for field in fields(QuantConfig))
    again = QuantConfig.from_dict(json.loads(json.dumps(config.to_dict())))
    assert again == config
    assert again.ignore == ("re:.*down",)
    assert QuantConfig.from_dict({}) == QuantConfig()


def test_scales_default_by_method() -> None:
    assert QuantConfig(method="rtn").scales == "minmax"
    assert QuantConfig(method="gptq").scales == "search"
    assert QuantConfig(method="rtn", scales="search").scales == "search"


NAN, INF = float("nan"), float("inf")


NAMES = ", ".join(row.name for row in METHODS)


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("method", "magic", f"method must be one of {NAMES}; got 'magic'"),
        ("method", ["rtn"], f"method must be one of {NAMES}; got ['rtn']"),
        ("method", None, f"method must be one of {NAMES}; got None"),
        ("bits", 5, "bits must be one of 2, 3, 4, 8; got 5"),
        ("bits", "4", "bits must be one of 2, 3, 4, 8; got '4'"),
        ("bits", 4.0, "bits must be one of 2, 3, 4, 8; got 4.0"),
        ("bits", True, "bits must be one of 2, 3, 4, 8; got True"),
        ("group_size", 0, "group_size must be positive, or -1 for one scale per channel; got 0"),
        ("group_size", -2, "group_size must be positive, or -1 for one scale per channel; got -2"),
        ("group_size", 64.0, "group_size must be an integer; got 64.0"),
        ("group_size", "64", "group_size must be an integer; got '64'"),
        ("group_size", True, "group_size must be an integer; got True"),
        ("group_size", None, "group_size must be an integer; got None"),
        ("symmetric", 1, "symmetric must be True or False; got 1"),
        ("symmetric", "no", "symmetric must be True or False; got 'no'"),
        ("all_experts", 1, "all_experts must be True or False; got 1"),
        ("scales", "best", "scales must be one of minmax, search; got 'best'"),
        ("scales", 1, "scales must be one of minmax, search; got 1"),
        ("dtype", "int8", "dtype must be one of auto, bfloat16, float16, float32; got 'int8'"),
        ("dtype", None, "dtype must be one of auto, bfloat16, float16, float32; got None"),
        ("damping", 0.0, "damping must be a number strictly between 0 and 1, such as 0.01; got 0.0"),
        ("damping", 1, "damping must be a number strictly between 0 and 1, such as 0.01; got 1"),
        ("damping", NAN, "damping must be a number strictly between 0 and 1, such as 0.01; got nan"),
        ("damping", INF, "damping must be a number strictly between 0 and 1, such as 0.01; got inf"),
        ("damping", "0.1", "damping must be a number strictly between 0 and 1, such as 0.01; got '0.1'"),
        ("damping", True, "damping must be a number strictly between 0 and 1, such as 0.01; got True"),
        ("ignore", "lm_head", f"{IGNORE}; got the string 'lm_head'; write ('lm_head',)"),
        ("ignore", (3,), f"{IGNORE}; it holds 3"),
        ("ignore", ("lm_head", ""), f"{IGNORE}; it holds ''"),
        ("ignore", None, f"{IGNORE}; got None"),
        ("ignore", 3, f"{IGNORE}; got 3"),
        ("ignore", {"lm_head"}, f"{IGNORE}; got {{'lm_head'}}"),
        (
            "ignore",
            ("re:[a",),
            f"{IGNORE}; 're:[a' is not a regular expression: unterminated character set at position 0",
        ),
    ],
)
def test_values_of_a_config_are_checked(field: str, value: object, message: str) -> None:
    assert refused(QuantConfig, field, value) == message
    with pytest.raises(LlmqError) as caught:
        QuantConfig.from_dict({field: value})
    assert str(caught.value) == message


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("dataset", 3, f"{DATASET}; got 3"),
        ("dataset", None, f"{DATASET}; got None"),
        ("dataset", "", f"{DATASET}; got ''"),
        ("dataset", Path("text.txt"), f"{DATASET}; got {Path('text.txt')!r}"),
        ("num_samples", 0, "num_samples must be at least 1; got 0"),
        ("num_samples", 2.0, "num_samples must be an integer; got 2.0"),
        ("num_samples", True, "num_samples must be an integer; got True"),
        ("seq_len", -1, "seq_len must be at least 1; got -1"),
        ("seq_len", 2.5, "seq_len must be an integer; got 2.5"),
        ("seq_len", "2048", "seq_len must be an integer; got '2048'"),
        ("seed", "x", "seed must be an integer; got 'x'"),
        ("seed", None, "seed must be an integer; got None"),
        ("seed", False, "seed must be an integer; got False"),
        ("seed", -1, "seed must be at least 0 and below 2**64; got -1"),
        ("seed", 2**64, f"seed must be at least 0 and below 2**64; got {2**64}"),
    ],
)
def test_values_of_a_calibration_are_checked(field: str, value: object, message: str) -> None:
    assert refused(Calibration, field, value) == message


def refused(cls: Any, field: str, value: object) -> str:
    with pytest.raises(LlmqError) as caught:
        cls(**{field: value})
    return str(caught.value)


def test_a_list_of_patterns_is_stored_as_a_tuple() -> None:
    assert QuantConfig(ignore=["lm_head", "re:.*down"]) == QuantConfig(ignore=("lm_head", "re:.*down"))  # type: ignore[arg-type]


def test_unknown_keys_are_refused() -> None:
    with pytest.raises(LlmqError, match="QuantConfig has no desc_act; it has method, bits"):
        QuantConfig.from_dict({"desc_act": True})


@pytest.mark.parametrize("row", METHODS, ids=lambda row: row.name)
def test_every_row_of_the_method_table_names_functions_that_exist(row: Method) -> None:
    assert method(row.name) is row
    assert row.default_scales in SCALES
    for path in (row.rounding, row.transform or row.rounding):
        module, name = path.split(":")
        function = resolve(path)
        assert isfunction(function)
        assert (function.__module__, function.__name__) == (module, name)


def test_the_names_of_methods_are_unique() -> None:
    assert len({row.name for row in METHODS}) == len(METHODS)


def test_importing_llmq_and_its_config_loads_nothing_heavy() -> None:
    heavy = ("torch", "transformers", "triton", "datasets")
    code = f"import sys, llmq, llmq.config, llmq.cli.commands; print([m for m in {heavy} if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
