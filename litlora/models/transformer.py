"""GPT: embedding, attention with a KV cache, MLP and norms, as the flags of a GPTConfig say.

Module names are those of a Llama checkpoint of the Hub; families.py has the others. Tokens come as one packed sequence:
there is no batch dimension.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import repeat, zip_longest

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from litlora.models.config import GPTConfig
from litlora.models.kv_cache import Cache, Slots
from litlora.models.rope_scaling import RopeTables
from litlora.nn.activation import ACTIVATIONS, gated, softcap
from litlora.nn.attention import attend
from litlora.nn.backend import backend
from litlora.nn.backend_interface import Span
from litlora.nn.dropout import drawn_again
from litlora.nn.linear import Joint, Linear
from litlora.nn.norm import LayerNorm, NormOfEachHead, RMSNorm
from litlora.nn.rope import Rope, rotate


def make_norm(config: GPTConfig, width: int) -> nn.Module:
    """Build a norm of the kind that the config names."""
    if config.norm == "layer_norm":
        return LayerNorm(width, config.norm_eps, config.norm_weight, config.norm_bias)
    return RMSNorm(width, config.norm_eps, offset=float(config.norm == "rms_plus_one"))


def make_norm_if(present: bool, config: GPTConfig) -> nn.Module:
    """Build a norm of the residual stream's width, or the identity."""
    return make_norm(config, config.hidden_size) if present else nn.Identity()


def make_head_norm(config: GPTConfig, heads: int) -> nn.Module:
    """Build the norm of queries or keys."""
    if config.qk_norm == "each_head":
        return NormOfEachHead(heads, config.head_dim, config.norm_eps)
    return make_norm(config, heads * config.head_dim if config.qk_norm == "full" else config.head_dim)


HEAD_NORMS = ("head", "each_head")
"""Kinds of `qk_norm` that norm the queries and keys of a head by themselves."""


