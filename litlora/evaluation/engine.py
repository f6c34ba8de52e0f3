"""A model with what it computes on, and its loss."""

from dataclasses import dataclass

import torch
from lightning_fabric import Fabric
from torch import Tensor

from litlora.args.finetune import Precision
from litlora.data.batching import MicroBatch, optimize_layout
from litlora.distributed.process_group import Ranks
from litlora.models.transformer import GPT
from litlora.nn.backend import backend, compute_dtype
from litlora.nn.backend_interface import WorkerThreads
from litlora.nn.dropout import drawing_from
from litlora.nn.loss import supervised_loss


@dataclass(frozen=True)
class Engine:
    """A model, and the device, precision, worker threads and ranks that compute its loss."""

    gpt: GPT
    fabric: Fabric
    precision: Precision
    workers: WorkerThreads
    ranks: Ranks

    def summed_loss(self, micro: MicroBatch) -> Tensor:
        """Return the sum of the losses of a micro-batch's supervised tokens; training and validation share it."""
        dtype, regimes = compute_dtype(self.precision), self.gpt.config.rope_regimes
        device = self.fabric.device
        micro = optimize_layout(micro, backend(device), dtype, regimes)
        (tokens,) = backend(device).to_device((micro.tokens,), device)
        with self.fabric.autocast(), drawing_from(torch.Generator().manual_seed(micro.seed)):
            hidden = self.gpt(tokens, micro.lengths, shared=micro.shared)
            return supervised_loss(hidden, self.gpt.lm_head, micro.labels, self.gpt.config.logit_softcap)
