"""Next-token choice, and the token stream of a model with a KV cache."""

import warnings
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from litlora.errors import DAMAGED, LitLoraError
from litlora.lanes import Lanes, lanes_on
from litlora.linear import HalfWeight, Joint, Linear, is_packed, narrowed, packed
from litlora.lora import LoRALinear
from litlora.model import GPT, MLP, Attention, KVCache, evaluating
from litlora.pages import settle
from litlora.quantize import quantization_of

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


@dataclass(frozen=True)
class Sampler:
    """How the next token is chosen: temperature 0 takes the likeliest."""

    temperature: float = 0.0
    top_k: int | None = None
    top_p: float = 1.0
    generator: torch.Generator | None = None

    def choose(self, logits: Tensor) -> Tensor:
        """Choose one of the logits (vocab,), or -1 where they are not numbers.

        top_k applies before top_p (nucleus sampling, Holtzman et al. 2019).
        """
        if self.temperature == 0:
            best, index = logits.float().max(dim=0)  # bfloat16 numbers take a CPU thrice the time
            return index.where(best.isfinite(), -1)
        count = min(self.top_k or len(logits), len(logits))
        values, indices = logits.float().topk(count)  # sorted, likeliest first
        finite = values[0].isfinite()
        probabilities = (values / self.temperature).softmax(dim=0).where(finite, 1)
        before = probabilities.cumsum(dim=0) - probabilities
        probabilities = probabilities.where(before < self.top_p, 0)  # the likeliest always stays
        return indices[probabilities.multinomial(1, generator=self.generator)[0]].where(finite, -1)


@torch.inference_mode()
def generate(
    model: GPT, prompt: Sequence[int], sampler: Sampler, *, max_new_tokens: int, stop_ids: Collection[int]
) -> Iterator[int]:
    """Yield the tokens that follow the prompt, until a stop id (not yielded), the limit, or the last position."""
    weight = model.model.embed_tokens.weight
    length = min(len(prompt) + max_new_tokens, model.config.max_position_embeddings)
    cache = KVCache(model.config, length, weight.dtype, weight.device)
    tokens = torch.tensor(prompt, device=weight.device)
    with evaluating(model):
        for _ in range(length - len(prompt)):
            chosen = sampler.choose(next_logits(model, tokens, cache))
            token = checked(int(chosen))
            if token in stop_ids:
                return
            yield token
            tokens = chosen[None]


def next_logits(model: GPT, tokens: Tensor, cache: KVCache) -> Tensor:
    """Return the logits (vocab,) behind tokens (T,); several at once go through the model as it was written."""
    # A stance imports the compiler, which takes seconds.
    with torch.compiler.set_stance("force_eager") if model.is_compiled and len(tokens) > 1 else nullcontext():
        logits: Tensor = model.lm_head(model(tokens, [len(tokens)], cache)[-1:])
    return logits[0]


def lay_out(model: GPT) -> None:
    """Lay out the weights for one token at a time, after which the model trains no more.

    The embedding's stay as they are, and those in 4 bits.
    """
    join(model)
    store(model, packed)
    settle(weight for weight in model.parameters() if is_packed(weight))


def join(model: GPT) -> None:
    """Make one weight of those that have one input, unless they are in 4 bits."""
    if quantization_of(model) is None:
        for module in model.modules():
            if isinstance(module, Attention | MLP):
                module.join()


def store(model: GPT, form: Callable[[Tensor], Tensor | HalfWeight]) -> None:
    """Store the weights of all products in another form, but those in 4 bits; each core makes one at a time."""
    kinds = (layer for layer in model.modules() if isinstance(layer, Linear | LoRALinear | Joint))
    layers: list[Any] = [layer for layer in kinds if isinstance(layer.weight, Tensor)]
    lanes = Lanes(lanes_on(model.model.embed_tokens.weight.device, torch.get_num_threads()))
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


def checked(token: int) -> int:
    """Return a chosen token, which is negative where there was nothing to choose from."""
    if token < 0:
        raise LitLoraError(f"the model's scores for the next token are NaN or infinite: {DAMAGED}")
    return token
