"""Weights in the types of GGUF files, against the gguf package's own numpy functions."""

import gguf
import numpy as np
import pytest
import torch

from litlora.nn import gguf_weight
from litlora.nn.gguf_types import BLOCK_TYPES, BlockType
from litlora.nn.gguf_weight import DEQUANTIZERS, PLAIN, GGUFWeight, kept_values
from litlora.nn.linear import frozen_linear
from litlora.nn.quantization import QuantizedLinear
from litlora.nn.whole_linear import whole_linear

TYPES = {kind.name: kind for kind in BLOCK_TYPES.values()}
HALVES = {"Q4_1": 2, "Q5_1": 2, "Q4_K": 2, "Q5_K": 2}  # scale and minimum; others have a scale


def random_bytes(kind: BlockType, rows: int, blocks: int) -> np.ndarray:
    """Return rows of random blocks whose float16 are finite."""
    random = np.random.default_rng(0)
    content = random.integers(0, 256, (rows, blocks, kind.nbytes), dtype=np.uint8)
    count = HALVES.get(kind.name, 1)
    scales = random.normal(size=(rows, blocks, count)).astype(np.float16).view(np.uint8)
    start = kind.nbytes - 2 if kind.name == "Q6_K" else 0
    content[:, :, start : start + 2 * count] = scales
    return content.reshape(rows, -1)


def plain_bytes(kind: BlockType) -> np.ndarray:
    values = torch.randn(5, 7, generator=torch.Generator().manual_seed(0)).to(PLAIN[kind.name])
    return values.view(torch.uint8).numpy()


def test_types_have_the_sizes_of_the_format():
    for number, kind in BLOCK_TYPES.items():
        own = gguf.GGMLQuantizationType(number)
        assert (own.name, *gguf.GGML_QUANT_SIZES[own]) == (kind.name, kind.values, kind.nbytes)
    assert {*DEQUANTIZERS, *PLAIN} == set(TYPES)


@pytest.mark.parametrize("name", TYPES)
def test_values_are_those_of_the_gguf_package(name):
    kind = TYPES[name]
    content = plain_bytes(kind) if name in PLAIN else random_bytes(kind, 7, 3)
    expected = gguf.quants.dequantize(content, gguf.GGMLQuantizationType[name])
    weight = GGUFWeight(torch.from_numpy(content), kind, torch.float32)
    assert weight.shape == expected.shape
    assert weight.nbytes == content.nbytes
    assert np.array_equal(weight.to_dense().numpy(), expected)
    assert np.array_equal(weight.rows(slice(2, 5)).numpy(), expected[2:5])
    rounded = GGUFWeight(torch.from_numpy(content), kind, torch.bfloat16).to_dense()
    assert torch.equal(rounded, torch.from_numpy(expected).bfloat16())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_product_and_gradient_are_those_of_the_dense_weight(dtype):
    kind = TYPES["Q4_0"]
    weight = GGUFWeight(torch.from_numpy(random_bytes(kind, 96, 2)), kind, dtype)
    layer = QuantizedLinear(weight, torch.randn(96))
    x = torch.randn(5, 64, dtype=dtype, requires_grad=True)
    out = layer(x)
    out.square().sum().backward()
    dense, other = weight.to_dense().float(), x.detach().float().requires_grad_()
    expected = other @ dense.T + layer.bias.float()
    expected.square().sum().backward()
    tolerance = {"rtol": 1e-4, "atol": 1e-4} if dtype is torch.float32 else {"rtol": 2**-5, "atol": 1.0}
    torch.testing.assert_close(out.float(), expected, **tolerance)
    scale = other.grad.abs().max()
    torch.testing.assert_close(x.grad.float() / scale, other.grad / scale, rtol=2**-5, atol=0.02)


def test_one_row_and_whole_products_agree():
    """A GPU dequantizes the whole weight, which is the same network."""
    kind = TYPES["Q8_0"]
    weight = GGUFWeight(torch.from_numpy(random_bytes(kind, 40, 2)), kind, torch.float32)
    x = torch.randn(3, 64, requires_grad=True)
    whole = whole_linear(x, weight, None)
    torch.testing.assert_close(whole, frozen_linear(x, weight), rtol=1e-5, atol=1e-4)
    whole.sum().backward()
    torch.testing.assert_close(x.grad, weight.to_dense().sum(0).expand(3, -1))


def test_casting_a_model_leaves_the_weight_as_it_is():
    kind = TYPES["Q4_0"]
    layer = QuantizedLinear(GGUFWeight(torch.from_numpy(random_bytes(kind, 4, 2)), kind, torch.float32))
    before = layer.weight.to_dense()
    assert torch.equal(layer.to(torch.bfloat16).weight.to_dense(), before)


def test_kept_values_give_the_same_product_without_dequantizing(monkeypatch):
    kind, x = TYPES["Q4_1"], torch.randn(1, 64, dtype=torch.bfloat16)
    layer = QuantizedLinear(GGUFWeight(torch.from_numpy(random_bytes(kind, 700, 2)), kind, torch.bfloat16))
    expected = layer(x)
    with kept_values(layer, room=700 * 64 * 2):
        monkeypatch.setattr(gguf_weight, "dequantize", None)
        assert torch.equal(layer(x), expected)
        monkeypatch.undo()
    with kept_values(layer, room=700 * 64 * 2 - 1):
        monkeypatch.setattr(gguf_weight, "dequantize", lambda packed, kind, out: out.zero_())
        assert not layer(x).any()
    assert not layer(x).any()
