"""Preparing a model to decode: joined and repacked weights, and torch.compile."""

import warnings
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from litlora.errors import LitLoraError
from litlora.generation.compiler_cache import remove_truncated_libraries
from litlora.lora.layer import LoRALinear, freeze_adapter
from litlora.models.kv_cache import KVCache
from litlora.models.transformer import GPT, MLP, Attention, evaluating
from litlora.nn.backend import backend
from litlora.nn.linear import Joint, Linear
from litlora.nn.quantization import quantization_of
from litlora.torch_private import dynamic_shapes, dynamo_error, inductor_cache, is_missing_compiler

UNCHANGING = ("EMPTY_NN_MODULE_HOOKS_DICT", "NOT_PRESENT_IN_GENERIC_DICT")
"""Guards against hooks on a module, and a forward of its own, that come after it was compiled."""


def guards_to_check(guards: Sequence[Any]) -> list[bool]:
    """Choose the guards that tell a block from others, and not those of what a process never changes.

    They are checked before each call of a block, which takes longer than some of its products: of 189, 74 are left.
    """
    return [not guard.is_global and guard.guard_type not in UNCHANGING for guard in guards]


OPTIONS: dict[str, Any] = {
    # A norm and a rotation are computed once, not again by each loop that reads them.
    "realize_reads_threshold": 2,
    "realize_acc_reads_threshold": 3,
    "size_asserts": False,
    "cpp.enable_floating_point_contract_flag": "fast",  # a product and its sum are one instruction, rounded once
    "guard_filter_fn": guards_to_check,
}
"""How the decode step is compiled."""


def prepare_for_decoding(model: GPT, *, compiled: bool = False) -> None:
    """Join the weights that have one input and store them as decoding reads them fastest; the model trains no more.

    The embedding's weights stay as they are, and those that are quantized.
    """
    freeze_adapter(model)
    if quantization_of(model) is None:
        join(model)
    layers = [module for module in model.modules() if isinstance(module, Linear | LoRALinear | Joint)]
    dense = [layer for layer in layers if isinstance(layer.weight, Tensor)]
    backend(model.model.embed_tokens.weight.device).prepare_for_decoding(dense, compiled=compiled)


def join(model: GPT) -> None:
    """Make one product of those that have one input."""
    for module in model.modules():
        if isinstance(module, Attention | MLP):
            module.join()


def compile_decode_step(model: GPT) -> None:
    """Compile the decode step, after which the model trains no more: one compilation for all blocks and lengths."""
    prepare_for_decoding(model, compiled=True)
    for layer in (*model.model.layers, model.lm_head):
        layer.compile(options=OPTIONS)
    model.is_compiled = True
    remove_truncated_libraries(inductor_cache())
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "TensorFloat32 tensor cores")  # float32 was requested
            take_decode_step(model)
    except dynamo_error() as error:
        raise compilation_failed(error) from error


def compilation_failed(error: Exception) -> LitLoraError:
    """Return the error of a model that torch cannot compile, usually for want of a compiler."""
    cause = getattr(error, "inner_exception", error)
    why = str(cause).strip().partition("\n")[0]
    if is_missing_compiler(cause):
        advice = "install g++, or leave --compile out"
        return LitLoraError(f"--compile needs a C++ compiler: {advice} (torch says: {why})")
    return LitLoraError(f"--compile: torch cannot compile the model; leave --compile out (torch says: {why})")


@torch.inference_mode()
def take_decode_step(model: GPT) -> None:
    """Decode one token after some others, which compiles the step for all lengths.

    Equal sizes would be taken for one, and lengths of 0, 1 and the cache's are compiled separately, as are keys within
    a window that do not start with the cache. Only here are shapes dynamic: `compile(dynamic=True)` would set it again
    before each call.
    """
    length = max(model.config.head_dim, model.config.num_attention_heads)
    weight = model.model.embed_tokens.weight
    cache = KVCache(model.config, length + 2, weight.dtype, weight.device)
    cache.length, cache.windows = length, [None] * len(cache.windows)
    with evaluating(model), dynamic_shapes():
        model.logits(model(torch.zeros(1, dtype=torch.long, device=weight.device), [1], cache))
