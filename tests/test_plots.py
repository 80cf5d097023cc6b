"""PNGs of a benchmark's record: made from the JSON alone, or refused with a remedy."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from typing import Any

import pytest

from llmq.bench.kernels import plots
from llmq.errors import LlmqError

missing = importlib.util.find_spec("matplotlib") is None


def record(path: Path, **more: Any) -> Path:
    rows = [
        {"shape": f"{k}x64", "layer": "", "m": m, "what": what, "preferred": what == "triton", "roofline": 0.5}
        | {"speedup": None if k == 384 else k / 100}
        for k in range(128, 768, 128)
        for m in (1, 16, 1024)
        for what in ("triton", "dense", "an unknown kernel")
    ]
    head = {
        "device": "a GPU",
        "arch": "sm_90",
        "dtype": "float16",
        "bits": 4,
        "group": 128,
        "symmetric": True,
        "ceilings": {},
    }
    head |= {"self_test": True, "date": "2026-01-01T00:00:00", "versions": {"torch": "2", "triton": None}}
    path.write_text(json.dumps(head | {"rows": rows} | more))
    return path


@pytest.mark.skipif(missing, reason="matplotlib is not installed")
def test_two_figures_of_a_record(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from matplotlib.figure import Figure

    saved: list[Figure] = []
    draw = Figure.savefig
    monkeypatch.setattr(Figure, "savefig", lambda self, *args, **more: (saved.append(self), draw(self, *args, **more)))
    made = plots.plot_record(record(tmp_path / "kernels-x.json"), tmp_path / "out")
    assert [path.name for path in made] == ["kernels-x-speedup.png", "kernels-x-roofline.png"]
    assert all(path.read_bytes().startswith(b"\x89PNG") for path in made)
    for figure, label in zip(saved, ("speed-up over cuBLAS", "share of the roofline, %"), strict=True):
        shown = [axes for axes in figure.axes if axes.get_visible()]
        assert len(shown) == 5
        assert shown[0].get_ylabel() == label
        assert shown[-1].get_xlabel() == "M, rows of x"
        assert "SELF-TEST" in str(figure.get_suptitle())
        boxes = [axes.get_tightbbox() for axes in shown]
        assert not any(a.overlaps(b) for i, a in enumerate(boxes) for b in boxes[:i])
        for axes in shown:
            low, high = axes.get_ylim()
            assert low == 0
            assert all(0 <= y <= high for line in axes.lines for y in line.get_ydata()), "nothing is cut off"
    speedups, shares = saved
    third = next(axes for axes in speedups.axes if "384x64" in axes.get_title())
    assert len(third.lines) == 1, "only the dense line: nothing was compared there"
    triton = next(line for line in shares.axes[0].lines if line.get_color() == plots.STYLES["triton"][0])
    assert list(triton.get_xdata()) == [1, 16, 1024]
    assert list(triton.get_ydata()) == [50.0] * 3


@pytest.mark.skipif(missing, reason="matplotlib is not installed")
def test_a_file_that_is_not_a_record_is_refused(tmp_path: Path) -> None:
    for path in (record(tmp_path / "kernels-empty.json", rows=[]), tmp_path / "list.json"):
        (tmp_path / "list.json").write_text("[]")
        with pytest.raises(LlmqError, match="has no benchmark rows; use a file written by scripts/bench_kernels.py"):
            plots.plot_record(path, tmp_path)


@pytest.mark.skipif(missing, reason="matplotlib is not installed")
def test_a_truncated_record_is_refused(tmp_path: Path) -> None:
    path = record(tmp_path / "kernels-x.json")
    path.write_text(path.read_text()[:-20])
    with pytest.raises(LlmqError, match=r"kernels-x.json is not complete JSON: .*; use a file written by"):
        plots.plot_record(path, tmp_path)


def test_messages_name_the_remedy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(LlmqError, match=r"has no kernels-\*.json; run scripts/bench_kernels.py --output"):
        plots.records(tmp_path)
    path = record(tmp_path / "kernels-x.json")
    assert plots.records(tmp_path) == [path]
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(LlmqError, match=r"matplotlib, which is not installed: pip install 'llmq\[plots\]'"):
        plots.plot_record(path, tmp_path)
