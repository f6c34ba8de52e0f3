"""The KV cache of one sequence."""

import torch
from torch import Tensor

from litlora.models.config import GPTConfig


class KVCache:
    """Keys and values of the tokens of one sequence, in memory that is allocated once."""

    def __init__(self, config: GPTConfig, max_length: int, dtype: torch.dtype, device: torch.device) -> None:
        shape = (config.num_hidden_layers, 2, config.num_key_value_heads, max_length, config.head_dim)
        self.store = torch.empty(shape, dtype=dtype, device=device)
        self.windows: list[int | None] = [spec.window for spec in config.attention_specs]
        self.length = 0

    def grow(self, count: int) -> list[Tensor]:
        """Extend the cache by `count` positions, and return the keys and values that these see in each layer.

        They are a tensor (2, n_kv, seen, head_dim), whose last `count` positions the layer writes. Were they cut within
        the layer, its code would be compiled twice: for less than a window, and for more.
        """
        self.length += count
        firsts = (0 if window is None else max(0, self.length - count - window + 1) for window in self.windows)
        return [layer[:, :, first : self.length] for layer, first in zip(self.store, firsts, strict=True)]
