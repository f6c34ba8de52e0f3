import os
import subprocess
import sys
from pathlib import Path

import bitsandbytes
import pytest
import torch
import torch.nn.functional as F
from helpers.families import WHOLE_BLOCKS, Family
from helpers.reference import in_4_bits
from peft import PeftModel
from transformers import LlamaConfig

from litlora.cpu import matmul
from litlora.errors import LitLoraError
from litlora.lora.checkpoint import read_quantization, write_adapter
from litlora.lora.config import TARGET_MODULES, LoRAConfig
from litlora.lora.layer import add_lora, count, lora_parameters
from litlora.models.checkpoint import Checkpoint, block_linears
from litlora.models.transformer import GPT, evaluating
from litlora.nn.linear import frozen_linear
from litlora.nn.loss import supervised_loss
from litlora.nn.nf4 import NAMES, NF4Weight, Quantization, import_bitsandbytes

CPU = torch.device("cpu")
TOKENS = torch.arange(3, 43)
# Rounding errors are random: the ratio of two of them varies by 12 % from one row to the next, and by 3 % over 20.
ROWS = torch.randint(3, 43, (20, 40), generator=torch.Generator().manual_seed(0))
PRECISIONS = [torch.float32, torch.bfloat16]


@pytest.fixture(scope="module")
def base(make_checkpoint) -> Path:
    return make_checkpoint(WHOLE_BLOCKS, dtype=torch.bfloat16)


@pytest.fixture(params=NAMES)
def quantization(request) -> Quantization:
    return Quantization(request.param, torch.float32)


def adapted(base: Path, quantization: Quantization, switches: tuple[str, ...], device: torch.device = CPU) -> GPT:
    """Return the quantized model with an adapter whose B is zero."""
    model = Checkpoint.open(base).load(quantization.dtype, device, quantization)
    add_lora(model, lora_config(switches))
    return model


def lora_config(switches: tuple[str, ...]) -> LoRAConfig:
    return LoRAConfig(4, 6, 0.0, tuple(module for switch in switches for module in TARGET_MODULES[switch]))


def write_trained(folder: Path, model: GPT, switches: tuple[str, ...], base: Path) -> None:
    """Write the adapter of a model, with a B that is not zero any more."""
    torch.manual_seed(2)
    for name, parameter in lora_parameters(model).items():
        if ".lora_B." in name:
            torch.nn.init.normal_(parameter, std=0.1)
    write_adapter(folder, model, lora_config(switches), base, Checkpoint.open(base).fingerprint(), "alpaca")


def logits(model: GPT, rows: torch.Tensor = TOKENS[None]) -> torch.Tensor:
    return model.lm_head(model(rows.flatten().to(model.lm_head.weight.device), [rows.shape[1]] * len(rows)))


def levels_times_scales(weight: NF4Weight, scales: torch.Tensor) -> torch.Tensor:
    """Return a weight by its definition."""
    levels = bitsandbytes.functional.get_4bit_type("nf4", device=weight.device)
    nibbles = torch.stack([weight.packed >> 4, weight.packed & 15], dim=-1).flatten()
    values = levels[nibbles.int()] * scales.repeat_interleave(64)[: len(nibbles)]
    return values.view(weight.shape).to(weight.quantization.dtype)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("dtype", PRECISIONS, ids=str)
@pytest.mark.parametrize("whole_blocks", [True, False])
def test_levels_and_scales_equal_transformers(name, dtype, whole_blocks, base, tiny, device):
    quantization = Quantization(name, dtype)
    checkpoint = base if whole_blocks else tiny
    ours = Checkpoint.open(checkpoint).load(dtype, device, quantization)
    theirs = {
        name: module.weight
        for name, module in in_4_bits(checkpoint, quantization, device).named_modules()
        if isinstance(module, bitsandbytes.nn.Linear4bit)
    }
    assert list(theirs) == block_linears(GPT(ours.config))
    for name, expected in theirs.items():
        weight, state = ours.get_submodule(name).weight, expected.quant_state
        assert torch.equal(weight.packed, expected.data.flatten())
        scales = state.absmax
        if quantization.double:
            assert torch.equal(weight.scales, state.absmax)
            scales = bitsandbytes.functional.dequantize_blockwise(state.absmax, state.state2) + state.offset
        assert torch.equal(weight.to_dense(), levels_times_scales(weight, scales))
        if whole_blocks:
            assert torch.equal(weight.to_dense(), bitsandbytes.functional.dequantize_4bit(expected.data, state))


