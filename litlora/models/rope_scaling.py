"""The angles by which positions are rotated, for each rope type of config.json."""

import math
from collections.abc import Iterable, Sequence
from functools import lru_cache

import torch
from torch import Tensor

from litlora.models.rope_config import (
    DynamicScaling,
    LinearScaling,
    Llama3Scaling,
    LongRopeScaling,
    QueryScaling,
    RopeConfig,
    YarnScaling,
)
from litlora.nn.backend import backend
from litlora.nn.backend_interface import Span
from litlora.nn.rope import Rope, turns


class RopeTables:
    """The rotations of all positions of a packed sequence, computed once for the layers that share them."""

    def __init__(self, spans: Sequence[Span], starts: Iterable[int], dtype: torch.dtype, device: torch.device) -> None:
        """Describe sequences by their spans, and by how many tokens of each are in a KV cache."""
        self.dtype = dtype
        self.lengths = [start + shared + own for (shared, own), start in zip(spans, starts, strict=False)]
        self.own = [own for _, own in spans]
        ends = zip(self.lengths, self.own, strict=True)
        self.positions = _positions([(end - own, end) for end, own in ends], device)  # (T,)
        self.tables: dict[RopeConfig, Rope] = {}

    def __getitem__(self, rope: RopeConfig) -> Rope:
        if rope not in self.tables:
            scale = None if rope.query_scaling is None else query_scale(self.positions, rope.query_scaling)
            angles = self._angles(rope)
            self.tables[rope] = turns(angles, self.dtype, rope.attention_factor, rope.interleaved, scale)
        return self.tables[rope]

    def _angles(self, rope: RopeConfig) -> Tensor:
        """Return the angles (T, dim / 2)."""
        regimes, device = [rope.regime(length) for length in self.lengths], self.positions.device
        if len(set(regimes)) == 1:
            return self.positions[:, None] * frequencies(rope, regimes[0], device)
        parts = zip(torch.split(self.positions, self.own), regimes, strict=True)
        return torch.cat([positions[:, None] * frequencies(rope, regime, device) for positions, regime in parts])


def _positions(ranges: Sequence[tuple[int, int]], device: torch.device) -> Tensor:
    """Return the numbers in some ranges: of several by one copy, since a GPU would be told each by a kernel."""
    if len(ranges) == 1:
        return torch.arange(*ranges[0], device=device)
    positions = torch.cat([torch.arange(*bounds, device="cpu") for bounds in ranges])
    return backend(device).to_device((positions,), device)[0]


@lru_cache(maxsize=64)
@torch.inference_mode(mode=False)  # they outlive the mode in which they are computed
def frequencies(rope: RopeConfig, regime: int, device: torch.device) -> Tensor:
    """Return the angle per position of each rotary pair, as float32 (dim / 2,), in a regime of `rope.regime`."""
    return inverse_frequencies(rope, regime).to(device)


def inverse_frequencies(rope: RopeConfig, regime: int) -> Tensor:
    """Compute the same on the CPU, so that a model that is built on the meta device has them as well."""
    exponents = torch.arange(0, rope.dim, 2, dtype=torch.float32, device="cpu") / rope.dim
    match rope.scaling:
        case LinearScaling(factor):
            return 1.0 / rope.theta**exponents / factor
        case DynamicScaling():
            return 1.0 / _dynamic_base(rope.theta, rope.dim, rope.scaling, regime) ** exponents
        case Llama3Scaling():
            return llama3_frequencies(1.0 / rope.theta**exponents, rope.scaling)
        case YarnScaling():
            return yarn_frequencies(rope.theta**exponents, rope.theta, rope.scaling)
        case LongRopeScaling(short, long):
            divisors = torch.tensor(long if regime else short, dtype=torch.float32, device="cpu")
            return 1.0 / (divisors * rope.theta**exponents)
    return 1.0 / rope.theta**exponents


def _dynamic_base(theta: float, dim: int, scaling: DynamicScaling, length: int) -> float | Tensor:
    """Return the base for a length, in float32 as transformers computes it for sequences beyond the first positions."""
    positions, factor = scaling.max_position_embeddings, scaling.factor
    if length == positions:
        return theta
    stretch = factor * torch.tensor(length, device="cpu") / positions - (factor - 1)
    return theta * stretch ** (dim / (dim - 2))


def llama3_frequencies(inv_freq: Tensor, scaling: Llama3Scaling) -> Tensor:
    """Scale the wavelengths as Llama 3.1 does: short ones not at all, long ones by factor, interpolated between."""
    rotations = scaling.original_max_position_embeddings * inv_freq / (2 * math.pi)
    low, high = scaling.low_freq_factor, scaling.high_freq_factor
    unscaled = ((rotations - low) / (high - low)).clamp(0, 1)
    return inv_freq * (unscaled + (1 - unscaled) / scaling.factor)


def yarn_frequencies(wavelengths: Tensor, theta: float, scaling: YarnScaling) -> Tensor:
    """Divide by factor the frequencies that turn fewer than beta_slow times, interpolated up to beta_fast (eq. 23)."""
    dim = 2 * len(wavelengths)
    low, high = (
        dim * math.log(scaling.original_max_position_embeddings / (turned * 2 * math.pi)) / (2 * math.log(theta))
        for turned in (scaling.beta_fast, scaling.beta_slow)
    )  # the pairs that turn so often within the original length
    if scaling.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, dim - 1)
    width = high - low if high != low else 0.001
    ramp = ((torch.arange(dim // 2, dtype=torch.float32, device="cpu") - low) / width).clamp(0, 1)
    return ramp / (scaling.factor * wavelengths) + (1 - ramp) / wavelengths


def query_scale(positions: Tensor, scaling: QueryScaling) -> Tensor:
    """Return the factor of the queries at each position (T,)."""
    return 1 + scaling.beta * torch.log1p(torch.floor(positions / scaling.original_max_position_embeddings))
