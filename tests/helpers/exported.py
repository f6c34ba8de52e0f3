"""A random adapter, and whether llama.cpp answers with it as litlora does."""

import math
from collections.abc import Sequence
from pathlib import Path

import torch

from litlora.lora.checkpoint import load_with_adapters, read_adapter, write_adapter
from litlora.lora.config import TARGET_MODULES, LoRAConfig
from litlora.lora.layer import add_lora, lora_parameters
from litlora.lora.selection import Weighted
from litlora.lora.targets import excluded_modules, switch_targets
from litlora.models.checkpoint import Checkpoint
from litlora.models.checkpoint_files import CheckpointFiles
from litlora.models.transformer import GPT
from litlora.nn.gguf_weight import GGUFWeight

CPU = torch.device("cpu")
TOKENS, EOS = 6, 1
PROMPTS = [[0, 45, 200, 7, 31, 102, 250, 88, 19, 64, 5, 77], [3, 140, 21], [9, 80], [77, 131, 250, 40]]


def random_adapter(base: Path, folder: Path, std: float = 0.05, **settings) -> Path:
    """Write an adapter of all linear layers of the blocks, with random matrices."""
    checkpoint = Checkpoint.open(base)
    model = checkpoint.load(torch.float32, CPU)
    switches = [switch for switch in TARGET_MODULES if switch != "head"]
    targets, excluded = switch_targets(switches, model.config), excluded_modules(model.config)
    lora = LoRAConfig(4, 6, 0.0, targets, exclude_modules=excluded, **settings)
    add_lora(model, lora)
    torch.manual_seed(1)
    for parameter in lora_parameters(model).values():
        torch.nn.init.normal_(parameter, std=std)
    folder.mkdir()
    write_adapter(folder, model, lora, base, checkpoint.fingerprint(), "alpaca")
    return folder


def load(base: Path, adapter: Path | None, gguf: Path | None = None) -> GPT:
    """Load a model in float32 with the weights of a GGUF file, if one is given."""
    checkpoint = Checkpoint.open(CheckpointFiles.find(base, gguf))
    if adapter is None:
        return checkpoint.load(torch.float32, CPU)
    if gguf is None:
        return load_with_adapters(checkpoint, [Weighted(adapter)], torch.float32, CPU)
    # The adapter is one of the checkpoint's own weights, whose fingerprint is another.
    model = checkpoint.load(torch.float32, CPU)
    read_adapter(adapter, Checkpoint.open(base)).add_to(model)
    return model


def in_half(x: torch.Tensor) -> torch.Tensor:
    return x.half().float()


def round_activations(model: GPT) -> GPT:
    """Have the products of a model over a GGUF file in f16 round their inputs, as GGML does."""

    def rounded(product):
        return lambda x, bias=None: product(in_half(x), bias)

    for weight in model.modules():
        if isinstance(weight, GGUFWeight) and weight.kind.name == "F16":
            weight.matmul = rounded(weight.matmul)
    model.lm_head.register_forward_pre_hook(lambda module, inputs: in_half(inputs[0]))
    return model


@torch.no_grad()
def check(model: GPT, found: list, atol: float = 1e-3, prompts: Sequence[list[int]] = PROMPTS, eos: int = EOS) -> None:
    """Compare greedy tokens and their log-probabilities with litlora's."""
    assert sum(map(len, found)) > TOKENS
    for prompt, choices in zip(prompts, found, strict=True):
        ids = [*prompt, *(token for token, _ in choices)]
        logits = model.logits(model(torch.tensor(ids), [len(ids)]))[len(prompt) - 1 :]
        best, own = logits.log_softmax(1).max(1), logits.log_softmax(1)
        assert len(choices) == TOKENS or eos in (ids[-1], int(best.indices[-1]))
        for n, (token, logprob) in enumerate(choices):
            assert math.isclose(logprob, float(own[n, token]), abs_tol=atol)
            assert float(own[n, token]) > float(best.values[n]) - atol, "it is not the most likely token"