def test_only_the_blocks_are_quantized(base, quantization):
    plain, model = (
        Checkpoint.open(base).load(torch.float32, CPU),
        Checkpoint.open(base).load(torch.float32, CPU, quantization),
    )
    dense = {name for name, parameter in model.named_parameters() if parameter.dtype is torch.float32}
    assert dense == {n for n, _ in plain.named_parameters() if not n.endswith("_proj.weight")}
    counts = [count(m.requires_grad_(False), trainable=False) for m in (plain, model)]
    assert counts[0] == counts[1]


@pytest.mark.parametrize(("name", "share"), [("bnb.nf4", 0.30), ("bnb.nf4-dq", 0.27)])
def test_size_is_little_more_than_a_quarter_of_bfloat16(name, share):
    weight = torch.randn(256, 1024)
    stored = NF4Weight(weight, Quantization(name, torch.bfloat16))
    assert sum(t.nbytes for t in stored.state_dict().values()) <= share * weight.bfloat16().nbytes


def test_rows_that_start_with_a_block(quantization):
    weight = NF4Weight(torch.randn(48, 40), quantization)
    assert torch.equal(
        torch.cat([weight.rows(slice(*bounds)) for bounds in ((0, 8), (8, 40), (40, 48))]), weight.to_dense()
    )


