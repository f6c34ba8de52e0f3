"""Preparing a model to decode: joined and repacked weights, and torch.compile."""

import warnings
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from litlora.cpu.huge_pages import settle
from litlora.cpu.weight_layouts import HalfWeight, is_packed, narrowed, packed
from litlora.cpu.worker_threads import WorkerThreads, worker_count
from litlora.errors import LitLoraError
from litlora.generation.session import next_logits
from litlora.lora.layer import LoRALinear, freeze_adapter
from litlora.models.kv_cache import KVCache
from litlora.models.transformer import GPT, MLP, Attention, evaluating
from litlora.nn.linear import Joint, Linear
from litlora.nn.nf4 import quantization_of

UNCHANGED = ("EMPTY_NN_MODULE_HOOKS_DICT", "NOT_PRESENT_IN_GENERIC_DICT")
"""Guards against hooks on a module, and a forward of its own, that come after it was compiled."""


def telling(guards: Sequence[Any]) -> list[bool]:
    """Choose the guards that tell a block from others, and not those of what a process never changes.

    They are asked before each call of a block, which takes longer than some of its products: of 189, 74 are left.
    """
    return [not guard.is_global and guard.guard_type not in UNCHANGED for guard in guards]


STEP: dict[str, Any] = {
    # A norm and a rotation are computed once, not again by each loop that reads them.
    "realize_reads_threshold": 2,
    "realize_acc_reads_threshold": 3,
    "size_asserts": False,
    "cpp.enable_floating_point_contract_flag": "fast",  # a product and its sum are one instruction, rounded once
    "guard_filter_fn": telling,
}
"""How the step from one token to the next is compiled."""


def lay_out(model: GPT) -> None:
    """Lay out the weights for one token at a time, after which the model trains no more.

    The embedding's stay as they are, and those in 4 bits.
    """
    join(model)
    store(model, packed)
    settle(weight for weight in model.parameters() if is_packed(weight))


def join(model: GPT) -> None:
    """Make one weight of those that have one input, unless they are in 4 bits."""
    freeze_adapter(model)
    if quantization_of(model) is None:
        for module in model.modules():
            if isinstance(module, Attention | MLP):
                module.join()


def store(model: GPT, form: Callable[[Tensor], Tensor | HalfWeight]) -> None:
    """Store the weights of all products in another form, but those in 4 bits; each core makes one at a time."""
    kinds = (layer for layer in model.modules() if isinstance(layer, Linear | LoRALinear | Joint))
    layers: list[Any] = [layer for layer in kinds if isinstance(layer.weight, Tensor)]
    lanes = WorkerThreads(worker_count(model.model.embed_tokens.weight.device, torch.get_num_threads()))
    for layer, stored in zip(layers, lanes.map(form, (layer.weight for layer in layers)), strict=True):
        del layer.weight  # in the place of a parameter torch takes nothing else
        layer.weight = nn.Parameter(stored, requires_grad=False) if isinstance(stored, Tensor) else stored


def compile_step(model: GPT) -> None:
    """Compile the way from one token to the next, after which the model trains no more.

    All blocks are one compilation, at any length.
    """
    join(model)
    store(model, narrowed)
    settle(model.parameters())
    for layer in (*model.model.layers, model.lm_head):
        layer.compile(options=STEP)
    model.is_compiled = True
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "TensorFloat32 tensor cores")  # float32 that is asked for is computed
            take_a_step(model)
    except torch._dynamo.exc.TorchDynamoException as error:
        why = str(error).strip().partition("\n")[0]
        advice = "install g++, or leave --compile out"
        raise LitLoraError(f"--compile needs a C++ compiler: {advice} (torch says: {why})") from error


@torch.inference_mode()
def take_a_step(model: GPT) -> None:
    """Go one step behind some tokens, which compiles it for all lengths.

    Sizes that are alike would be taken for one, and lengths of 0, 1 and all that there is room for are compiled apart.
    That any length is meant is said here alone: `compile(dynamic=True)` would say it again before each call.
    """
    weight = model.model.embed_tokens.weight
    length = 1 + max(model.config.head_dim, model.config.num_attention_heads)
    cache = KVCache(model.config, length + 1, weight.dtype, weight.device)
    cache.length = length - 1
    with evaluating(model), torch._dynamo.config.patch(assume_static_by_default=False):
        next_logits(model, torch.zeros(1, dtype=torch.long, device=weight.device), cache)
