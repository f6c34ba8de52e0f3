"""Peak memory of a run, estimated from the shapes of its network and of its longest micro-batch."""

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn

from litlora.lora.config import PISSA
from litlora.lora.layer import LoRALinear, lora_parameters
from litlora.lora.svd import decomposition_bytes
from litlora.models.transformer import GPT
from litlora.nn.backend_interface import FLOAT32
from litlora.nn.linear import Linear
from litlora.nn.nf4 import BLOCK as NF4_BLOCK
from litlora.nn.nf4 import OUTER_BLOCK
from litlora.nn.quantization import DOUBLE
from litlora.train.activation_memory import activation_bytes, temporary_bytes
from litlora.train.network_shape import Load, Network
from litlora.train.optimizers import build_optimizer

PROCESS = "Python and torch"
"""The part of the peak that a process has before it loads a weight."""


def breakdown(network: Network, load: Load, optimizer: str | dict[str, Any]) -> dict[str, int]:
    """Return the peak memory of training by parts, in bytes, without Python's and torch's own."""
    gpt = network.outline()
    adapter = list(lora_parameters(gpt).values())
    adapters, activations = sum(matrix.nbytes for matrix in adapter), activation_bytes(network, load)
    # Gradients of a micro-batch take the memory of its activations, and are summed once all are computed.
    beyond = max(0, adapters - activations) * load.concurrent
    mlp_bytes = load.tokens * network.product * network.config.intermediate_size
    overheads = network.backend.memory_overheads(activations, mlp_bytes)
    step = {
        "its gradients": adapters + beyond,
        "optimizer state": optimizer_bytes(optimizer, adapter),
        "activations": activations * load.concurrent,
        "temporaries": temporary_bytes(network, load) * load.concurrent,
        **{name: size * load.concurrent for name, size in overheads.items()},
    }
    return {
        **local_weight_bytes(network, weight_bytes(gpt, network.quantize, network.quantized_bytes)),
        "adapter, float32": adapters,
        **_start_bytes(network, sum(step.values())),
        **step,
    }


def _start_bytes(network: Network, step: int) -> dict[str, int]:
    """Return the bytes of a start that is taken out of the base, and those by which finding it exceeds a step."""
    if not network.lora.changes_base:
        return {}
    layers = network.adapted.values()
    starts = sum(matrix.nbytes for layer in layers for matrix in layer.start or ())
    exact = network.lora.init == PISSA
    finding = max((decomposition_bytes(*layer.weight.shape, exact=exact) for layer in layers), default=0)
    return {"its start": starts, "singular vectors, beyond a step": max(0, finding - step)}


def weight_bytes(gpt: GPT, quantize: str | None, quantized: int | None = None) -> dict[str, int]:
    """Return the bytes of the frozen weights: embedding, output head, norms, and the linear layers of the blocks.

    `quantized` are those of the linear layers where a file has them quantized.
    """
    is_tied = gpt.config.tie_word_embeddings and getattr(gpt.lm_head, "start", None) is None
    head = 0 if is_tied else gpt.lm_head.weight.nbytes
    modules = gpt.model.modules()
    sizes = [module.weight.shape.numel() for module in modules if isinstance(module, Linear | LoRALinear)]
    norms = [module.weight for module in gpt.modules() if isinstance(module, nn.RMSNorm | nn.LayerNorm)]
    biases = sum(p.nbytes for name, p in gpt.named_parameters() if name.endswith(".bias"))
    dtype = str(gpt.lm_head.weight.dtype).removeprefix("torch.")
    stored = dtype if quantize is None else quantize.removeprefix("bnb.").upper()
    return {
        f"embedding, {dtype}": gpt.model.embed_tokens.weight.nbytes,
        f"output head, {dtype}": head,
        f"norms, {dtype}": sum(weight.nbytes for weight in norms if weight is not None),
        f"linear layers, {stored}": (_linear_bytes(gpt, sizes, quantize) if quantized is None else quantized) + biases,
    }


def _linear_bytes(gpt: GPT, sizes: Sequence[int], quantize: str | None) -> int:
    if quantize is None:
        return sum(sizes) * gpt.lm_head.weight.itemsize
    return sum(nf4_bytes(size, double=quantize == DOUBLE) for size in sizes)


def local_weight_bytes(network: Network, weights: dict[str, int]) -> dict[str, int]:
    """Return the bytes of the frozen weights on each device: its shard of each, and what is gathered.

    Gathered are the weights outside of the blocks, and two blocks: one is gathered while the other is used.
    """
    if network.shards == 1:
        return weights
    *outside, blocks = weights.values()
    gathered = sum(outside) + blocks * 2 // network.config.num_hidden_layers
    return {name: -(-size // network.shards) for name, size in weights.items()} | {"gathered weights": gathered}


def nf4_bytes(values: int, *, double: bool) -> int:
    """Return the bytes of 4-bit values and their scales, which double quantization stores in a byte each."""
    scales = -(-values // NF4_BLOCK)
    return -(-values // 2) + (scales + FLOAT32 * -(-scales // OUTER_BLOCK) if double else FLOAT32 * scales)


def optimizer_bytes(optimizer: str | dict[str, Any], matrices: Sequence[nn.Parameter]) -> int:
    """Return the bytes of an optimizer's state for matrices, by a real step on one of each shape."""
    shapes = Counter(matrix.shape for matrix in matrices)
    return sum(count * _state_bytes(optimizer, shape) for shape, count in shapes.items())


def _state_bytes(optimizer: str | dict[str, Any], shape: torch.Size) -> int:
    parameter = nn.Parameter(torch.zeros(shape))
    parameter.grad = torch.zeros_like(parameter)
    built = build_optimizer(optimizer, [parameter], lr=1e-3)
    built.step()
    return sum(value.nbytes for value in built.state[parameter].values() if isinstance(value, torch.Tensor))


def table(counts: Mapping[str, int], parts: Mapping[str, int]) -> str:
    """Return lines of names and numbers: counts as they are, parts of the memory in 10^9 bytes, and their sum."""
    rows = {name: f"{value:,}" for name, value in counts.items()}
    rows |= {"memory, GB": ""} | {f"  {name}": f"{size / 1e9:.3f}" for name, size in parts.items()}
    rows["peak memory, GB"] = f"{sum(parts.values()) / 1e9:.3f}"
    left, right = max(map(len, rows)), max(map(len, rows.values()))
    return "".join(f"{name:{left}}  {value:>{right}}".rstrip() + "\n" for name, value in rows.items())
