"""Inverse frequencies of the rotary embedding, with Llama 3.1's scaling."""

import math

import torch
from torch import Tensor

from litlora.models.config import GPTConfig, Llama3Scaling


def inverse_frequencies(config: GPTConfig) -> Tensor:
    """Angle per position of each rotary pair, as float32 (head_dim / 2,)."""
    exponents = torch.arange(0, config.head_dim, 2, dtype=torch.float32, device="cpu") / config.head_dim
    inv_freq = 1.0 / config.rope_theta**exponents
    return inv_freq if config.rope_scaling is None else scale_frequencies(inv_freq, config.rope_scaling)


def scale_frequencies(inv_freq: Tensor, scaling: Llama3Scaling) -> Tensor:
    """Scale the wavelengths as Llama 3.1 does: short ones not at all, long ones by factor, interpolated between."""
    rotations = scaling.original_max_position_embeddings * inv_freq / (2 * math.pi)
    low, high = scaling.low_freq_factor, scaling.high_freq_factor
    unscaled = ((rotations - low) / (high - low)).clamp(0, 1)
    return inv_freq * (unscaled + (1 - unscaled) / scaling.factor)
