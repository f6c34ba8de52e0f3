"""What decides the memory of a run: the shape of its network, and its longest micro-batch."""

from dataclasses import dataclass
from functools import cached_property
from itertools import zip_longest
from typing import Self

import torch

from litlora.args.finetune import FinetuneLoraArgs, Precision
from litlora.lora.config import LoRAConfig
from litlora.lora.layer import LoRALinear, add_lora, lora_layers
from litlora.models.checkpoint import Checkpoint
from litlora.models.config import GPTConfig
from litlora.models.transformer import GPT
from litlora.nn.attention_spec import AttentionSpec
from litlora.nn.backend import backend, compute_dtype
from litlora.nn.backend_interface import FLOAT32, AttentionShape, Backend, Span

BFLOAT16 = 2  # bytes


@dataclass(frozen=True)
class Network:
    """The shape of a model with its adapter, and the precision in which it is trained."""

    config: GPTConfig
    lora: LoRAConfig
    precision: Precision
    quantize: str | None
    """bnb.nf4, bnb.nf4-dq, gguf, or None for a base in the run's precision."""
    device: torch.device
    shards: int = 1
    """Number of devices over which the base is sharded."""
    quantized_bytes: int | None = None
    """Bytes of the blocks' linear layers in a GGUF file."""

    @classmethod
    def of(cls, args: FinetuneLoraArgs, checkpoint: Checkpoint, lora: LoRAConfig, device: torch.device) -> Self:
        """Describe what a run trains."""
        size = checkpoint.quantized_bytes
        return cls(checkpoint.config, lora, args.precision, args.storage, device, quantized_bytes=size)

    def outline(self) -> GPT:
        """Build the model with its adapter, without a single value."""
        dtype = torch.bfloat16 if self.stream == BFLOAT16 else torch.float32
        with torch.device("meta"):
            gpt = GPT(self.config).to(dtype)
            add_lora(gpt, self.lora)
        return gpt

    @cached_property
    def adapted(self) -> dict[str, LoRALinear]:
        """The adapter layers by name."""
        return lora_layers(self.outline())

    @property
    def stream(self) -> int:
        """Bytes of a value of the residual stream, and of a weight that is not quantized."""
        return BFLOAT16 if self.precision == "bf16-true" else FLOAT32

    @property
    def dtype(self) -> torch.dtype:
        """Of a value that a linear layer of a block returns."""
        return compute_dtype(self.precision)

    @property
    def product(self) -> int:
        """Bytes of such a value."""
        return self.dtype.itemsize

    @property
    def upcasts(self) -> bool:
        """Tell whether the products of the blocks are of bfloat16 and computed in float32."""
        return self.backend.matmul_dtype(self.dtype) is not self.dtype

    @property
    def backend(self) -> Backend:
        return backend(self.device)

    def attention(self, spec: AttentionSpec) -> AttentionShape:
        config = self.config
        return AttentionShape(config.num_attention_heads, config.num_key_value_heads, config.head_dim, spec)


@dataclass(frozen=True)
class Load:
    """The longest micro-batch of a run, and what its forward pass saves."""

    lengths: tuple[int, ...]
    supervised: int
    """Number of supervised tokens."""
    activation_checkpointing: bool = False
    shared: tuple[int, ...] = ()
    """Number of keys that each sequence shares with the one before it, as in a MicroBatch."""
    concurrent: int = 1
    """Number of such micro-batches that are computed concurrently."""

    @property
    def longest(self) -> int:
        """Largest number of keys that a query sees."""
        return max(map(sum, self.spans))

    @property
    def spans(self) -> tuple[Span, ...]:
        """Numbers of keys that each sequence shares, and has for itself."""
        return tuple(zip_longest(self.shared, self.lengths, fillvalue=0))

    @property
    def tokens(self) -> int:
        return sum(self.lengths)
