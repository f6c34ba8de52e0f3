"""Families whose checkpoints fuse or rename layers, by an entry that exists in these tests alone."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from litlora.__main__ import main
from litlora.errors import LitLoraError
from litlora.lora.checkpoint import write_adapter
from litlora.lora.config import LoRAConfig
from litlora.lora.layer import add_lora, lora_parameters
from litlora.models.checkpoint import Checkpoint
from litlora.models.families import FAMILIES, Fused
from litlora.models.weights import Weights
from litlora.nn.nf4 import Quantization

CPU = torch.device("cpu")
# As Phi-3 fuses its projections; one layer has another name.
GROUPS = (
    Fused("self_attn.qkv_proj", ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")),
    Fused("mlp.gate_up_proj", ("mlp.gate_proj", "mlp.up_proj")),
    Fused("attention.dense", ("self_attn.o_proj",)),
)


@pytest.fixture(autouse=True)
def fused_family(monkeypatch) -> None:
    monkeypatch.setitem(FAMILIES, "fused", replace(FAMILIES["llama"], fused=GROUPS))


@pytest.fixture(params=["llama-gqa", "llama-biases"])
def plain(request, checkpoints) -> Path:
    return checkpoints(request.param)


@pytest.fixture
def fused(plain, tmp_path) -> Path:
    """Return the same checkpoint as the fused family stores it."""
    folder = Path(shutil.copytree(plain, tmp_path / "fused"))
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"model_type": "fused"}))
    save_file(fuse(load_file(folder / "model.safetensors")), folder / "model.safetensors")
    return folder


def fuse(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    for layer in range(2):
        for group in GROUPS:
            for kind in ("weight", "bias"):
                names = [f"model.layers.{layer}.{name}.{kind}" for name in group.layers]
                if names[0] in tensors:
                    tensors[f"model.layers.{layer}.{group.name}.{kind}"] = torch.cat([tensors.pop(n) for n in names])
    return tensors


@pytest.mark.parametrize("quantization", [None, Quantization("bnb.nf4", torch.float32)], ids=["dense", "nf4"])
def test_fused_tensors_are_split_on_load(plain, fused, quantization):
    actual = Checkpoint.open(fused).load(torch.float32, CPU, quantization).state_dict()
    expected = Checkpoint.open(plain).load(torch.float32, CPU, quantization).state_dict()
    assert actual.keys() == expected.keys()
    for name, tensor in expected.items():
        assert torch.equal(actual[name], tensor), name


def test_tensor_of_a_fused_checkpoint_is_read_by_the_models_name(plain, fused):
    name = "model.layers.1.self_attn.v_proj.weight"
    assert torch.equal(Checkpoint.open(fused).tensor(name), Weights(plain)[name])


def make_adapter(folder: Path, base: Path) -> Path:
    """Write an adapter of every layer, whose file does not record its base."""
    config = LoRAConfig(4, 8, 0.0, r"model\.layers\..*")
    model = Checkpoint.open(base).load(torch.float32, CPU)
    add_lora(model, config)
    for parameter in lora_parameters(model).values():
        torch.nn.init.normal_(parameter, std=0.1)
    folder.mkdir()
    write_adapter(folder, model, config, base, "", "alpaca")
    save_file(load_file(folder / "adapter_model.safetensors"), folder / "adapter_model.safetensors")
    return folder


def test_merge_writes_fused_tensors(plain, fused, tmp_path):
    folder = make_adapter(tmp_path / "adapter", plain)
    merge = ["merge_lora", "--checkpoint_dir", str(folder), "--base_dir"]
    assert main([*merge, str(plain), "--out_dir", str(tmp_path / "plain merged")]) == 0
    assert main([*merge, str(fused), "--out_dir", str(tmp_path / "fused merged")]) == 0
    actual = load_file(tmp_path / "fused merged/model.safetensors")
    expected = fuse(load_file(tmp_path / "plain merged/model.safetensors"))
    assert actual.keys() == expected.keys()
    for name, tensor in expected.items():
        assert torch.equal(actual[name], tensor), name
    name = "model.layers.0.self_attn.qkv_proj.weight"
    assert not torch.equal(actual[name], Weights(fused)[name])


def test_fused_tensor_of_another_size_is_refused(fused):
    tensors = load_file(fused / "model.safetensors")
    name = "model.layers.0.mlp.gate_up_proj.weight"
    save_file(tensors | {name: tensors[name][1:].clone()}, fused / "model.safetensors")
    with pytest.raises(LitLoraError) as refused:
        Checkpoint.open(fused)
    fault = f"{name} has the shape (95, 32), but config.json implies (96, 32)"
    assert str(refused.value) == f"{fused}: {fault}; use config.json and weights of the same model"
