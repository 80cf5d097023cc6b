"""The commands as a user runs them: tables, one JSON line, exit statuses, Ctrl-C."""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

import llmq
from llmq.cli.commands import app, default_output
from llmq.cli.options import EXAMPLES
from llmq.demo import DEMO_NAME
from tests.fixtures import tiny_tokenizer
from tests.tiny import VOCAB, tiny_model

ROOT = Path(__file__).resolve().parent.parent
TEXT = " ".join(f"w{3 + (i * 7919 + i // 3) % (VOCAB - 4)}" for i in range(4000))


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model folder with a tokenizer, and a text."""
    folder = tmp_path_factory.mktemp("source")
    tiny_model("llama").save_pretrained(folder / "model")
    tiny_tokenizer().save_pretrained(folder / "model")
    (folder / "text.txt").write_text(TEXT)
    return folder


def run(*arguments: object, status: int = 0) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(ROOT / "scripts" / f"{arguments[0]}.py"), *map(str, arguments[1:])]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == status, done.stderr
    assert "Traceback" not in done.stderr
    return done


Call = Callable[..., str]


@pytest.fixture
def call(capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Call:
    """As `run`, in this process: what the command printed on stdout."""
    monkeypatch.setattr("llmq.memory.map_large_tensors", lambda: None)  # it would last for the process

    def in_this_process(*arguments: object) -> str:
        app([str(each) for each in arguments], standalone_mode=False)
        return capfd.readouterr().out

    return in_this_process


def last(done: subprocess.CompletedProcess[str] | str):  # type: ignore[no-untyped-def]
    return json.loads((done if isinstance(done, str) else done.stdout).strip().splitlines()[-1])


def test_quantize_evaluate_generate(source: Path, tmp_path: Path) -> None:
    common = ("--dataset", source / "text.txt")
    calibration = ("--num_samples", 8, "--seqlen", 64, "--group-size", 32)  # `_` and the short alias are accepted
    done = run("quantize", source / "model", "-o", tmp_path / "out", *calibration, *common)
    assert f"next:\n  llmq evaluate {tmp_path / 'out'}\n" in done.stdout
    values = last(done)
    wanted = "output method bits group_size symmetric seconds peak_rss_bytes linears bits_per_weight checkpoint_bytes fallbacks"
    assert set(wanted.split()) <= set(values)
    assert values["method"] == "awq+gptq"
    assert values["linears"] == 28
    assert values["calibration"]["windows"] == 8
    report = json.loads((tmp_path / "out" / "llmq_report.json").read_text())
    assert len(report["layers"]) == 28
    done = run("evaluate", source / "model", tmp_path / "out", *common, "--window", 64, "--limit", 4)
    first, second = last(done)
    done = run("evaluate", tmp_path / "out", "--against", source / "model", *common, "--window", 64, "--limit", 4)
    assert "same top-1" in done.stdout
    values = last(done)
    assert values["kl"] > 0
    assert 0 < values["top1"] < 1
    assert {"model", "perplexity", "stderr", "tokens", "window", "dataset", "dtype", "seconds"} <= set(first)
    assert first["perplexity"] != second["perplexity"]
    assert "vs. first" in done.stdout
    assert "to_first" not in first
    assert second["to_first"] == pytest.approx(second["perplexity"] - first["perplexity"])
    assert second["to_first_stderr"] > 0
    values = last(run("generate", tmp_path / "out", "--prompt", "w3 w4", "--max-new-tokens", 5))
    assert {"model", "text", "prompt_tokens", "new_tokens", "seconds", "tokens_per_second"} == set(values)
    assert values["prompt_tokens"] == 2
    assert values["new_tokens"] <= 5


def test_evaluate_models_with_different_contexts_and_unusual_names(source: Path, tmp_path: Path) -> None:
    """Results on different tokens are not compared, a prompt that does not fit is shortened, names are not markup."""
    short = tmp_path / "run[v2]{1}"
    shutil.copytree(source / "model", short)
    config = json.loads((short / "config.json").read_text())
    (short / "config.json").write_text(json.dumps({**config, "max_position_embeddings": 64}))
    done = run(
        "evaluate", source / "model", short, "--dataset", source / "text.txt", "--window", 128, "--limit", 2, "--speed"
    )
    first, second = last(done)
    assert "compare bits/byte" in done.stdout
    assert "run[v2]{1}" in done.stdout.replace("\n", "")
    assert (first["window"], second["window"]) == (128, 64)
    assert "to_first" not in second
    assert first["speed"]["prompt_tokens"] + first["speed"]["new_tokens"] == 64
    assert first["speed"]["dtype"] == "bfloat16"
    assert second["speed"]["weight_bytes"] == first["speed"]["weight_bytes"] > 0


def test_less_calibration_data_than_requested_is_reported(source: Path, tmp_path: Path, call: Call) -> None:
    size = ("--seq-len", 4096, "--num-samples", 64, "--group-size", 32)
    values = last(call("quantize", source / "model", "-o", tmp_path / "out", *size, "--dataset", source / "text.txt"))
    assert "calibration windows of 128 tokens, not 4096: the model's context" in values["notes"]
    assert "31 calibration windows, not 64: all that the text gives" in values["notes"]


@pytest.mark.parametrize("name", [".", "model", "owner/model", "demo", "demo-general", "a/b.gguf"])
def test_default_output_names(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    base = {".": "here", "owner/model": "model", "a/b.gguf": "b"}.get(name, name.replace("demo", DEMO_NAME))
    assert default_output(name, llmq.QuantConfig("rtn")) == Path(f"{base}-rtn-w4g128")


def test_dry_run_writes_nothing(source: Path, tmp_path: Path, call: Call) -> None:
    shown = call("quantize", source / "model", "-o", tmp_path / "out", "--group-size", 32, "--dry-run")
    assert not (tmp_path / "out").exists()
    assert last(shown)["after"] < last(shown)["before"]
    assert "int4 g32" in shown


def test_the_model_generates_its_own_calibration_text(source: Path, tmp_path: Path) -> None:
    arguments = (source / "model", "--dataset", "self", "--num-samples", 4, "--seq-len", 64, "--group-size", 32)
    done = run("quantize", *arguments, "-o", tmp_path / "out")
    lines = done.stderr.splitlines()
    assert lines[0] == "generating 256 calibration tokens with the model; estimating the time"
    assert re.fullmatch(r"generated \d+ of 256 calibration tokens, about \d+ s left", lines[1])
    assert "calibration: 4 windows of 64 tokens of text that the model generated" in done.stdout
    values = last(done)
    assert values["calibration"]["dataset"] == "self"
    assert any("generated its 256 calibration tokens in" in note for note in values["notes"])
    assert run("quantize", *arguments, "-o", tmp_path / "quiet", "--quiet").stderr == ""
    done = run("quantize", *arguments, "-o", tmp_path / "dry", "--dry-run")
    assert "the model writes 256 calibration tokens first" in done.stdout
    assert not (tmp_path / "dry").exists()


BAD = [
    (("quantize", "/nowhere/model"), "no such folder"),
    (("quantize", "MODEL", "--group-size", 48), "group_size must divide"),
    (("quantize", "MODEL", "--bits", 5), "bits"),
    (("quantize", "MODEL", "--ignore", "re:nothing"), "matches no linear"),
    (("quantize", "MODEL", "--group-size", 32, "--seq-len", 128, "--dataset", "SHORT"), "the text has 2 tokens"),
    (("quantize", "MODEL", "--group-size", 32, "--dataset", "/nowhere.txt"), "/nowhere.txt"),
    (
        ("quantize", "MODEL", "--group-size", 32, "--dataset", "BROKEN"),
        "broken.jsonl, line 2: not an object with messages",
    ),
    (("quantize", "BARE", "--group-size", 32, "--dataset", "self"), "dataset self needs the model's tokenizer"),
    (("evaluate", "MODEL", "--dataset", "self"), "choose a text to evaluate on"),
    (("evaluate", "/nowhere/model"), "no such folder"),
    (("generate", "MODEL", "--prompt", " "), "the prompt must not be empty"),
    (("evaluate", "FOREIGN"), "FOREIGN: it has a kv_cache_scheme; load it with transformers"),
    (("generate", "NO_TOKENIZER", "--prompt", "w3"), "has no tokenizer that can be loaded"),
]


@pytest.mark.parametrize(("arguments", "message"), BAD, ids=lambda value: str(value)[:40])
def test_bad_input_is_one_line_and_status_2(  # type: ignore[no-untyped-def]
    source: Path,
    tmp_path: Path,
    arguments,
    message: str,
    capfd: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("llmq.memory.map_large_tensors", lambda: None)  # it would last for the process
    (tmp_path / "short.txt").write_text("w1 w2")
    (tmp_path / "broken.jsonl").write_text('{"messages": [{"role": "user", "content": "w1"}]}\n{"messages": [')
    names = {"MODEL": source / "model", "SHORT": tmp_path / "short.txt", "BROKEN": tmp_path / "broken.jsonl"}
    if "BARE" in arguments:
        names["BARE"] = tmp_path / "bare"
        tiny_model("llama", layers=1).save_pretrained(names["BARE"])
    for name in {"FOREIGN", "NO_TOKENIZER"} & set(map(str, arguments)):
        names[name] = tmp_path / name
        made = llmq.quantize(tiny_model("llama"), names[name], llmq.QuantConfig("rtn", group_size=32))
        assert made.layers
        if name == "FOREIGN":
            config = json.loads((names[name] / "config.json").read_text())
            config["quantization_config"]["kv_cache_scheme"] = {"num_bits": 8}
            (names[name] / "config.json").write_text(json.dumps(config))
    out = ("-o", tmp_path / "out") if arguments[0] == "quantize" else ()
    with pytest.raises(SystemExit) as ended:
        app([*(str(names.get(a, a)) for a in arguments), *map(str, out)])
    assert ended.value.code == 2
    shown = capfd.readouterr().err
    assert message in shown
    if "--bits" not in arguments:  # the parser's own errors are in a box
        assert shown.splitlines()[-1].startswith("error: ")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "script", [("quantize",), ("evaluate",), ("generate", "--prompt", "w3")], ids=lambda each: each[0]
)
def test_a_script_ends_with_one_line_and_status_2(script: tuple[str, ...]) -> None:
    done = run(*script, "/nowhere/model", status=2)
    assert done.stderr.startswith("error: no such folder: /nowhere/model")
    assert done.stderr.count("\n") == 1


def test_a_method_without_data_notes_that_a_calibration_is_not_used(source: Path, tmp_path: Path, call: Call) -> None:
    arguments = ("quantize", source / "model", "--method", "rtn", "--group-size", 32)
    given = last(call(*arguments, "-o", tmp_path / "a", "--dataset", "nowhere.txt"))["notes"]
    none = last(call(*arguments, "-o", tmp_path / "b"))["notes"]
    assert given == [*none, "method rtn uses no calibration data; what was given is not used"]


def test_ctrl_c_removes_the_partial_output(source: Path, tmp_path: Path) -> None:
    arguments = ["--group-size", "32", "--num-samples", "60", "--seq-len", "64", "--dataset", str(source / "text.txt")]
    script = [sys.executable, str(ROOT / "scripts" / "quantize.py"), str(source / "model"), "-o", str(tmp_path / "out")]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    with subprocess.Popen([*script, *arguments], stderr=subprocess.PIPE, text=True, env=environment) as process:
        assert process.stderr is not None
        line = process.stderr.readline()
        while not line.startswith("block"):
            assert line, "the run ended before its first block"
            line = process.stderr.readline()
        process.send_signal(signal.SIGINT)
        rest = process.stderr.read()
    assert process.returncode == 130
    assert rest.splitlines()[-1] == "interrupted; the partial output was removed"
    assert list(tmp_path.iterdir()) == []


def interrupt(*args: object, **kwargs: object) -> None:
    raise KeyboardInterrupt


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("quantize", "m"), "interrupted; the partial output was removed"),
        (("quantize", "m", "--dry-run"), "interrupted"),
        (("evaluate", "m"), "interrupted"),
        (("generate", "m", "--prompt", "w3"), "interrupted"),
    ],
)
def test_ctrl_c_names_the_output_only_if_there_was_one(
    arguments: tuple[str, ...], message: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for verb in ("llmq.api.quantize", "llmq.api.preview", "llmq.evaluation.evaluate", "llmq.evaluation.generate_text"):
        monkeypatch.setattr(verb, interrupt)
    with pytest.raises(SystemExit) as ended:
        app(arguments)
    assert ended.value.code == 130
    assert capsys.readouterr().err == f"{message}\n"


@pytest.mark.parametrize("command", EXAMPLES)
def test_help_ends_with_examples_that_parse(command: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every example of a help text is a command line that the parser accepts."""
    called: list[str] = []
    shown = " ".join(run(command, "--help").stdout.split())
    monkeypatch.setattr("llmq.cli.commands.run_guarded", lambda run, interrupted="": called.append(interrupted))
    for example in EXAMPLES[command]:
        assert example in shown
        app(shlex.split(example)[1:], standalone_mode=False)
    assert len(called) == len(EXAMPLES[command]) > 0


def test_quantize_gives_large_tensors_pages_of_their_own(monkeypatch: pytest.MonkeyPatch) -> None:
    """It lasts for the process, so the command does it, and the library function does not."""
    calls: list[str] = []
    monkeypatch.setattr("llmq.memory.map_large_tensors", lambda: calls.append("map"))
    monkeypatch.setattr("llmq.api.quantize", lambda *args, **kwargs: calls.append("quantize") or interrupt())
    with pytest.raises(SystemExit):
        app(("quantize", "m"))
    assert calls == ["map", "quantize"]


def test_help_answers_at_once() -> None:
    times = []
    for _ in range(3):
        began = time.perf_counter()
        run("quantize", "--help")
        times.append(time.perf_counter() - began)
    assert min(times) < 1.0


def test_equal_notes_of_a_dry_run_are_one_line(source: Path, tmp_path: Path, call: Call) -> None:
    shown = call("quantize", source / "model", "-o", tmp_path / "out", "--group-size", 128, "--dry-run")
    notes = [line for line in shown.splitlines() if line.startswith("note:") and "does not divide" in line]
    assert notes, shown
    assert all(".layers.{0-" in note for note in notes)
    assert len({note.partition(": groups of")[2] for note in notes}) == len(notes)
