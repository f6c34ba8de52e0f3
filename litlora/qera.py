"""An adapter that begins by making up for what 4 bits lose of its base (QERA, Zhang et al. 2025, arXiv 2410.06040)."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import partial

import torch
from torch import Tensor, nn

from litlora.batches import epoch_order, micro_batches
from litlora.checkpoint import Weights
from litlora.errors import DAMAGED, LitLoraError
from litlora.lora import LoRALinear
from litlora.model import evaluating
from litlora.quantize import NF4Weight, dequantized
from litlora.training import Run, loss_alone

EXAMPLES = 64
"""Which go through the base once, to see how large the inputs of its layers are."""
ITERATIONS = 4
"""Of the randomized decomposition, which then leaves less than 1 % more than the best there is."""
SMALLEST = 1e-3
"""How large a channel of the inputs counts at least, as a share of what is usual."""


@torch.no_grad()
def make_up_for_4_bits(run: Run) -> None:
    """Have a new adapter begin with the most that its rank holds of what its base has lost; all ranks get the same."""
    layers = {name: layer for name, layer in run.gpt.named_modules() if is_over_4_bits(layer)}
    first = epoch_order(len(run.train), seed=run.args.seed, epoch=1)[:EXAMPLES].tolist()
    samples, train = [run.train[number] for number in first], run.args.train
    with summing_squares(layers) as sums, evaluating(run.gpt):
        for micro in micro_batches(samples, train.micro_batch_size, train.micro_batch_tokens):
            loss_alone(run, micro)
    weights = Weights(run.args.checkpoint_dir)
    for name, layer in layers.items():
        if not sums[name].isfinite().all():
            raise LitLoraError(f"--lora_init qera: what goes into {name} is NaN or infinite in the base: {DAMAGED}")
        whole = weights.once(f"{name}.weight").to(run.fabric.device).float()
        begin_with(layer, whole - dequantized(whole, layer.weight.quantization), sums[name])
        for matrix in (layer.lora_A.weight, layer.lora_B.weight):
            run.ranks.as_first(matrix)


def is_over_4_bits(layer: nn.Module) -> bool:
    return isinstance(layer, LoRALinear) and isinstance(layer.weight, NF4Weight)


@contextmanager
def summing_squares(layers: Mapping[str, nn.Module]) -> Iterator[dict[str, Tensor]]:
    """Sum up the squares of what goes into each layer (T, in) inside the block, channel by channel (in,)."""
    sums: dict[str, Tensor] = {}

    def add(name: str, _layer: nn.Module, inputs: tuple[Tensor]) -> None:
        sums[name] = sums.get(name, 0) + inputs[0].float().square().sum(dim=0)

    handles = [layer.register_forward_pre_hook(partial(add, name)) for name, layer in layers.items()]
    try:
        yield sums
    finally:
        for handle in handles:
            handle.remove()


def begin_with(layer: LoRALinear, lost: Tensor, squares: Tensor) -> None:
    """Give a layer's branch the product that comes nearest to a matrix (out, in), for inputs with such squares (in,).

    The error of the output is least where columns count as much as their inputs are large: this is QERA-approx, which
    takes the channels of the inputs as uncorrelated. What a rank has beyond that of the matrix stays as it was.
    """
    usual = squares.mean().clamp(min=torch.finfo(squares.dtype).tiny)
    size = (squares / usual).sqrt().clamp(min=SMALLEST)
    rank = min(layer.lora_A.out_features, *lost.shape)
    u, s, v = (t[..., :rank] for t in torch.svd_lowrank(lost * size, min(2 * rank, *lost.shape), ITERATIONS))
    root = (s / layer.scaling).sqrt()  # which both matrices get alike
    layer.lora_B.weight[:, :rank] = u * root
    layer.lora_A.weight[:rank] = (v * root).t() / size
