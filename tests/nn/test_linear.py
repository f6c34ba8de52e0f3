import bitsandbytes
import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.overrides import TorchFunctionMode

from litlora.cpu import matmul, onednn, weight_layouts
from litlora.cpu.matmul import SLICE_ROWS, sliced_linear
from litlora.cpu.weight_layouts import HalfWeight, StripedWeight, in_bfloat16, repacked
from litlora.generation.compile import OPTIONS
from litlora.lora.layer import LoRALinear
from litlora.nn.backend import CUDA
from litlora.nn.linear import Joint, Linear, frozen_linear
from litlora.nn.nf4 import NAMES, NF4Linear, NF4Weight, Quantization


def problem(dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    torch.manual_seed(0)
    x = torch.randn(40, 64).bfloat16().to(dtype).requires_grad_()
    return x, torch.randn(48, 64).bfloat16().to(dtype), torch.randn(40, 48).bfloat16().to(dtype)


def outcome(product, dtype: torch.dtype, bias: torch.Tensor | None = None) -> tuple[torch.Tensor, torch.Tensor]:
    x, weight, gradient = problem(dtype)
    y = product(x, weight, None if bias is None else bias.to(dtype))
    y.backward(gradient)
    return y.detach(), x.grad


@pytest.mark.parametrize("size", [SLICE_ROWS, 20])
def test_sliced_bfloat16_product_is_rounded_once(size, monkeypatch):
    monkeypatch.setattr(onednn, "HAS_BFLOAT16_PRODUCTS", False)  # or float32 is not used
    monkeypatch.setattr(matmul, "SLICE_ROWS", size)  # a weight of 48 rows is one slice, or two and a shorter one
    bias = torch.linspace(-3, 3, 48).bfloat16()
    actual = outcome(sliced_linear, torch.bfloat16, bias)
    exact = outcome(F.linear, torch.float64, bias)
    for ours, reference in zip(actual, exact, strict=True):
        assert ours.dtype is torch.bfloat16
        torch.testing.assert_close(ours.double(), reference, atol=1e-5, rtol=2**-8)


def test_gradient_in_many_slices_is_as_exact_as_in_one(monkeypatch):
    monkeypatch.setattr(onednn, "HAS_BFLOAT16_PRODUCTS", True)
    _, exact = outcome(F.linear, torch.float64)
    deviations = []
    for size in (SLICE_ROWS, 2):
        monkeypatch.setattr(matmul, "SLICE_ROWS", size)
        _, actual = outcome(sliced_linear, torch.bfloat16)
        deviations.append((actual.double() - exact).norm())
    assert deviations[1] < 1.5 * deviations[0]


def test_all_products_agree():
    ways = (F.linear, frozen_linear, sliced_linear)
    first, *others = (outcome(way, torch.bfloat16) for way in ways)
    for other in others:
        for a, b in zip(first, other, strict=True):
            torch.testing.assert_close(a, b, atol=1e-2, rtol=2**-7)


@pytest.mark.parametrize("part", [48, 20])
def test_long_product_in_slices(part, monkeypatch):
    monkeypatch.setattr(matmul, "LONG_OUTPUTS", 48)
    monkeypatch.setattr(matmul, "LONG_SLICE", part)
    bias = torch.randn(48)
    for ours, exact in zip(
        outcome(frozen_linear, torch.float32, bias), outcome(F.linear, torch.float64, bias), strict=True
    ):
        torch.testing.assert_close(ours.double(), exact, atol=1e-5, rtol=1e-5)


@torch.autocast("cpu", torch.bfloat16)
def test_long_product_in_mixed_precision_is_torch_s(monkeypatch):
    monkeypatch.setattr(matmul, "LONG_OUTPUTS", 48)
    x, weight, _ = problem(torch.float32)
    y, reference = frozen_linear(x, weight), F.linear(x, weight)
    assert y.dtype is torch.bfloat16
    assert torch.equal(y, reference)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("native", [True, False], ids=["bf16 matmul", "no bf16 matmul"])
@pytest.mark.parametrize("rows", [1, 2, 40])
def test_bias_forward_and_backward_equal_torch(dtype, native, rows, monkeypatch):
    if not native:
        monkeypatch.setattr(onednn, "HAS_BFLOAT16_PRODUCTS", False)
    torch.manual_seed(0)
    layer = Linear(64, 48, dtype=dtype).requires_grad_(False)
    x = torch.randn(rows, 64).to(dtype).requires_grad_()
    exact = x.detach().double().requires_grad_()
    expected = F.linear(exact, layer.weight.double(), layer.bias.double())
    actual = layer(x)
    gradient = torch.randn(rows, 48).to(dtype)
    actual.backward(gradient)
    expected.backward(gradient.double())
    tolerance = {"atol": 1e-5, "rtol": 1e-5} if dtype is torch.float32 else {"atol": 2**-8, "rtol": 2**-7}
    torch.testing.assert_close(actual.double(), expected, **tolerance)
    torch.testing.assert_close(x.grad.double(), exact.grad, **tolerance)
    with torch.no_grad():
        torch.testing.assert_close(layer(x), actual, **tolerance)


def test_bias_that_trains_gets_its_gradient():
    for dtype in (torch.float32, torch.bfloat16):
        layer = Linear(8, 3, dtype=dtype)
        layer.weight.requires_grad_(False)
        layer(torch.randn(5, 8, dtype=dtype)).sum().backward()
        assert torch.equal(layer.bias.grad, torch.full((3,), 5.0, dtype=dtype))


def test_bias_that_trains_is_refused_where_it_would_get_no_gradient():
    x, bias = torch.randn(3, 8), torch.zeros(5, requires_grad=True)
    with torch.no_grad():
        sliced_linear(x, torch.zeros(5, 8), bias)  # no gradient is asked for
    with pytest.raises(AssertionError, match="get no gradient"):
        sliced_linear(x, torch.zeros(5, 8), bias).sum().backward()


@torch.no_grad()
def test_bias_in_a_compiled_product():
    torch._dynamo.reset()
    layer, x = Linear(64, 50), torch.randn(1, 64)
    torch.testing.assert_close(torch.compile(layer, options=OPTIONS)(x), F.linear(x, layer.weight, layer.bias))


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("rows", [1, 7])
def test_bias_over_an_nf4_weight(name, rows):
    torch.manual_seed(0)
    bias, x = torch.randn(96), torch.randn(rows, 64, requires_grad=True)
    layer = NF4Linear(torch.randn(96, 64), Quantization(name, torch.float32), bias)
    assert set(dict(layer.named_parameters())) == {"bias", "weight.packed", "weight.scales"}
    actual, exact = layer(x), x.detach().requires_grad_()
    expected = F.linear(exact, layer.weight.to_dense(), bias)
    torch.testing.assert_close(actual, expected)
    for y in (actual, expected):
        y.square().sum().backward()
    torch.testing.assert_close(x.grad, exact.grad)


def test_weight_that_trains_gets_its_gradient():
    layer = Linear(8, 3, bias=False, dtype=torch.bfloat16)
    layer(torch.randn(5, 8, dtype=torch.bfloat16)).sum().backward()
    assert layer.weight.grad is not None
    frozen = nn.Linear(8, 3, bias=False).requires_grad_(False)
    assert not frozen_linear(torch.randn(5, 8), frozen.weight).requires_grad


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_one_row_is_as_exact_as_many(dtype):
    torch.manual_seed(0)
    weight, x = torch.randn(333, 600).to(dtype), torch.randn(1, 600).to(dtype)
    exact = F.linear(x.double(), weight.double())
    torch.testing.assert_close(
        frozen_linear(x, weight).double(), exact, atol=1e-4, rtol=1e-5 if dtype is torch.float32 else 2**-8
    )


def check_storage(weight, dense: torch.Tensor, rows: int) -> None:
    """Check a weight in another storage against the tensor that it holds."""
    x, bias = torch.randn(rows, dense.shape[1]).to(dense.dtype), torch.randn(len(dense)).to(dense.dtype)
    actual, exact = frozen_linear(x, weight), F.linear(x.double(), dense.double())
    assert actual.dtype is dense.dtype
    assert weight.shape == dense.shape
    assert torch.equal(weight.to_dense(), dense)
    assert torch.equal(weight.rows(slice(3, 9)), dense[3:9])
    torch.testing.assert_close(actual.double(), exact, atol=1e-4, rtol=1e-5 if dense.dtype is torch.float32 else 2**-8)
    assert torch.equal(frozen_linear(x, weight, bias), actual + bias)


@pytest.mark.parametrize("rows", [1, 2, 40])
@pytest.mark.parametrize(("out_features", "width"), [(96, 96), (333, 111)])
def test_striped_weight(rows, out_features, width):
    torch.manual_seed(0)
    dense = torch.randn(out_features, 600).bfloat16()
    weight = StripedWeight(dense, width)
    assert weight.nbytes == dense.nbytes
    check_storage(weight, dense, rows)


@pytest.mark.skipif(not weight_layouts.HAS_FBGEMM, reason="torch has no FBGEMM here")
@pytest.mark.parametrize("rows", [1, 2, 40])
@pytest.mark.parametrize("parts", [1, 4])
def test_half_weight(rows, parts, monkeypatch):
    torch.manual_seed(0)
    monkeypatch.setattr(weight_layouts, "HALF_ROWS", 333 // parts + 1)
    dense = torch.randn(333, 600).bfloat16().float()
    weight = HalfWeight.holding(dense)
    assert weight.nbytes == dense.nbytes / 2
    check_storage(weight, dense, rows)


def test_repacked_chooses_the_storage_that_the_cpu_multiplies(monkeypatch):
    weight = torch.randn(384, 64)
    monkeypatch.setattr(weight_layouts, "HAS_FBGEMM", True)
    monkeypatch.setattr(onednn, "HAS_BFLOAT16_PRODUCTS", True)
    assert repacked(weight) is weight  # float16 would round it
    assert repacked(weight.bfloat16()).stripes.shape == (2, 64, 192)
    prime = weight[:331].bfloat16()
    assert repacked(prime) is prime
    monkeypatch.setattr(onednn, "HAS_BFLOAT16_PRODUCTS", False)
    rounded = weight.bfloat16()
    assert repacked(rounded) is rounded
    monkeypatch.setattr(weight_layouts, "HAS_FBGEMM", False)
    rounded = weight.bfloat16().float()
    assert repacked(rounded) is rounded


def test_in_bfloat16_rounds_no_value():
    weight = torch.randn(64, 32).bfloat16().float()
    assert in_bfloat16(weight).dtype is torch.bfloat16
    assert torch.equal(in_bfloat16(weight).float(), weight)
    weight[5, 7] += 2**-12 * weight[5, 7].abs()
    assert in_bfloat16(weight) is weight


@pytest.mark.parametrize("rows", [1, 2, 40])
def test_bfloat16_weight_in_a_float32_product(rows):
    torch.manual_seed(0)
    weight, x, bias = torch.randn(333, 600).bfloat16(), torch.randn(rows, 600), torch.randn(333).bfloat16()
    actual, exact = frozen_linear(x, weight, bias), F.linear(x.double(), weight.double(), bias.double())
    assert actual.dtype is torch.float32
    torch.testing.assert_close(actual.double(), exact, atol=1e-4, rtol=1e-5)


@pytest.mark.skipif(not weight_layouts.HAS_FBGEMM, reason="torch has no FBGEMM here")
@pytest.mark.parametrize("exponent", [-20, 0, 17])
def test_half_weight_holds_32_powers_of_two_below_the_largest_value(exponent):
    most, least = 255 / 128 * 2.0**exponent, 255 / 128 * 2.0 ** (exponent - 32)
    weight = torch.tensor([[most, -least], [0.0, least]])
    assert torch.equal(HalfWeight.holding(weight).to_dense(), weight)
    assert torch.equal(HalfWeight.holding(weight).matmul(torch.eye(2)), weight.t())
    assert HalfWeight.holding(torch.tensor([[most, least / 2]])) is None


@pytest.mark.parametrize("largest", [float("nan"), float("inf"), 0.0, 2.0**-140])
def test_half_weight_refuses_what_cannot_be_scaled(largest):
    assert HalfWeight.holding(torch.tensor([[0.0, largest]])) is None


class Calls(TorchFunctionMode):
    """Count the torch functions that are called, but for the attributes that are read."""

    def __init__(self) -> None:
        super().__init__()
        self.functions: list[object] = []

    def __torch_function__(self, function, types, args=(), kwargs=None):
        if getattr(function, "__name__", "") != "__get__":
            self.functions.append(function)
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("rows", [1, 40])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_frozen_product_on_cuda_is_one_call(rows, dtype):
    """With tensors that have a device but no data, no GPU is needed to see what is called."""
    with FakeTensorMode(), torch.device("cuda"):
        x, weight, bias = (torch.empty(shape, dtype=dtype) for shape in ((rows, 64), (48, 64), (48,)))
    with Calls() as calls:
        frozen_linear(x, weight, bias)
    assert calls.functions == [F.linear]


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("rows", [1, 7])
def test_nf4_product_on_cuda_is_one_call_of_bitsandbytes(name, rows, monkeypatch):
    """bitsandbytes runs for real, on a CPU."""
    torch.manual_seed(0)
    calls, matmul_4bit = [], bitsandbytes.matmul_4bit
    monkeypatch.setattr(bitsandbytes, "matmul_4bit", lambda *a, **k: calls.append(a) or matmul_4bit(*a, **k))
    weight, bias = NF4Weight(torch.randn(96, 64), Quantization(name, torch.float32)), torch.randn(96)
    x = torch.randn(rows, 64, requires_grad=True)
    exact = x.detach().requires_grad_()
    with Calls() as functions:
        actual = CUDA.nf4_linear(x, weight, bias)
    expected = F.linear(exact, weight.to_dense(), bias)
    assert len(calls) == 1
    assert not {F.linear, torch.mm, torch.addmm} & set(functions.functions)
    torch.testing.assert_close(actual, expected, atol=1e-5, rtol=1e-5)
    for y in (actual, expected):
        y.square().sum().backward()
    torch.testing.assert_close(x.grad, exact.grad, atol=1e-4, rtol=1e-5)


@torch.no_grad()
@pytest.mark.parametrize("biases", [(False, False, False), (True, True, True), (True, False, True)], ids=str)
def test_joint_product_equals_each_layer_with_its_adapter(biases):
    torch.manual_seed(0)
    layers = [Linear(16, out, bias=has_bias) for out, has_bias in zip((12, 4, 4), biases, strict=True)]
    layers[0], layers[2] = (LoRALinear(layer, rank=2, scaling=3.0, dropout=0.5) for layer in (layers[0], layers[2]))
    for layer in (layers[0], layers[2]):
        nn.init.normal_(layer.lora_B.weight)
    x = torch.randn(5, 16)
    expected = [layer.eval()(x) for layer in layers]
    joint = Joint(*layers)
    assert joint.weight.shape == (20, 16)
    assert all(layer.weight is layer.bias is None for layer in layers)  # or every weight would be there twice
    for actual, reference in zip(joint(x), expected, strict=True):
        torch.testing.assert_close(actual, reference)
