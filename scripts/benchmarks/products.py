"""The best matmul rate for a checkpoint's weights, which gives a lower bound of the training time."""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.benchmark import Timer

from benchmarks.jobs import Job, Products, serve
from litlora.models.checkpoint import Checkpoint

TOKENS = (512, 1024, 2048)  # about what a micro-batch holds
SECONDS = 0.25  # per shape and implementation


def products(job: Job) -> Products:
    """Time matmuls of all shapes of the model, and return the best rate."""
    gpt = Checkpoint.open(job.checkpoint).outline()
    head = gpt.lm_head.weight.numel()
    linear = [module.weight.shape for module in gpt.modules() if isinstance(module, nn.Linear)]
    dtype = torch.bfloat16 if job.precision == "bf16-true" else torch.float32
    operands = ((tokens, shape, dtype, job.device) for tokens in TOKENS for shape in set(linear))
    rates = (rate(*drawn(*operand), way) for operand in operands for way in ways(dtype))
    return Products(max(rates), sum(shape.numel() for shape in linear) - head, head)


def ways(dtype: torch.dtype) -> tuple[Callable[[Tensor, Tensor], Tensor], ...]:
    """Return the matmul implementations; on CPUs without bfloat16 instructions, float32 is faster for bfloat16 too."""
    return (F.linear,) if dtype is torch.float32 else (F.linear, upcast)


def upcast(x: Tensor, weight: Tensor) -> Tensor:
    return F.linear(x.float(), weight.float()).to(x.dtype)


def drawn(tokens: int, shape: torch.Size, dtype: torch.dtype, device: str) -> tuple[Tensor, Tensor]:
    """Return random activations (tokens, in), and a random weight of a shape (out, in)."""
    return torch.randn(tokens, shape[1], dtype=dtype, device=device), torch.randn(shape, dtype=dtype, device=device)


@torch.no_grad()
def rate(x: Tensor, weight: Tensor, multiply: Callable[[Tensor, Tensor], Tensor]) -> float:
    """Return the floating-point operations per second, from the median time of many matmuls."""
    operands = {"multiply": multiply, "x": x, "weight": weight}
    timer = Timer("multiply(x, weight)", globals=operands, num_threads=torch.get_num_threads())
    return 2 * len(x) * weight.numel() / timer.blocked_autorange(min_run_time=SECONDS).median


if __name__ == "__main__":
    serve({"products": products})
