"""GPT: embedding, rotary positions, attention with a KV cache, gated MLP, RMSNorm.

Module names are those of a Llama checkpoint of the Hub; families.py maps others to them. Tokens come as one packed
sequence: there is no batch dimension.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import repeat, zip_longest

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from litlora.models.config import GPTConfig
from litlora.models.kv_cache import KVCache
from litlora.models.rope_scaling import inverse_frequencies
from litlora.nn.attention import attend
from litlora.nn.backend import Span, backend
from litlora.nn.dropout import drawn_again
from litlora.nn.linear import Joint, Linear
from litlora.nn.norm import RMSNorm
from litlora.nn.rope import Rope, rotate, turns
from litlora.nn.swiglu import swiglu


class Attention(nn.Module):
    def __init__(self, config: GPTConfig, layer: int) -> None:
        super().__init__()
        self.head_dim = config.head_dim
        self.window = config.window(layer)
        bias = config.qkv_bias
        width, kv_width = (n * config.head_dim for n in (config.num_attention_heads, config.num_key_value_heads))
        self.q_proj = Linear(config.hidden_size, width, bias=bias)
        self.k_proj = Linear(config.hidden_size, kv_width, bias=bias)
        self.v_proj = Linear(config.hidden_size, kv_width, bias=bias)
        self.o_proj = Linear(width, config.hidden_size, bias=config.o_bias)
        self.joint: Joint | None = None

    def join(self) -> None:
        """Join the three projections of one input in one product."""
        self.joint = Joint(self.q_proj, self.k_proj, self.v_proj)

    def forward(self, x: Tensor, spans: Sequence[Span], rope: Rope, past: Tensor | None) -> Tensor:
        projected = self.joint(x) if self.joint else (self.q_proj(x), self.k_proj(x), self.v_proj(x))
        q, k, v = (t.view(len(t), -1, self.head_dim) for t in projected)
        q, k = rotate(q, rope), rotate(k, rope)  # (T, heads, head_dim)
        if past is None:
            y = backend(q.device).varlen_attention(q, k, v, spans, self.window)
        else:
            past[:, :, -len(k) :] = torch.stack((k, v)).transpose(1, 2)  # (2, n_kv, T, head_dim)
            y = attend(q.transpose(0, 1), *past, window=self.window).transpose(0, 1)
        out: Tensor = self.o_proj(y.flatten(1))  # (T, hidden)
        return out


class MLP(nn.Module):
    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        self.gate_proj = Linear(config.hidden_size, config.intermediate_size, bias=config.mlp_bias)
        self.up_proj = Linear(config.hidden_size, config.intermediate_size, bias=config.mlp_bias)
        self.down_proj = Linear(config.intermediate_size, config.hidden_size, bias=config.mlp_bias)
        self.joint: Joint | None = None

    def join(self) -> None:
        """Join the two projections of one input in one product."""
        self.joint = Joint(self.gate_proj, self.up_proj)

    def forward(self, x: Tensor) -> Tensor:
        gate, up = self.joint(x) if self.joint else (self.gate_proj(x), self.up_proj(x))
        out: Tensor = self.down_proj(swiglu(gate, up))
        return out


class Block(nn.Module):
    def __init__(self, config: GPTConfig, layer: int) -> None:
        super().__init__()
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.self_attn = Attention(config, layer)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.mlp = MLP(config)

    def forward(self, x: Tensor, spans: Sequence[Span], rope: Rope, past: Tensor | None) -> Tensor:
        x = x + self.self_attn(self.input_layernorm(x), spans, rope, past)
        out: Tensor = x + self.mlp(self.post_attention_layernorm(x))
        return out


class Embedding(nn.Embedding):
    def reset_parameters(self) -> None:
        """Initialize the weights unless they are on the meta device, where torch would import its compiler for that."""
        if not self.weight.is_meta:
            super().reset_parameters()


class Decoder(nn.Module):
    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        self.embed_tokens = Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(Block(config, layer) for layer in range(config.num_hidden_layers))
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.activation_checkpointing = False  # whether backward recomputes the activations inside of blocks
        # Not part of the checkpoint, hence computed even where the model is built on the meta device.
        self.register_buffer("inv_freq", inverse_frequencies(config), persistent=False)
        self.inv_freq: Tensor

    def forward(self, tokens: Tensor, spans: Sequence[Span], cache: KVCache | None) -> Tensor:
        x = self.embed_tokens(tokens)  # (T, hidden)
        start = cache.length if cache else 0
        positions = torch.cat(
            [torch.arange(start + shared, start + shared + own, device=tokens.device) for shared, own in spans]
        )
        rope = turns(positions[:, None] * self.inv_freq, x.dtype)
        for layer, past in zip(self.layers, cache.grow(len(tokens)) if cache else repeat(None), strict=False):
            if self.activation_checkpointing and torch.is_grad_enabled():
                x = checkpoint(
                    layer, x, spans, rope, past,
                    use_reentrant=False, preserve_rng_state=False, context_fn=drawn_again,
                )  # fmt: skip
            else:
                x = layer(x, spans, rope, past)
        out: Tensor = self.norm(x)
        return out


class GPT(nn.Module):
    """A Llama-style decoder (Touvron et al. 2023) and its output head."""

    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        self.config = config
        self.model = Decoder(config)
        self.lm_head = Linear(config.hidden_size, config.vocab_size, bias=False)
        self.is_compiled = False  # whether the blocks and the head are compiled, for decoding
        if config.tie_word_embeddings:
            self.lm_head.weight = self.model.embed_tokens.weight

    def forward(
        self, tokens: Tensor, lengths: Sequence[int], cache: KVCache | None = None, shared: Sequence[int] = ()
    ) -> Tensor:
        """Return the hidden states (T, hidden) that `lm_head` turns into logits.

        tokens (T,) holds packed sequences of the given lengths. Each attends to itself alone, from position 0, or
        also to the first `shared` tokens that the sequence before it attends to, from the position after them. With a
        cache there is one sequence, which continues where the cache ends.
        """
        spans = tuple(zip_longest(shared, lengths, fillvalue=0))
        out: Tensor = self.model(tokens, spans, cache)
        return out


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Switch to evaluation mode inside the block, and back to the previous mode after it."""
    training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(training)
