"""Cross-entropy at supervised positions only, in chunks, without keeping logits."""

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from litlora.nn.activation import softcap
from litlora.nn.backend import backend

IGNORE_INDEX = -100
CHUNK = 256
"""Rows of logits that exist at one time: enough for an efficient product."""


def supervised_loss(hidden: Tensor, head: nn.Module, labels: Tensor, cap: float | None = None) -> Tensor:
    """Return the sum of the cross-entropies at the supervised positions, a float32 scalar.

    hidden is (T, hidden), labels (T,) holds the id of the next token, or IGNORE_INDEX where none is supervised; with a
    cap, logits are soft-capped. Labels are best on the host, which else waits for the device to count them.
    The gradients are computed along the way, chunk by chunk, so memory does not grow with T x vocabulary.
    """
    supervised = torch.nonzero(labels != IGNORE_INDEX).flatten()
    supervised, labels = backend(hidden.device).to_device((supervised, labels[supervised]), hidden.device)
    hidden = hidden.index_select(0, supervised)
    if not torch.is_grad_enabled():
        return _summed(hidden, labels, head, cap)
    trainable = [p for p in head.parameters() if p.requires_grad]
    loss: Tensor = _ChunkedLoss.apply(hidden, labels, head, cap, *trainable)  # type: ignore[no-untyped-call]
    return loss


def _summed(hidden: Tensor, labels: Tensor, head: nn.Module, cap: float | None) -> Tensor:
    chunks = zip(torch.split(hidden, CHUNK), torch.split(labels, CHUNK), strict=True)
    return torch.stack([_loss_and_gradient(_logits(rows, head, cap), those)[0] for rows, those in chunks]).sum()


def _logits(hidden: Tensor, head: nn.Module, cap: float | None) -> Tensor:
    """Return the head's outputs for a chunk, which is padded where each number of rows would cost memory."""
    more = -len(hidden) % backend(hidden.device).pad_multiple(len(hidden), hidden.dtype)
    logits: Tensor = head(F.pad(hidden, (0, 0, 0, more)))[: len(hidden)] if more else head(hidden)
    return softcap(logits, cap)


@torch.no_grad()
def _loss_and_gradient(logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Return the sum of the cross-entropies and its gradient, which overwrites the logits."""
    logits = logits.detach()
    rows = backend(logits.device).scored_rows(*logits.shape)
    parts = zip(torch.split(logits, rows), torch.split(labels, rows), strict=True)
    return torch.stack([_loss_of(*part) for part in parts]).sum(), logits


def _loss_of(logits: Tensor, labels: Tensor) -> Tensor:
    """Return the sum of the cross-entropies of logits, which are overwritten by its gradient."""
    scores, picked = logits.float(), (torch.arange(len(labels), device=labels.device), labels)
    short_of_highest = scores.amax(dim=-1) - scores[picked]
    torch.softmax(scores, dim=-1, out=scores)
    loss = (short_of_highest - scores.amax(dim=-1).log()).sum()  # the highest probability is 1 / sum(exp(x - highest))
    scores[picked] -= 1
    logits.copy_(scores)  # to itself, in float32
    return loss


def _chunk_gradients(
    hidden: Tensor, labels: Tensor, head: nn.Module, cap: float | None, sources: Sequence[Tensor]
) -> tuple[Tensor, list[Tensor]]:
    """Return the loss of a chunk, and the gradients of its sources; its logits are gone before the next has any."""
    with torch.enable_grad():
        logits = _logits(hidden, head, cap)
    loss, logits_gradient = _loss_and_gradient(logits, labels)
    return loss, list(torch.autograd.grad(logits, sources, logits_gradient))


class _ChunkedLoss(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, labels: Tensor, head: nn.Module, cap: float | None, *trainable: nn.Parameter
    ) -> Tensor:
        hidden_gradient = torch.empty_like(hidden) if ctx.needs_input_grad[0] else None
        gradients = [torch.zeros_like(p) for p in trainable]
        total = torch.zeros((), dtype=torch.float32, device=hidden.device)
        for start in range(0, len(hidden), CHUNK):
            rows = slice(start, start + CHUNK)
            chunk = hidden[rows].detach().requires_grad_(hidden_gradient is not None)
            sources = [chunk, *trainable] if hidden_gradient is not None else list(trainable)
            loss, chunk_gradients = _chunk_gradients(chunk, labels[rows], head, cap, sources)
            total += loss
            if hidden_gradient is not None:
                hidden_gradient[rows] = chunk_gradients.pop(0)
            for gradient, part in zip(gradients, chunk_gradients, strict=True):
                gradient += part
        ctx.save_for_backward(hidden_gradient, *gradients)
        return total

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, scale: Tensor) -> tuple[Tensor | None, ...]:
        hidden_gradient, *gradients = ctx.saved_tensors
        scaled = None if hidden_gradient is None else hidden_gradient * scale.to(hidden_gradient.dtype)
        return (scaled, None, None, None, *(g * scale for g in gradients))