class Attention(nn.Module):
    def __init__(self, config: GPTConfig, layer: int) -> None:
        super().__init__()
        self.head_dim, self.clip = config.head_dim, config.clip_qkv
        self.fused, self.qk_norm = config.fused_qkv, config.qk_norm
        self.spec = config.attention_specs[layer]
        heads, kv_heads, bias = config.num_attention_heads, config.num_key_value_heads, config.qkv_bias
        self.sizes = [n * config.head_dim for n in (heads, kv_heads, kv_heads)]
        if self.fused:
            self.qkv_proj = Linear(config.hidden_size, sum(self.sizes), bias=bias)
        else:
            self.q_proj, self.k_proj, self.v_proj = (Linear(config.hidden_size, n, bias=bias) for n in self.sizes)
        if self.qk_norm:
            self.q_norm, self.k_norm = make_head_norm(config, heads), make_head_norm(config, kv_heads)
        self.o_proj = Linear(self.sizes[0], config.hidden_size, bias=config.o_bias)
        self.joint: Joint | None = None

    def join(self) -> None:
        """Join the projections of one input in one product."""
        if not self.fused:
            self.joint = Joint(self.q_proj, self.k_proj, self.v_proj)

    def forward(self, x: Tensor, spans: Sequence[Span], rope: Rope | None, past: Tensor | Slots | None) -> Tensor:
        q, k, v = self.heads(x)
        if rope is not None:
            q, k = rotate(q, rope), rotate(k, rope)
            q = q if rope.query_scale is None else (q * rope.query_scale).to(q.dtype)
        if past is None:
            y = backend(q.device).varlen_attention(q, k, v, spans, self.spec)
        elif isinstance(past, Slots):
            y = past.attend(q, k, v, spans, self.spec)
        else:
            past[:, :, -len(k) :] = torch.stack((k, v)).transpose(1, 2)  # (2, n_kv, T, head_dim)
            y = attend(q.transpose(0, 1), *past, spec=self.spec).transpose(0, 1)
        out: Tensor = self.o_proj(y.flatten(1))  # (T, hidden)
        return out

    def heads(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return the queries, keys and values (T, heads, head_dim), normed but not rotated."""
        q, k, v = self.project(x)
        if self.clip is not None:
            q, k, v = (t.clamp(-self.clip, self.clip) for t in (q, k, v))
        if self.qk_norm == "full":
            q, k = self.q_norm(q), self.k_norm(k)
        shape = (len(x), -1, self.head_dim)
        q, k, v = q.reshape(shape), k.reshape(shape), v.reshape(shape)
        return (self.q_norm(q), self.k_norm(k), v) if self.qk_norm in HEAD_NORMS else (q, k, v)

    def project(self, x: Tensor) -> Sequence[Tensor]:
        """Return what the projections give for x, by one, two or three dimensions."""
        if self.joint:
            return self.joint(x)  # type: ignore[no-any-return]
        if not self.fused:
            return self.q_proj(x), self.k_proj(x), self.v_proj(x)
        qkv = self.qkv_proj(x)
        by_head = qkv.view(len(x), -1, 3, self.head_dim) if self.fused == "heads" else None
        q, k, v = torch.split(qkv, self.sizes, dim=1) if by_head is None else by_head.unbind(2)
        return q, k, v.contiguous()  # which attention saves, or it would save all of qkv


class MLP(nn.Module):
    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        hidden, inner, bias = config.hidden_size, config.intermediate_size, config.mlp_bias
        self.activation, self.is_gated = ACTIVATIONS[config.activation], config.gated_mlp
        self.fused = config.fused_gate_up
        if self.fused:
            self.gate_up_proj = Linear(hidden, 2 * inner, bias=bias)
        elif self.is_gated:
            self.gate_proj, self.up_proj = (Linear(hidden, inner, bias=bias) for _ in range(2))
        else:
            self.up_proj = Linear(hidden, inner, bias=bias)
        self.down_proj = Linear(inner, hidden, bias=bias)
        self.joint: Joint | None = None

    def join(self) -> None:
        """Join the two projections of one input in one product."""
        if self.is_gated and not self.fused:
            self.joint = Joint(self.gate_proj, self.up_proj)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.down_proj(self.inner(x))
        return out

    def inner(self, x: Tensor) -> Tensor:
        """Return what the activation gives (T, intermediate)."""
        if not self.is_gated:
            return self.activation.forward(self.up_proj(x))
        if self.fused:
            gate, up = self.gate_up_proj(x).chunk(2, dim=1)
        else:
            gate, up = self.joint(x) if self.joint else (self.gate_proj(x), self.up_proj(x))
        return gated(gate, up, self.activation)


class Block(nn.Module):
    """Attention and MLP, the second of which reads the sum with the first unless they are parallel."""

    def __init__(self, config: GPTConfig, layer: int) -> None:
        super().__init__()
        self.parallel, self.shared_norm = config.parallel_residual, config.shared_pre_norm
        self.scale, self.post_norms = config.residual_scale, config.post_norms
        self.input_layernorm = make_norm_if(config.pre_norms, config)
        self.self_attn = Attention(config, layer)
        if self.post_norms:
            self.post_self_attn_layernorm = make_norm(config, config.hidden_size)
        self.post_attention_layernorm = make_norm_if(config.pre_norms and not self.shared_norm, config)
        self.mlp = MLP(config)
        if self.post_norms:
            self.post_mlp_layernorm = make_norm(config, config.hidden_size)

    def forward(self, x: Tensor, spans: Sequence[Span], rope: Rope | None, past: Tensor | Slots | None) -> Tensor:
        normed = self.input_layernorm(x)
        attended = self.self_attn(normed, spans, rope, past)
        if self.post_norms:
            attended = self.post_self_attn_layernorm(attended)
        after = torch.add(x, attended, alpha=self.scale)
        inputs = normed if self.shared_norm else self.post_attention_layernorm(x if self.parallel else after)
        out: Tensor = self.mlp(inputs)
        return torch.add(after, self.post_mlp_layernorm(out) if self.post_norms else out, alpha=self.scale)


class Embedding(nn.Embedding):
    def reset_parameters(self) -> None:
        """Initialize the weights unless they are on the meta device, where torch would import its compiler for that."""
        if not self.weight.is_meta:
            super().reset_parameters()


class Decoder(nn.Module):
    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        self.embedding_scale, self.logit_scale = config.embedding_scale, config.logit_scale
        self.embed_tokens = Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(Block(config, layer) for layer in range(config.num_hidden_layers))
        self.norm = make_norm(config, config.hidden_size)
        self.activation_checkpointing = False  # whether backward recomputes the activations inside of blocks
        self.ropes = config.ropes

    def forward(self, tokens: Tensor, spans: Sequence[Span], cache: Cache | None) -> Tensor:
        x = scaled(self.embed_tokens(tokens), self.embedding_scale)  # (T, hidden)
        tables = RopeTables(spans, cache.starts if cache else repeat(0), x.dtype, tokens.device)
        pasts = cache.grow([own for _, own in spans]) if cache else repeat(None)
        for layer, rope_config, past in zip(self.layers, self.ropes, pasts, strict=False):
            rope = None if rope_config is None else tables[rope_config]
            if self.activation_checkpointing and torch.is_grad_enabled():
                x = checkpoint(
                    layer, x, spans, rope, past,
                    use_reentrant=False, preserve_rng_state=False, context_fn=drawn_again,
                )  # fmt: skip
            else:
                x = layer(x, spans, rope, past)
        # Logits are linear in the states: scaling these gives them their scale whatever layer the head has become.
        return scaled(self.norm(x), self.logit_scale)


def scaled(x: Tensor, scale: float) -> Tensor:
    """Return x times a scale that is rounded to the dtype of x, as Gemma was trained with."""
    return x if scale == 1 else x * float(torch.tensor(scale, dtype=x.dtype))


class GPT(nn.Module):
    """A decoder and its output head."""

    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        self.config = config
        self.model = Decoder(config)
        self.lm_head = Linear(config.hidden_size, config.vocab_size, bias=config.head_bias)
        self.is_compiled = False  # whether the blocks and the head are compiled, for decoding
        if config.tie_word_embeddings:
            self.lm_head.weight = self.model.embed_tokens.weight

    def forward(
        self, tokens: Tensor, lengths: Sequence[int], cache: Cache | None = None, shared: Sequence[int] = ()
    ) -> Tensor:
        """Return the hidden states (T, hidden) that `logits` takes.

        tokens (T,) holds packed sequences of the given lengths. Each attends to itself alone, from position 0, or
        also to the first `shared` tokens that the sequence before it attends to, from the position after them. With a
        cache, each continues where the cache says.
        """
        spans = tuple(zip_longest(shared, lengths, fillvalue=0))
        out: Tensor = self.model(tokens, spans, cache)
        return out

    def logits(self, hidden: Tensor) -> Tensor:
        """Return the logits (T, vocab) of hidden states."""
        return softcap(self.lm_head(hidden), self.config.logit_softcap)


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Switch to evaluation mode inside the block, and back to the previous mode after it."""
    training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(training)
