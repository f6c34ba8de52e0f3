"""The Markdown table of the results so far."""

from collections.abc import Mapping

import torch
from torch import nn

from gpu_checks.cases import Case, config_of
from gpu_checks.running import Result
from litlora.models.transformer import GPT

PEAKS = {
    "B200": 2250e12, "H200": 989e12, "H100 PCIe": 756e12, "H100": 989e12, "A100": 312e12, "L40S": 362e12, "L4": 121e12,
    "A10": 125e12, "RTX 4090": 165e12, "RTX 3090": 71e12,
}  # fmt: skip
"""Dense bfloat16 operations per second, by what the GPU's name contains, from the makers' data sheets."""
COLUMNS = ("case", "tokens/s", "share of peak", "micro-batch, tokens", "predicted, GB", "measured, GB", "")
FORMULA = (
    "Share of peak: 4 × (weights of the blocks × tokens + weights of the head × supervised tokens) operations, for the "
    "forward pass and the gradients of the inputs, since frozen weights have none, per second over the bfloat16 peak"
)


def peak(name: str) -> float | None:
    """Return the bfloat16 peak of a GPU by its name."""
    return next((rate for part, rate in PEAKS.items() if part in name), None)


def operations(shape: str, supervised: float) -> float:
    """Return the operations of training for each token."""
    with torch.device("meta"):
        gpt = GPT(config_of(shape))
    head = gpt.lm_head.weight.numel()
    linear = sum(module.weight.numel() for module in gpt.modules() if isinstance(module, nn.Linear))
    return 4 * (linear - head + head * supervised)


def share(case: Case, result: Result, rate: float | None) -> str:
    """Return the share of the peak that a training run has."""
    if case.task != "train" or rate is None or result.tokens_per_second is None or result.supervised is None:
        return ""
    return f"{operations(case.shape, result.supervised) * result.tokens_per_second / rate:.1%}"


def render(machine: str, results: Mapping[Case, Result]) -> str:
    """Return the machine, the formula and a row for each case."""
    rate = peak(machine)
    known = f" of {machine}, {rate / 1e12:.0f} TFLOP/s." if rate else f", which is not known of {machine}."
    rows = [COLUMNS, ("---", *["--:"] * 5, "---")]
    for case, result in results.items():
        numbers = (result.predicted_gb, result.measured_gb)
        speed = "" if result.tokens_per_second is None else f"{result.tokens_per_second:,.0f}"
        cells = [case.name, speed, share(case, result, rate), result.micro_batch_tokens]
        rows.append((*cells, *("" if value is None else f"{value:.2f}" for value in numbers), result.note))
    lines = [f"| {' | '.join(row)} |" for row in rows]
    return "\n".join([FORMULA + known, "", *lines]) + "\n"
