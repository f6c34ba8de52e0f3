"""What adapter layers train, compute and merge to, for each variant."""

import pytest
import torch
import torch.nn.functional as F

from litlora.lora.config import LoRAConfig
from litlora.lora.layer import LoRALinear, add_lora, lora_layers, lora_parameters
from litlora.models.checkpoint import Checkpoint
from litlora.nn.linear import Joint, Linear
from litlora.nn.nf4 import NF4Linear, Quantization, dequantized

CPU = torch.device("cpu")
NF4 = Quantization("bnb.nf4", torch.float32)
BASES = ["dense", "nf4"]


def base_layer(kind: str, out: int = 48) -> Linear | NF4Linear:
    """Return a frozen layer with a bias, which random checkpoints of most families lack."""
    dense = Linear(64, out).requires_grad_(False)
    return dense if kind == "dense" else NF4Linear(dense.weight, NF4, dense.bias)


def trained(base: Linear | NF4Linear) -> LoRALinear:
    """Return an adapter layer whose parameters are random, as if trained."""
    layer = LoRALinear(base, rank=4, scaling=1.5, dropout=0.0)
    for parameter in layer.adapter_parameters().values():
        torch.nn.init.normal_(parameter, mean=0.3, std=0.1)
    return layer


def merged(layer: LoRALinear) -> torch.Tensor:
    weight = layer.weight if isinstance(layer.weight, torch.Tensor) else layer.weight.to_dense()
    return layer.variant.merge(weight, layer.adapter_parameters(), layer.scaling)


@pytest.mark.parametrize("kind", BASES)
def test_adapter_layer_computes_the_merged_weight_and_the_bias(kind):
    torch.manual_seed(0)
    layer, x = trained(base_layer(kind)), torch.randn(7, 64)
    for grad in (True, False):
        with torch.set_grad_enabled(grad):
            torch.testing.assert_close(layer(x), F.linear(x, merged(layer), layer.bias), atol=1e-4, rtol=1e-5)


@torch.no_grad()
def test_joint_product_retains_weight_and_bias_of_adapter_layers():
    torch.manual_seed(0)
    layers, x = [trained(base_layer("dense")), base_layer("dense", 16)], torch.randn(1, 64)
    expected = [layer(x) for layer in layers]
    torch.testing.assert_close(Joint(*layers)(x), expected, atol=1e-5, rtol=1e-5)


def test_bias_of_an_adapter_layer_is_frozen():
    layer = trained(base_layer("dense"))
    layer(torch.randn(3, 64)).sum().backward()
    assert layer.bias.grad is None
    assert {name for name, p in layer.named_parameters() if p.grad is not None} == set(layer.adapter_parameters())


def test_trained_parameters_are_those_of_the_layers_not_those_named_alike(tiny):
    model = Checkpoint.open(tiny).load(torch.float32, CPU)
    model.model.lora_A = torch.nn.Linear(2, 2)  # named like an adapter's, but of no adapter layer
    add_lora(model, LoRAConfig(4, 8, 0.0, ("q_proj",)))
    expected = [f"{name}.lora_{m}.weight" for name in lora_layers(model) for m in "AB"]
    assert list(lora_parameters(model)) == expected
    assert list(lora_layers(model)) == [f"model.layers.{n}.self_attn.q_proj" for n in range(2)]


def test_merge_of_an_nf4_weight_is_that_of_its_dequantized_numbers():
    torch.manual_seed(0)
    base = base_layer("dense")
    layer = trained(NF4Linear(base.weight, NF4))
    expected = layer.variant.merge(dequantized(base.weight, NF4), layer.adapter_parameters(), layer.scaling)
    assert torch.equal(merged(layer), expected)
