"""Print what several GPUs send and compute in a step, and from which global batch on they are used by nine tenths.

The bytes follow from the shapes as they are sent; the rates are stated here, not measured.
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
from litlora.train.memory_estimate import Network, weight_bytes

TOKENS = 200  # of an example
FLOPS = 400e12  # a second, that a GPU sustains in bfloat16
NVLINK = 450e9  # bytes a second in each direction, from GPU to GPU
HOP = 10e-6  # seconds that a message takes from GPU to GPU beside those of its bytes
MESSAGES = 2  # in a step: the sum of the gradients, and whether to stop
USED = 0.9
ADAPTERS = {
    "query, value": TARGET_MODULES["query"] + TARGET_MODULES["value"],
    "all six": tuple(name for names in TARGET_MODULES.values() for name in names),
}
COLUMNS = ("base", "adapter", "example, ms")


@dataclass(frozen=True)
class Cluster:
    """Machines of eight GPUs, and the bytes a second that each machine sends to the others."""

    name: str
    machines: int
    network: float

    @property
    def gpus(self) -> int:
        return 8 * self.machines

    def sending(self, size: float, hops: int) -> float:
        """Return the seconds in which every GPU sends so many bytes around the ring of all."""
        return size / (NVLINK if self.machines == 1 else min(NVLINK, self.network)) + hops * HOP


CLUSTERS = (
    Cluster("8 GPUs", 1, math.inf),
    Cluster("32, fast", 4, 8 * 400e9 / 8),  # 400 Gbit/s for each GPU
    Cluster("32, slow", 4, 25e9 / 8),  # 25 Gbit/s for each machine
)


@dataclass(frozen=True)
class Training:
    """A model with its adapter: the base whole on every GPU, or in equal parts on all."""

    name: str
    base: str
    adapter: str
    is_shared: bool = False

    @cached_property
    def model(self) -> GPT:
        lora = LoRAConfig(8, 16, 0.05, ADAPTERS[self.adapter])
        return Network(config(self.name), lora, "bf16-true", BASES[self.base], torch.device("cuda")).outline()

    @property
    def trained(self) -> int:
        """How many weights the adapter has."""
        return count(self.model, trainable=True)

    @property
    def example(self) -> float:
        """The seconds that a GPU computes for an example.

        A frozen weight is multiplied with each token once forward and once back, a trained one twice back.
        """
        frozen = count(self.model, trainable=False) - self.model.model.embed_tokens.weight.numel()
        return TOKENS * (4 * frozen + 6 * self.trained) / FLOPS

    def gradients(self, gpus: int) -> float:
        """Return the bytes that every GPU sends in a step for the sum of the adapter's gradients."""
        return 4 * self.trained * 2 * (gpus - 1) / gpus

    def weights(self, gpus: int) -> float:
        """Return the bytes that every GPU sends in a micro-batch, to gather the base forward and again back."""
        size = sum(weight_bytes(self.model, BASES[self.base]).values()) if self.is_shared else 0
        return 2 * size * (gpus - 1) / gpus


TRAININGS = (
    *(Training(f"{size} (Llama 2)", base, adapter) for (size, base), adapter in product(
        (("7B", "bfloat16"), ("70B", "NF4")), ADAPTERS)),
    *(Training("70B (Llama 2)", base, "query, value", is_shared=True) for base in ("NF4", "bfloat16")),
)  # fmt: skip


def sending(training: Training, cluster: Cluster) -> tuple[float, float]:
    """Return the seconds in which a step's gradients, and the base for a micro-batch, are sent."""
    gradients = cluster.sending(training.gradients(cluster.gpus), MESSAGES * 2 * (cluster.gpus - 1))
    return gradients, cluster.sending(training.weights(cluster.gpus), 0)


def used(training: Training, cluster: Cluster, share: int) -> float:
    """Return which part of a step is computing, with so many examples in one micro-batch on each GPU.

    The base is gathered while it computes, as far as that takes as long; the gradients are sent after it.
    """
    gradients, gathering = sending(training, cluster)
    computing = share * training.example
    return computing / (max(computing, gathering) + gradients)


def enough(training: Training, cluster: Cluster) -> int:
    """Return the least global batch with which computing takes nine tenths of a step."""
    gradients, gathering = sending(training, cluster)
    computing = max(USED * (gathering + gradients), USED / (1 - USED) * gradients)
    return cluster.gpus * math.ceil(computing / training.example)


def rows() -> Iterator[tuple[str, ...]]:
    for training in TRAININGS:
        name = f"{training.name.split()[0]}, {training.base}{', fsdp' if training.is_shared else ''}"
        cells = [name, training.adapter, f"{1e3 * training.example:.0f}"]
        for cluster in CLUSTERS:
            sent = (training.gradients(cluster.gpus) + training.weights(cluster.gpus)) / 1e6
            cells += [
                f"{sent:,.0f}",
                f"{1e3 * sum(sending(training, cluster)):,.1f}",
                f"{enough(training, cluster):,}",
            ]
        yield tuple(cells)


def main() -> None:
    columns = [*COLUMNS, *(column for cluster in CLUSTERS for column in (f"{cluster.name}: sent, MB", "ms", "batch"))]
    print_table(columns, rows())


if __name__ == "__main__":
    main()
