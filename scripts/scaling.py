"""Estimate communication and computation of a step on several GPUs, and the global batch for 90 % utilization.

The bytes are computed from the shapes; the rates are assumptions stated here, not measurements.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from itertools import product

import torch
from memory_table import BASES, config, print_table

from litlora.lora.config import TARGET_MODULES, LoRAConfig
from litlora.lora.layer import count
from litlora.models.transformer import GPT
from litlora.train.memory_estimate import weight_bytes
from litlora.train.network_shape import Network

TOKENS = 200  # per example
FLOPS = 400e12  # per second, sustained by a GPU in bfloat16
NVLINK = 450e9  # bytes per second and direction between GPUs
HOP = 10e-6  # latency of a message between GPUs, in seconds
MESSAGES = 2  # all-reduces per step: the gradients, and whether to stop
UTILIZATION = 0.9
ADAPTERS = {
    "query, value": TARGET_MODULES["query"] + TARGET_MODULES["value"],
    "all six": tuple(name for names in TARGET_MODULES.values() for name in names),
}
COLUMNS = ("base", "adapter", "example, ms")


@dataclass(frozen=True)
class Cluster:
    """Machines of eight GPUs, and the network bandwidth of each machine in bytes per second."""

    name: str
    machines: int
    network: float

    @property
    def gpus(self) -> int:
        return 8 * self.machines

    def send_seconds(self, size: float, hops: int) -> float:
        """Return the seconds in which every GPU sends `size` bytes around the ring of all GPUs."""
        return size / (NVLINK if self.machines == 1 else min(NVLINK, self.network)) + hops * HOP


CLUSTERS = (
    Cluster("8 GPUs", 1, math.inf),
    Cluster("32, fast", 4, 8 * 400e9 / 8),  # 400 Gbit/s for each GPU
    Cluster("32, slow", 4, 25e9 / 8),  # 25 Gbit/s for each machine
)


@dataclass(frozen=True)
class Training:
    """A model with its adapter; the base is replicated on every GPU or sharded across all."""

    name: str
    base: str
    adapter: str
    is_sharded: bool = False

    @cached_property
    def model(self) -> GPT:
        lora = LoRAConfig(8, 16, 0.05, ADAPTERS[self.adapter])
        return Network(config(self.name), lora, "bf16-true", BASES[self.base], torch.device("cuda")).outline()

    @property
    def trained(self) -> int:
        """The number of parameters of the adapter."""
        return count(self.model, trainable=True)

    @property
    def example(self) -> float:
        """The seconds that a GPU computes per example.

        A frozen weight takes one matmul in the forward and one in the backward pass, a trained one two in the backward.
        """
        frozen = count(self.model, trainable=False) - self.model.model.embed_tokens.weight.numel()
        return TOKENS * (4 * frozen + 6 * self.trained) / FLOPS

    def gradients(self, gpus: int) -> float:
        """Return the bytes that every GPU sends per step to all-reduce the adapter's gradients."""
        return 4 * self.trained * 2 * (gpus - 1) / gpus

    def weights(self, gpus: int) -> float:
        """Return the bytes that every GPU sends per micro-batch to all-gather the base, forward and backward."""
        size = sum(weight_bytes(self.model, BASES[self.base]).values()) if self.is_sharded else 0
        return 2 * size * (gpus - 1) / gpus


TRAININGS = (
    *(Training(f"{size} (Llama 2)", base, adapter) for (size, base), adapter in product(
        (("7B", "bfloat16"), ("70B", "NF4")), ADAPTERS)),
    *(Training("70B (Llama 2)", base, "query, value", is_sharded=True) for base in ("NF4", "bfloat16")),
)  # fmt: skip


def send_seconds(training: Training, cluster: Cluster) -> tuple[float, float]:
    """Return the seconds of the gradients' all-reduce per step, and of the base's all-gather per micro-batch."""
    gradients = cluster.send_seconds(training.gradients(cluster.gpus), MESSAGES * 2 * (cluster.gpus - 1))
    return gradients, cluster.send_seconds(training.weights(cluster.gpus), 0)


def utilization(training: Training, cluster: Cluster, share: int) -> float:
    """Return the share of a step that computes, with one micro-batch of `share` examples on each GPU.

    Gathering the base overlaps with computation; the gradients are sent afterwards.
    """
    gradients, gathering = send_seconds(training, cluster)
    computing = share * training.example
    return computing / (max(computing, gathering) + gradients)


def sufficient_batch(training: Training, cluster: Cluster) -> int:
    """Return the smallest global batch that reaches the utilization."""
    gradients, gathering = send_seconds(training, cluster)
    computing = max(UTILIZATION * (gathering + gradients), UTILIZATION / (1 - UTILIZATION) * gradients)
    return cluster.gpus * math.ceil(computing / training.example)


def rows() -> Iterator[tuple[str, ...]]:
    for training in TRAININGS:
        name = f"{training.name.split()[0]}, {training.base}{', fsdp' if training.is_sharded else ''}"
        cells = [name, training.adapter, f"{1e3 * training.example:.0f}"]
        for cluster in CLUSTERS:
            sent = (training.gradients(cluster.gpus) + training.weights(cluster.gpus)) / 1e6
            cells += [
                f"{sent:,.0f}",
                f"{1e3 * sum(send_seconds(training, cluster)):,.1f}",
                f"{sufficient_batch(training, cluster):,}",
            ]
        yield tuple(cells)


def main() -> None:
    columns = [*COLUMNS, *(column for cluster in CLUSTERS for column in (f"{cluster.name}: sent, MB", "ms", "batch"))]
    print_table(columns, rows())


if __name__ == "__main__":
    main()
