"""GPT: embedding, rotary positions, attention with a KV cache, gated MLP, RMSNorm.

Module names are those of the checkpoint, so its tensors load without renaming. Tokens come as one row in which the
sequences lie end to end: there is no batch dimension, and nothing is padded.
"""

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from litlora.config import GPTConfig, Llama3Scaling
from litlora.linear import Linear, has_slow_products

Rope = tuple[Tensor, Tensor]


class KVCache:
    """Keys and values of the tokens seen so far, of one sequence, in memory that is allocated once."""

    def __init__(self, config: GPTConfig, max_length: int, dtype: torch.dtype, device: torch.device) -> None:
        shape = (config.num_hidden_layers, 2, config.num_key_value_heads, max_length, config.head_dim)
        self.store = torch.empty(shape, dtype=dtype, device=device)
        self.length = 0

    def extend(self, layer: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Append k and v (n_kv, T, head_dim) to what is there and return all of it, (n_kv, length + T, head_dim)."""
        end = self.length + k.shape[1]
        keys, values = self.store[layer, 0], self.store[layer, 1]
        keys[:, self.length : end] = k
        values[:, self.length : end] = v
        return keys[:, :end], values[:, :end]


class Attention(nn.Module):
    def __init__(self, config: GPTConfig, layer: int) -> None:
        super().__init__()
        self.layer = layer
        self.head_dim = config.head_dim
        self.window = config.sliding_window
        width, kv_width = (n * config.head_dim for n in (config.num_attention_heads, config.num_key_value_heads))
        self.q_proj = Linear(config.hidden_size, width, bias=False)
        self.k_proj = Linear(config.hidden_size, kv_width, bias=False)
        self.v_proj = Linear(config.hidden_size, kv_width, bias=False)
        self.o_proj = Linear(width, config.hidden_size, bias=False)

    def forward(self, x: Tensor, lengths: Sequence[int], rope: Rope, cache: KVCache | None) -> Tensor:
        q, k, v = (self._heads(proj(x)) for proj in (self.q_proj, self.k_proj, self.v_proj))
        q, k = rotate(q, rope), rotate(k, rope)
        if cache is None:
            parts = zip(*(torch.split(t, list(lengths), dim=1) for t in (q, k, v)), strict=True)
            y = torch.cat([attend(*part, window=self.window) for part in parts], dim=1)
        else:
            y = attend(q, *cache.extend(self.layer, k, v), window=self.window)
        out: Tensor = self.o_proj(y.transpose(0, 1).flatten(1))  # (T, hidden)
        return out

    def _heads(self, x: Tensor) -> Tensor:
        return x.view(len(x), -1, self.head_dim).transpose(0, 1)  # (heads, T, head_dim)


def attend(q: Tensor, k: Tensor, v: Tensor, *, window: int | None) -> Tensor:
    """Causal attention of the last T positions of a sequence of S.

    q is (n_head, T, head_dim), k and v are (n_kv, S, head_dim); a query sees its own position and, with a window,
    the window - 1 before it. Returns (n_head, T, head_dim).
    """
    if has_slow_products(q):
        return attend(q.float(), k.float(), v.float(), window=window).to(q.dtype)
    T, S = q.shape[1], k.shape[1]
    if window is not None and S > T + window - 1:
        first = S - (T + window - 1)  # no query sees what lies before
        k, v, S = k[:, first:], v[:, first:], T + window - 1
    masked = T > 1 and (S > T or (window is not None and T > window))
    mask = visible(T, S, window, q.device) if masked else None
    causal = T > 1 and mask is None
    y = F.scaled_dot_product_attention(q[None], k[None], v[None], mask, is_causal=causal, enable_gqa=True)
    return y[0]


def visible(T: int, S: int, window: int | None, device: torch.device) -> Tensor:
    """Which of S positions each of the last T sees, as a boolean mask (T, S)."""
    ones = torch.ones(T, S, dtype=torch.bool, device=device)
    mask = ones.tril(S - T)
    return mask if window is None else mask & ones.triu(S - T - window + 1)


class MLP(nn.Module):
    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        self.gate_proj = Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.up_proj = Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.down_proj = Linear(config.intermediate_size, config.hidden_size, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))
        return out


class Block(nn.Module):
    def __init__(self, config: GPTConfig, layer: int) -> None:
        super().__init__()
        self.input_layernorm = nn.RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.self_attn = Attention(config, layer)
        self.post_attention_layernorm = nn.RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.mlp = MLP(config)

    def forward(self, x: Tensor, lengths: Sequence[int], rope: Rope, cache: KVCache | None) -> Tensor:
        x = x + self.self_attn(self.input_layernorm(x), lengths, rope, cache)
        out: Tensor = x + self.mlp(self.post_attention_layernorm(x))
        return out


class Decoder(nn.Module):
    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(Block(config, layer) for layer in range(config.num_hidden_layers))
        self.norm = nn.RMSNorm(config.hidden_size, config.rms_norm_eps)
        # Not part of the checkpoint, hence computed for real even where the model is built on the meta device.
        self.register_buffer("inv_freq", inverse_frequencies(config), persistent=False)
        self.inv_freq: Tensor

    def forward(self, tokens: Tensor, lengths: Sequence[int], cache: KVCache | None) -> Tensor:
        x = self.embed_tokens(tokens)  # (T, hidden)
        start = cache.length if cache else 0
        positions = torch.cat([torch.arange(start, start + n, device=tokens.device) for n in lengths])
        angles = positions[:, None] * self.inv_freq  # (T, head_dim / 2)
        rope = angles.cos().to(x.dtype), angles.sin().to(x.dtype)
        for layer in self.layers:
            x = layer(x, lengths, rope, cache)
        if cache:
            cache.length += len(tokens)
        out: Tensor = self.norm(x)
        return out


class GPT(nn.Module):
    """A Llama-style decoder (Touvron et al. 2023) and its output head."""

    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        self.config = config
        self.model = Decoder(config)
        self.lm_head = Linear(config.hidden_size, config.vocab_size, bias=False)
        if config.tie_word_embeddings:
            self.lm_head.weight = self.model.embed_tokens.weight

    def forward(self, tokens: Tensor, lengths: Sequence[int], cache: KVCache | None = None) -> Tensor:
        """Return the hidden states (T, hidden) that `lm_head` turns into logits.

        tokens (T,) holds sequences of the given lengths end to end; none sees another, and each starts at position 0.
        With a cache there is one sequence, and it goes on where the cache ends.
        """
        out: Tensor = self.model(tokens, lengths, cache)
        return out


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Switch dropout off inside the block, and back to what it was after it."""
    training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(training)


def rotate(x: Tensor, rope: Rope) -> Tensor:
    """Turn each pair (i, i + head_dim / 2) of x (heads, T, head_dim) by its angle (Su et al. 2021, eq. 34)."""
    cos, sin = rope  # (T, head_dim / 2)
    a, b = x.chunk(2, dim=-1)
    return torch.cat((a * cos - b * sin, b * cos + a * sin), dim=-1)


def inverse_frequencies(config: GPTConfig) -> Tensor:
    """Angle per position of each rotary pair, as float32 (head_dim / 2,)."""
    exponents = torch.arange(0, config.head_dim, 2, dtype=torch.float32, device="cpu") / config.head_dim
    inv_freq = 1.0 / config.rope_theta**exponents
    return inv_freq if config.rope_scaling is None else stretch(inv_freq, config.rope_scaling)


def stretch(inv_freq: Tensor, scaling: Llama3Scaling) -> Tensor:
    """Stretch the long wavelengths as Llama 3.1 does: short ones stay, long ones grow by factor, smooth between."""
    turns = scaling.original_max_position_embeddings * inv_freq / (2 * math.pi)
    low, high = scaling.low_freq_factor, scaling.high_freq_factor
    keep = ((turns - low) / (high - low)).clamp(0, 1)
    return inv_freq * (keep + (1 - keep) / scaling.factor)
