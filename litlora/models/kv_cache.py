"""The KV cache of one sequence."""

import torch
from torch import Tensor

from litlora.models.config import GPTConfig


class KVCache:
    """Keys and values of the tokens of one sequence, in memory that is allocated once."""

    def __init__(self, config: GPTConfig, max_length: int, dtype: torch.dtype, device: torch.device) -> None:
        shape = (config.num_hidden_layers, 2, config.num_key_value_heads, max_length, config.head_dim)
        self.store = torch.empty(shape, dtype=dtype, device=device)
        self.length = 0

    def grow(self, count: int) -> tuple[Tensor, ...]:
        """Extend the cache by `count` positions, and return the keys and values of each layer.

        They are a tensor (2, n_kv, length + count, head_dim), whose last `count` positions the layer writes.
        """
        self.length += count
        return self.store[:, :, :, : self.length].unbind()
