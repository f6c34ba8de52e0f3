"""What a type stores is what the gguf package's quantizers store."""

import gguf
import pytest
import torch

from litlora.nn.gguf_rounding import rounded, rounded_input


def values() -> torch.Tensor:
    """Return rows with blocks of zeros, of one value, of halves of the largest, and of values from bfloat16."""
    rows = torch.randn(6, 256, generator=torch.Generator().manual_seed(0))
    rows[0, :32] = 0
    rows[1, 32:64] = 3.0
    rows[2] = rows[2].bfloat16().float()
    rows[3, :32] = torch.arange(-16, 16) / 4
    rows[4] *= 1e-6
    return rows


@pytest.mark.parametrize("kind", ["F16", "BF16", "Q8_0", "Q4_0"])
def test_values_are_those_of_the_gguf_package(kind):
    type_ = gguf.GGMLQuantizationType[kind]
    expected = gguf.quants.dequantize(gguf.quants.quantize(values().numpy(), type_), type_)
    assert torch.equal(rounded(values(), kind), torch.from_numpy(expected))


@pytest.mark.parametrize(("kind", "width"), [("Q4_0", 32), ("Q6_K", 256)])
def test_inputs_of_quantized_weights_have_127_steps(kind, width):
    rows = values()[:4]  # a scale in float16 is too coarse for the last
    largest = rows.view(-1, width).abs().amax(1, keepdim=True)
    difference = (rounded_input(rows, kind) - rows).view(-1, width).abs()
    assert 0 < difference.amax()
    assert (difference <= 0.57 * largest / 127).all()  # half a step, and what float16 rounds of the scale


@pytest.mark.parametrize(("kind", "dtype"), [("F16", torch.float16), ("BF16", torch.bfloat16), ("F32", torch.float32)])
def test_inputs_of_plain_weights_have_their_dtype(kind, dtype):
    assert torch.equal(rounded_input(values(), kind), values().to(dtype).float())
