"""Configuration values: validated once, exact round trip, unknown keys refused; no torch behind them."""

from __future__ import annotations

import subprocess
import sys

import pytest

from llmq.config import METHODS, Calibration, QuantConfig
from llmq.errors import LlmqError


def test_round_trip() -> None:
    config = QuantConfig(method="rtn", bits=8, group_size=-1, symmetric=False, ignore=("re:.*down",), dtype="float16")
    assert QuantConfig.from_dict(config.to_dict()) == config


def test_scales_default_by_method() -> None:
    assert QuantConfig(method="rtn").scales == "minmax"
    assert QuantConfig(method="gptq").scales == "search"
    assert QuantConfig(method="rtn", scales="search").scales == "search"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"bits": 5}, "bits must be one of 2, 3, 4, 8; got 5"),
        ({"bits": "4"}, "bits must be one of"),
        ({"bits": True}, "bits must be one of"),
        ({"group_size": 0}, "group_size must be positive"),
        ({"group_size": 64.0}, "group_size must be an integer"),
        ({"method": "magic"}, r"method must be one of rtn, gptq, awq, awq\+gptq; got 'magic'"),
        ({"scales": "best"}, "scales must be one of"),
        ({"symmetric": 1}, "symmetric must be True or False"),
        ({"damping": 0.0}, "damping must lie"),
        ({"dtype": "int8"}, "dtype must be one of"),
    ],
)
def test_values_outside_the_rules_are_refused(change: dict[str, object], message: str) -> None:
    with pytest.raises(LlmqError, match=message):
        QuantConfig(**change)  # type: ignore[arg-type]


def test_unknown_keys_are_refused() -> None:
    with pytest.raises(LlmqError, match="QuantConfig has no desc_act; it has method, bits"):
        QuantConfig.from_dict({"desc_act": True})


def test_calibration_sizes_are_positive() -> None:
    with pytest.raises(LlmqError, match="num_samples must be at least 1; got 0"):
        Calibration(num_samples=0)


def test_method_table_and_functions_agree() -> None:
    from llmq.methods import ROUNDINGS
    from llmq.transforms import TRANSFORMS

    assert {row.rounding for row in METHODS} == {name for name, _ in ROUNDINGS}
    assert {row.transform for row in METHODS} - {None} == {name for name, _ in TRANSFORMS}


def test_importing_llmq_and_its_config_loads_nothing_heavy() -> None:
    heavy = ("torch", "transformers", "triton", "datasets")
    code = f"import sys, llmq, llmq.config, llmq.cli.commands; print([m for m in {heavy} if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
