"""Adapters that look trained, and their equality with PEFT in logits and gradients."""

from pathlib import Path

import torch
import torch.nn.functional as F
from peft import PeftModel
from torch import nn

from litlora.lora.checkpoint import write_adapter
from litlora.lora.config import LoRAConfig
from litlora.lora.layer import add_lora, lora_parameters
from litlora.lora.variants import MAGNITUDE
from litlora.models.checkpoint import Checkpoint
from litlora.models.transformer import GPT
from litlora.nn.loss import supervised_loss
from litlora.nn.nf4 import Quantization

CPU = torch.device("cpu")
TOKENS = torch.arange(3, 43)


def perturb(parameters: dict[str, nn.Parameter]) -> None:
    """Make an adapter differ from its start, as if trained: another B, and magnitudes up to a third away."""
    for name, parameter in parameters.items():
        if name.endswith(MAGNITUDE):
            parameter.data.mul_(torch.empty_like(parameter).uniform_(0.7, 1.3))
        elif ".lora_B." in f".{name}":
            nn.init.normal_(parameter, std=0.1)


def adapted(
    base: Path,
    folder: Path,
    config: LoRAConfig,
    dtype: torch.dtype = torch.float32,
    quantization: Quantization | None = None,
) -> GPT:
    """Return a model with an adapter that looks trained, and write the adapter."""
    torch.manual_seed(2)
    checkpoint = Checkpoint.open(base)
    model = checkpoint.load(dtype, CPU, quantization)
    add_lora(model, config)
    perturb(lora_parameters(model))
    write_adapter(folder, model, config, base, checkpoint.fingerprint(), "alpaca")
    return model


def logits(model: GPT) -> torch.Tensor:
    return model.lm_head(model(TOKENS, [len(TOKENS)]))


def gradients(theirs: PeftModel) -> dict[str, torch.Tensor]:
    """Return PEFT's gradients by the names under which it saves the parameters."""
    named = {name: p.grad for name, p in theirs.named_parameters() if p.requires_grad}
    return {
        name.replace(f"{MAGNITUDE}.default.weight", MAGNITUDE).replace(".default", ""): g for name, g in named.items()
    }


def check_equals_peft(model: GPT, theirs: PeftModel, tolerance: float) -> None:
    """Compare logits and gradients; PEFT stores magnitudes in a module, and saves them under the name of the layer."""
    expected, labels = theirs(TOKENS[None]).logits[0], TOKENS.roll(-1)
    torch.testing.assert_close(logits(model), expected, atol=tolerance, rtol=tolerance)
    supervised_loss(model(TOKENS, [len(TOKENS)]), model.lm_head, labels).backward()
    F.cross_entropy(expected.float(), labels, reduction="sum").backward()
    ours = {f"base_model.model.{name}": p.grad for name, p in lora_parameters(model).items()}
    reference = gradients(theirs)
    assert reference.keys() == ours.keys()
    for name, gradient in reference.items():
        torch.testing.assert_close(ours[name], gradient, atol=tolerance, rtol=tolerance)


def check_is_near_peft(model: GPT, theirs: PeftModel, tolerance: float) -> None:
    """Compare the same where bfloat16 rounds every value, by the size of the differences as a whole."""
    expected, labels = theirs(TOKENS[None]).logits[0], TOKENS.roll(-1)
    assert_near(logits(model), expected, tolerance)
    supervised_loss(model(TOKENS, [len(TOKENS)]), model.lm_head, labels).backward()
    F.cross_entropy(expected.float(), labels, reduction="sum").backward()
    reference = gradients(theirs)
    for name, parameter in lora_parameters(model).items():
        assert_near(parameter.grad, reference[f"base_model.model.{name}"], tolerance)


def assert_near(actual: torch.Tensor, expected: torch.Tensor, tolerance: float) -> None:
    assert (actual - expected).float().norm() < tolerance * expected.float().norm()
