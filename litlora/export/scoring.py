"""The log-probabilities that a network gives fixed tokens, computed in float32."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from litlora.generation.batch import Request, complete_all
from litlora.generation.sampler import Sampler
from litlora.models.transformer import GPT, evaluating

Scores = list[float | None]
"""The log-probability of each token of a sequence but the first; None where an engine has none."""
Engine = Callable[[Sequence[list[int]], Sequence[int]], list[Scores]]
"""Scores sequences of token ids, each at least from the token with a given number on."""
ROWS = 128  # whose logits are in memory at one time


class Rounding(Protocol):
    """What rounds a module, whose weights are float32 copies, while it computes."""

    def apply(self, part: nn.Module, number: int) -> None: ...

    def undo(self, part: nn.Module) -> None: ...


@dataclass(frozen=True)
class RandomRounding:
    """Random changes of weights as large as those of rounding to a dtype."""

    dtype: torch.dtype
    seed: int

    def apply(self, part: nn.Module, number: int) -> None:
        """Move each number of each weight by at most half the distance to the next of the dtype."""
        generator = torch.Generator().manual_seed(self.seed + number)
        for parameter in part.parameters():
            if parameter.is_floating_point() and parameter.ndim > 1:
                shifts = torch.rand(parameter.shape, generator=generator).to(parameter.device)
                factors = shifts.sub_(0.5).mul_(torch.finfo(self.dtype).eps).add_(1)
                parameter.data = factors.mul_(parameter.data)

    def undo(self, part: nn.Module) -> None:
        """There is nothing to undo beside the weights."""


@dataclass(frozen=True)
class LitLoraEngine:
    """The model in memory, adapter included, computed in float32 whatever dtype its weights are stored in."""

    gpt: GPT
    rounding: Rounding | None = None

    @torch.inference_mode()
    def __call__(self, sequences: Sequence[list[int]], _: Sequence[int] = ()) -> list[Scores]:
        device, lengths = self.gpt.lm_head.weight.device, [len(ids) for ids in sequences]
        tokens = torch.tensor([token for ids in sequences for token in ids], device=device)
        with evaluating(self.gpt), in_float32(self.gpt, self.rounding):
            hidden = self.gpt(tokens, lengths)
            pairs = zip(torch.split(hidden[:-1], ROWS), torch.split(tokens[1:], ROWS), strict=True)
            scored = [log_probs(self.gpt.logits(rows), following) for rows, following in pairs]
        flat = torch.cat([*scored, tokens.new_zeros(1).float()])
        return [own[:-1].tolist() for own in torch.split(flat, lengths)]

    def continued(self, prompts: Sequence[Sequence[int]], count: int) -> list[list[int]]:
        """Return `count` tokens of greedy decoding after each prompt, end tokens included."""
        requests, together = [Request(prompt, count) for prompt in prompts], len(prompts)
        with in_float32(self.gpt, self.rounding):
            options: Any = {"stop_ids": (), "batch_size": together, "dtype": torch.float32}
            found = dict(complete_all(self.gpt, requests, Sampler(), **options))
        return [found[number] for number in range(together)]


def log_probs(logits: Tensor, tokens: Tensor) -> Tensor:
    """Return the log-probability (T,) of each token, given the logits (T, vocab) at its position."""
    return logits.float().log_softmax(dim=-1).gather(1, tokens[:, None])[:, 0]


@contextmanager
def in_float32(gpt: GPT, rounding: Rounding | None = None) -> Iterator[None]:
    """Compute with float32 copies of a model's weights: one block has them at a time, so that memory stays small."""
    others = (module for name, module in gpt.model.named_children() if name != "layers")
    parts = [*gpt.model.layers, *others, gpt.lm_head]
    casts = [_Cast(part, rounding, number) for number, part in enumerate(parts)]
    handles = [part.register_forward_pre_hook(cast.before) for part, cast in zip(parts, casts, strict=True)]
    handles += [
        part.register_forward_hook(cast.after, always_call=True) for part, cast in zip(parts, casts, strict=True)
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


class _Cast:
    """The float32 copies of the weights of a module, while it computes."""

    def __init__(self, part: nn.Module, rounding: Rounding | None, number: int) -> None:
        self.part, self.rounding, self.number = part, rounding, number
        self.stored: list[tuple[nn.Parameter, Tensor]] = []

    def before(self, *_: Any) -> None:
        for parameter in self.part.parameters():
            if parameter.is_floating_point():
                self.stored.append((parameter, parameter.data))
                parameter.data = parameter.data.float()
        if self.rounding is not None:
            self.rounding.apply(self.part, self.number)

    def after(self, *_: Any) -> None:
        if self.rounding is not None:
            self.rounding.undo(self.part)
        for parameter, data in self.stored:
            parameter.data = data
        self.stored.clear()