def test_sliced_product_equals_the_dense_one(quantization, monkeypatch):
    monkeypatch.setattr(matmul, "STORED_SLICE_ROWS", 64)
    monkeypatch.setattr(matmul, "STORED_SLICE_VALUES", 1)
    torch.manual_seed(0)
    weight, x = NF4Weight(torch.randn(200, 48), quantization), torch.randn(7, 48, requires_grad=True)
    out = frozen_linear(x, weight)
    out.square().sum().backward()
    exact = x.detach().double().requires_grad_()
    F.linear(exact, weight.to_dense().double()).square().sum().backward()
    torch.testing.assert_close(out.double(), F.linear(exact, weight.to_dense().double()), atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(x.grad.double(), exact.grad, atol=1e-4, rtol=1e-5)


LOADING = """
import re, sys
from pathlib import Path
import torch
from litlora.models.checkpoint import Checkpoint
from litlora.nn.nf4 import Quantization
from litlora.nn.nf4 import import_bitsandbytes

def memory(name):
    return 1024 * int(re.search(name + r":\\s+(\\d+)", Path("/proc/self/status").read_text())[1])

import_bitsandbytes("the test")
quantization = Quantization("bnb.nf4", torch.bfloat16)
Checkpoint.open(Path(sys.argv[1])).load(torch.bfloat16, torch.device("cpu"), quantization)  # whatever is needed once
Path("/proc/self/clear_refs").write_text("5")  # reset the peak
before = memory("VmRSS")
model = Checkpoint.open(Path(sys.argv[2])).load(torch.bfloat16, torch.device("cpu"), quantization)
print(memory("VmHWM") - before, sum(t.nbytes for t in model.state_dict().values()))
"""


@pytest.mark.skipif(sys.platform != "linux", reason="the peak is read from /proc")
def test_peak_memory_of_loading(base, make_checkpoint):
    sizes = {"hidden_size": 768, "intermediate_size": 4096, "num_hidden_layers": 6}
    large = make_checkpoint(Family("large", LlamaConfig, sizes), dtype=torch.bfloat16)
    done = subprocess.run([sys.executable, "-c", LOADING, base, large], capture_output=True, text=True)
    grown, model = map(int, done.stdout.split())
    bound = model + 2 * 768 * 4096 * 2 + 32e6  # of the allocators
    assert model < grown < bound < 0.7 * (large / "model.safetensors").stat().st_size


def test_casting_the_model_leaves_the_scales_unchanged(tiny, quantization):
    model = Checkpoint.open(tiny).load(torch.float32, CPU, quantization)
    weight = model.model.layers[0].self_attn.q_proj.weight
    before = weight.to_dense()
    model.to(torch.bfloat16).to(torch.float32)
    assert torch.equal(weight.to_dense(), before)


def test_logits_equal_transformers_with_bitsandbytes(base, pico, quantization, device):
    rounded = Quantization(quantization.name, torch.bfloat16)
    for checkpoint in (base, pico):
        with torch.no_grad():
            theirs, roughly = (
                in_4_bits(checkpoint, q, device)(ROWS.to(device)).logits.flatten(0, 1) for q in (quantization, rounded)
            )
            ours, ours_roughly = (
                logits(Checkpoint.open(checkpoint).load(q.dtype, device, q), ROWS) for q in (quantization, rounded)
            )
            plain = logits(Checkpoint.open(checkpoint).load(torch.float32, device), ROWS)
        torch.testing.assert_close(ours, theirs, atol=1e-4, rtol=0)
        assert (plain - theirs).abs().max() > 0.1
        assert (ours_roughly - theirs).norm() < 1.1 * (roughly - theirs).norm()  # of which all is rounding


@pytest.mark.parametrize("dtype", PRECISIONS, ids=str)
def test_trained_and_deployed_logits_are_bit_identical(base, tiny, quantization, dtype, device):
    quantization = Quantization(quantization.name, dtype)
    for checkpoint in (base, tiny):
        model = adapted(checkpoint, quantization, tuple(TARGET_MODULES), device)
        trained = logits(model.train())
        with torch.no_grad(), evaluating(model):
            deployed = logits(model)
            bare = logits(Checkpoint.open(checkpoint).load(dtype, device, quantization).requires_grad_(False))
        assert trained.requires_grad
        assert torch.equal(trained, deployed)
        assert torch.equal(deployed, bare)


@pytest.mark.parametrize("switches", [*((switch,) for switch in TARGET_MODULES), tuple(TARGET_MODULES)], ids="+".join)
@pytest.mark.filterwarnings("ignore:Setting `save_embedding_layers`")
def test_logits_and_gradients_equal_peft(base, switches, quantization, tmp_path, device):
    model, tokens = adapted(base, quantization, switches, device), TOKENS.to(device)
    write_trained(tmp_path, model, switches, base)
    theirs = PeftModel.from_pretrained(in_4_bits(base, quantization, device), tmp_path, is_trainable=True)
    expected = theirs(tokens[None]).logits[0]
    torch.testing.assert_close(logits(model), expected, atol=1e-4, rtol=0)

    labels = tokens.roll(-1)
    supervised_loss(model(tokens, [len(tokens)]), model.lm_head, labels).backward()
    F.cross_entropy(expected, labels, reduction="sum").backward()
    gradients = {n.replace(".default", ""): p.grad for n, p in theirs.named_parameters() if p.requires_grad}
    ours = {f"base_model.model.{name}": p.grad for name, p in lora_parameters(model).items()}
    assert gradients.keys() == ours.keys()
    for name, gradient in gradients.items():
        torch.testing.assert_close(ours[name], gradient, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("dtype", PRECISIONS, ids=str)
def test_adapter_records_the_quantization_of_its_base(base, quantization, dtype, tmp_path):
    quantization = Quantization(quantization.name, dtype)
    write_trained(tmp_path, adapted(base, quantization, ("query",)), ("query",), base)
    assert read_quantization(tmp_path) == quantization


def test_missing_bitsandbytes_names_the_flag(monkeypatch):
    import_bitsandbytes.cache_clear()
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    with pytest.raises(LitLoraError, match=r"^--quantize bnb.nf4 needs bitsandbytes, which cannot be imported .*pip"):
        import_bitsandbytes("--quantize bnb.nf4")


def test_bitsandbytes_imports_no_code_from_the_hub(tmp_path):
    (tmp_path / "kernels.py").write_text("print('imported')\nget_kernel = print\n")
    code = "from litlora.nn.nf4 import import_bitsandbytes as get; get('the test'); import kernels"
    done = subprocess.run(
        [sys.executable, "-c", code], env=os.environ | {"PYTHONPATH": str(tmp_path)}, capture_output=True, text=True
    )
    assert (done.stdout, done.stderr) == ("imported\n", "")  # once, by the program itself


def test_old_bitsandbytes_names_the_version(monkeypatch):
    import_bitsandbytes.cache_clear()
    monkeypatch.setattr(bitsandbytes, "__version__", "0.9.1")
    with pytest.raises(LitLoraError, match=r"needs bitsandbytes 0\.49 or newer, not 0\.9\.1; get it with: pip install"):
        import_bitsandbytes("--optimizer AdamW8bit")


@pytest.mark.gpu
@pytest.mark.parametrize("name", NAMES)
def test_one_row_on_cuda(name):
    weight = NF4Weight(torch.randn(128, 256, device="cuda"), Quantization(name, torch.bfloat16))
    x = torch.randn(1, 256, dtype=torch.bfloat16, device="cuda")
    with torch.no_grad():
        torch.testing.assert_close(frozen_linear(x, weight), x @ weight.to_dense().T, atol=0.5, rtol=2**-6)
