"""The best rate of matrix products with a checkpoint's weights, which bounds every program from below."""

import time
from collections.abc import Callable
from statistics import median

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.jobs import Job, Products, serve
from litlora.checkpoint import load_config
from litlora.model import GPT

TOKENS = (512, 1024, 2048)  # about what a micro-batch holds
SECONDS = 0.25  # for each shape, and each way


def products(job: Job) -> Products:
    """Time all shapes of the model's products, and keep the best rate."""
    with torch.device("meta"):
        gpt = GPT(load_config(job.checkpoint))
    head = gpt.lm_head.weight.numel()
    linear = [module.weight.shape for module in gpt.modules() if isinstance(module, nn.Linear)]
    dtype = torch.bfloat16 if job.precision == "bf16-true" else torch.float32
    rates = (rate(tokens, shape, dtype, way) for tokens in TOKENS for shape in set(linear) for way in ways(dtype))
    return Products(max(rates), sum(shape.numel() for shape in linear) - head, head)


def ways(dtype: torch.dtype) -> tuple[Callable[[Tensor, Tensor], Tensor], ...]:
    """Return the ways to multiply: without bfloat16 instructions, float32 is the faster one for bfloat16 too."""
    return (F.linear,) if dtype is torch.float32 else (F.linear, upcast)


def upcast(x: Tensor, weight: Tensor) -> Tensor:
    return F.linear(x.float(), weight.float()).to(x.dtype)


@torch.no_grad()
def rate(tokens: int, shape: torch.Size, dtype: torch.dtype, multiply: Callable[[Tensor, Tensor], Tensor]) -> float:
    """Return the floating-point operations per second of the median of several products."""
    x, weight = torch.randn(tokens, shape[1], dtype=dtype), torch.randn(shape, dtype=dtype)
    seconds: list[float] = []
    while sum(seconds) < SECONDS:
        start = time.perf_counter()
        multiply(x, weight)
        seconds.append(time.perf_counter() - start)
    return 2 * tokens * shape.numel() / median(seconds)


if __name__ == "__main__":
    serve({"products": products})
