"""The folders kernels/ and eval/ work through symlinks, in a clone and in a wheel, and shadow no other package."""

from __future__ import annotations

import importlib.metadata
import shutil
import subprocess
import sys
import venv
from pathlib import Path

import pytest

import llmq
from llmq import api

ROOT = Path(__file__).resolve().parent.parent
FOLDERS = ("kernels", "eval")


def test_kernels_and_eval_are_folders_without_init_behind_symlinks() -> None:
    for name in FOLDERS:
        link = ROOT / "llmq" / name
        assert link.is_symlink()
        assert link.readlink() == Path("..") / name
        assert not (ROOT / name / "__init__.py").exists()


def test_transformers_is_importable_from_the_root_of_the_clone() -> None:
    """A regular package `kernels` there would shadow the one that transformers imports."""
    code = "import sys; sys.path.insert(0, ''); from transformers import LlamaForCausalLM; import llmq.kernels.registry"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_a_clone_that_is_not_installed_knows_its_version(monkeypatch: pytest.MonkeyPatch) -> None:
    """Scripts may run from such a clone; llmq then has no package metadata."""
    original = importlib.metadata.version

    def version(name: str) -> str:
        if name == "llmq":
            raise importlib.metadata.PackageNotFoundError(name)
        return original(name)

    monkeypatch.setattr(importlib.metadata, "version", version)
    monkeypatch.setattr(api, "version", version)
    assert api._versions()["llmq"] == llmq.__version__


@pytest.mark.slow
def test_a_wheel_carries_everything(tmp_path: Path) -> None:
    """The wheel is built from a copy without git, installed in a fresh environment and used from another folder."""
    kept_out = shutil.ignore_patterns(".*", "build", "*.egg-info", "demo-out", "tests")
    shutil.copytree(ROOT, tmp_path / "copy", symlinks=True, ignore=kept_out)
    build = [sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", "-w", str(tmp_path), str(tmp_path / "copy")]
    subprocess.run(build, check=True, capture_output=True, text=True)
    (wheel,) = tmp_path.glob("llmq-*.whl")
    home = tmp_path / "env"
    venv.create(home, with_pip=True)
    python = home / "bin" / "python"
    subprocess.run([python, "-m", "pip", "install", "-q", "--no-deps", "--no-index", wheel], check=True)
    outside = [path for path in sys.path if path.endswith("site-packages")]
    code = (
        f"import sys; sys.path += {outside!r}\n"
        "import llmq, llmq.kernels.registry, llmq.eval.corpus, llmq.cli.commands, pathlib\n"
        f"assert pathlib.Path(llmq.kernels.registry.__file__).is_relative_to({str(home)!r})\n"
        "assert pathlib.Path(llmq.__file__).with_name('py.typed').exists()\n"
    )
    done = subprocess.run([python, "-c", code], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    done = subprocess.run(
        [home / "bin" / "llmq", "--help"], capture_output=True, text=True, env={"PYTHONPATH": outside[0]}
    )
    assert "quantize" in done.stdout, done.stderr
