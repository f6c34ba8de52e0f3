import pytest
import torch
import torch.nn.functional as F
from torch import nn

from litlora.cpu import matmul, onednn, weight_layouts
from litlora.cpu.matmul import SLAB, _SlabLinear, frozen_linear
from litlora.cpu.weight_layouts import HalfWeight, narrowed, packed
from litlora.lora.layer import LoRALinear
from litlora.nn.linear import Joint, Linear


def problem(dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    torch.manual_seed(0)
    x = torch.randn(40, 64).bfloat16().to(dtype).requires_grad_()
    return x, torch.randn(48, 64).bfloat16().to(dtype), torch.randn(40, 48).bfloat16().to(dtype)


def outcome(product, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    x, weight, gradient = problem(dtype)
    y = product(x, weight)
    y.backward(gradient)
    return y.detach(), x.grad


@pytest.mark.parametrize("slab", [SLAB, 20])
def test_a_bfloat16_product_in_float32_is_the_exact_one_rounded_once(slab, monkeypatch):
    monkeypatch.setattr(onednn, "HAS_BFLOAT16_PRODUCTS", False)  # or float32 is not asked for
    monkeypatch.setattr(matmul, "SLAB", slab)  # a weight of 48 rows is one slab, or two and a part
    found = outcome(_SlabLinear.apply, torch.bfloat16)
    exact = outcome(F.linear, torch.float64)
    for ours, reference in zip(found, exact, strict=True):
        assert ours.dtype is torch.bfloat16
        torch.testing.assert_close(ours.double(), reference, atol=1e-5, rtol=2**-8)


def test_a_gradient_in_many_slabs_is_as_exact_as_in_one_where_a_cpu_multiplies_bfloat16(monkeypatch):
    monkeypatch.setattr(onednn, "HAS_BFLOAT16_PRODUCTS", True)
    _, exact = outcome(F.linear, torch.float64)
    deviations = []
    for slab in (SLAB, 2):
        monkeypatch.setattr(matmul, "SLAB", slab)
        _, found = outcome(_SlabLinear.apply, torch.bfloat16)
        deviations.append((found.double() - exact).norm())
    assert deviations[1] < 1.5 * deviations[0]


def test_the_product_is_the_same_by_every_way():
    ways = (F.linear, frozen_linear, _SlabLinear.apply)
    first, *others = (outcome(way, torch.bfloat16) for way in ways)
    for other in others:
        for a, b in zip(first, other, strict=True):
            torch.testing.assert_close(a, b, atol=1e-2, rtol=2**-7)


@pytest.mark.parametrize("part", [48, 20])
def test_a_product_of_many_outputs_is_the_same_in_parts(part, monkeypatch):
    monkeypatch.setattr(matmul, "LONG", 48)
    monkeypatch.setattr(matmul, "PART", part)
    for ours, exact in zip(outcome(frozen_linear, torch.float32), outcome(F.linear, torch.float64), strict=True):
        torch.testing.assert_close(ours.double(), exact, atol=1e-5, rtol=1e-5)


@torch.autocast("cpu", torch.bfloat16)
def test_a_product_of_many_outputs_is_torch_s_own_in_mixed_precision(monkeypatch):
    monkeypatch.setattr(matmul, "LONG", 48)
    x, weight, _ = problem(torch.float32)
    y, reference = frozen_linear(x, weight), F.linear(x, weight)
    assert y.dtype is torch.bfloat16
    assert torch.equal(y, reference)


def test_a_weight_that_trains_gets_its_gradient():
    layer = Linear(8, 3, bias=False, dtype=torch.bfloat16)
    layer(torch.randn(5, 8, dtype=torch.bfloat16)).sum().backward()
    assert layer.weight.grad is not None
    frozen = nn.Linear(8, 3, bias=False).requires_grad_(False)
    assert not frozen_linear(torch.randn(5, 8), frozen.weight).requires_grad


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("out_features", [1024, 333], ids=["shared by threads", "not to be shared"])
def test_one_row_is_multiplied_as_exactly_as_many(dtype, out_features):
    torch.manual_seed(0)
    weight, x = torch.randn(out_features, 600).to(dtype), torch.randn(1, 600).to(dtype)
    exact = F.linear(x.double(), weight.double())
    torch.testing.assert_close(
        frozen_linear(x, weight).double(), exact, atol=1e-4, rtol=1e-5 if dtype is torch.float32 else 2**-8
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("rows", [1, 2, 40])
@pytest.mark.parametrize("out_features", [96, 331, 333], ids=["one stripe", "a prime number", "three stripes"])
def test_a_packed_weight_multiplies_as_exactly_as_it_did(dtype, rows, out_features):
    torch.manual_seed(0)
    weight, x = torch.randn(out_features, 600).to(dtype), torch.randn(rows, 600).to(dtype)
    found, exact = frozen_linear(x, packed(weight).contiguous()), F.linear(x.double(), weight.double())
    assert found.dtype is dtype
    torch.testing.assert_close(found.double(), exact, atol=1e-4, rtol=1e-5 if dtype is torch.float32 else 2**-8)


def test_a_weight_is_packed_where_a_cpu_can_multiply_it(monkeypatch):
    weight = torch.randn(384, 64)
    monkeypatch.setattr(weight_layouts, "HAS_FBGEMM", True)
    monkeypatch.setattr(onednn, "HAS_BFLOAT16_PRODUCTS", False)
    assert packed(weight).shape == (4, 64, 96)
    assert packed(weight[:331]).shape == (331, 64)  # there are no stripes of a prime number
    assert packed(weight.bfloat16()).shape == weight.shape
    monkeypatch.setattr(onednn, "HAS_BFLOAT16_PRODUCTS", True)
    assert packed(weight.bfloat16()).shape == (2, 64, 192)
    monkeypatch.setattr(weight_layouts, "HAS_FBGEMM", False)
    assert packed(weight) is weight


def test_a_weight_is_narrowed_where_no_number_of_it_is_rounded(device):
    weight = torch.randn(64, 32).bfloat16().float().to(device)
    narrow = narrowed(weight)
    assert narrow.dtype is (torch.bfloat16 if device.type == "cpu" else torch.float32)
    assert torch.equal(narrow.float(), weight)
    weight[5, 7] += 2**-12 * weight[5, 7].abs()
    assert narrowed(weight) is weight


@pytest.mark.parametrize("rows", [1, 2, 40])
@pytest.mark.parametrize("form", [narrowed, packed])
@pytest.mark.parametrize("parts", [1, 4])
def test_a_weight_in_half_the_bytes_multiplies_in_float32(monkeypatch, form, rows, parts):
    torch.manual_seed(0)
    monkeypatch.setattr(weight_layouts, "PACKED", 333 // parts + 1)
    weight, x = torch.randn(333, 600).bfloat16().float(), torch.randn(rows, 600)
    found, exact = frozen_linear(x, form(weight)), F.linear(x.double(), weight.double())
    assert found.dtype is torch.float32
    torch.testing.assert_close(found.double(), exact, atol=1e-4, rtol=1e-5)


@pytest.mark.skipif(not weight_layouts.HAS_FBGEMM, reason="torch has no FBGEMM here")
@pytest.mark.parametrize("exponent", [-20, 0, 17])
def test_float16_holds_32_powers_of_two_below_the_largest_number(exponent):
    most, least = 255 / 128 * 2.0**exponent, 255 / 128 * 2.0 ** (exponent - 32)
    weight = torch.tensor([[most, -least], [0.0, least]])
    assert torch.equal(HalfWeight.holding(weight).product(torch.eye(2)), weight.t())
    assert HalfWeight.holding(torch.tensor([[most, least / 2]])) is None


@pytest.mark.parametrize("largest", [float("nan"), float("inf"), 0.0, 2.0**-140])
def test_float16_holds_no_weight_that_nothing_brings_up_to_its_numbers(largest):
    assert HalfWeight.holding(torch.tensor([[0.0, largest]])) is None


@torch.no_grad()
def test_a_joint_product_is_that_of_each_layer_with_its_own_branch():
    torch.manual_seed(0)
    layers = [Linear(16, out, bias=False) for out in (12, 4, 4)]
    layers[0], layers[2] = (LoRALinear(layer, rank=2, scaling=3.0, dropout=0.5) for layer in (layers[0], layers[2]))
    for layer in (layers[0], layers[2]):
        nn.init.normal_(layer.lora_B.weight)
    x = torch.randn(5, 16)
    expected = [layer.eval()(x) for layer in layers]
    joint = Joint(*layers)
    assert joint.weight.shape == (20, 16)
    assert all(layer.weight is None for layer in layers)  # or every weight would be there twice
    for found, reference in zip(joint(x), expected, strict=True):
        torch.testing.assert_close(found, reference)
