"""Rotary position embeddings as config.json describes them, without torch.

Two spellings are read: `rope_theta` and `partial_rotary_factor` beside `rope_scaling`, and `rope_parameters`, which
transformers 5 writes, once for all layers or nested by the type of layer.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from litlora.models.hub_config import boolean, number, refusal, required, size

COMMON = {"rope_type", "type", "rope_theta", "partial_rotary_factor"}
ORIGINAL = "original_max_position_embeddings"
LAYER_TYPES = "full_attention", "sliding_attention"
SCALED_FROM_A_LENGTH = "llama3", "yarn", "longrope"
"""Rope types whose parameters include the length that the model was pre-trained with."""


@dataclass(frozen=True)
class LinearScaling:
    """All positions are divided by a factor (rope_type linear)."""

    factor: float


@dataclass(frozen=True)
class DynamicScaling:
    """A base that grows with a sequence longer than max_position_embeddings (rope_type dynamic)."""

    factor: float
    max_position_embeddings: int


@dataclass(frozen=True)
class Llama3Scaling:
    """Llama 3.1's scaling of the rotary wavelengths (rope_type llama3)."""

    factor: float
    low_freq_factor: float
    high_freq_factor: float
    original_max_position_embeddings: int


@dataclass(frozen=True)
class YarnScaling:
    """YaRN (Peng et al. 2023): high frequencies stay, low ones are divided by a factor (rope_type yarn)."""

    factor: float
    original_max_position_embeddings: int
    attention_factor: float
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    truncate: bool = True


@dataclass(frozen=True)
class LongRopeScaling:
    """A divisor for each frequency, one list for short sequences and one for long (Ding et al. 2024; longrope)."""

    short_factor: tuple[float, ...]
    long_factor: tuple[float, ...]
    original_max_position_embeddings: int
    attention_factor: float


Scaling = LinearScaling | DynamicScaling | Llama3Scaling | YarnScaling | LongRopeScaling


@dataclass(frozen=True)
class QueryScaling:
    """Queries grow with their position, as in Llama 4: by 1 + beta · log(1 + floor(position / original))."""

    beta: float
    original_max_position_embeddings: int


@dataclass(frozen=True)
class RopeConfig:
    """How a layer rotates its queries and keys."""

    theta: float
    dim: int
    """Leading dimensions of a head that are rotated; the others stay."""
    scaling: Scaling | None = None
    interleaved: bool = False
    """Whether a pair is (2i, 2i + 1), and not (i, i + dim / 2)."""
    query_scaling: QueryScaling | None = None

    @property
    def attention_factor(self) -> float:
        """Factor of the rotated queries and keys."""
        return self.scaling.attention_factor if isinstance(self.scaling, YarnScaling | LongRopeScaling) else 1.0

    def regime(self, length: int) -> int:
        """Return a number that is equal for all lengths of a sequence that have the same frequencies.

        Dynamic and longrope frequencies depend on the length of the whole sequence. As transformers computes them
        without a cache, all positions of a sequence have those of its length: each sequence of a micro-batch its own,
        where transformers takes those of the longest; and a sequence that grows into other frequencies is computed
        again. transformers does so for phi3 alone, and elsewhere mixes keys of both in its cache, so that what it
        generates depends on how the prompt was split.
        """
        if isinstance(self.scaling, LongRopeScaling):
            return int(length > self.scaling.original_max_position_embeddings)
        return max(length, self.scaling.max_position_embeddings) if isinstance(self.scaling, DynamicScaling) else 0

    def positions(self, max_position_embeddings: int) -> int:
        """Return the number of positions that the frequencies are made for, which linear, dynamic and yarn extend."""
        if isinstance(self.scaling, LinearScaling | DynamicScaling):
            return int(max_position_embeddings * self.scaling.factor)
        if isinstance(self.scaling, YarnScaling):
            return max(
                max_position_embeddings, int(self.scaling.original_max_position_embeddings * self.scaling.factor)
            )
        return max_position_embeddings


Ropes = tuple[RopeConfig | None, ...]
"""The rotary embedding of each layer, or None for a layer without one."""


def read_rope(
    rope: Mapping[str, Any],
    values: Mapping[str, Any],
    head_dim: int,
    *,
    partial_rotary: bool = False,
) -> RopeConfig:
    """Read an embedding whose parameters `joined` or `joined_by_type` returns.

    `values` is the rest of config.json; `partial_rotary` tells whether the family can leave dimensions unrotated.
    """
    rope_type = _rope_type(rope)
    if not isinstance(rope_type, str) or rope_type not in READERS:
        raise refusal("rope_type", rope_type, f"implemented are {', '.join(READERS)}")
    keys, read = READERS[rope_type]
    for key in sorted(rope.keys() - COMMON - keys):
        raise refusal(key, rope[key], f"rope_type {rope_type} does not have it")
    dim = _rotary_dim(rope, head_dim, partial_rotary=partial_rotary)
    return RopeConfig(number(rope, "rope_theta", 10000.0), dim, read(rope, values, dim))


def joined(values: Mapping[str, Any]) -> dict[str, Any]:
    """Join the two spellings of the one embedding of all layers."""
    key = "rope_scaling" if values.get("rope_scaling") else "rope_parameters"
    rope = _beside(values) | _object(key, values.get(key))
    if _rope_type(rope) not in SCALED_FROM_A_LENGTH:
        return rope
    # As in transformers, a length beside the rope's parameters overrides theirs.
    beside = {ORIGINAL: values[ORIGINAL]} if values.get(ORIGINAL) is not None else {}
    return {ORIGINAL: values["max_position_embeddings"]} | rope | beside


def joined_by_type(values: Mapping[str, Any], layer_type: str, theta: float) -> dict[str, Any]:
    """Join the two spellings for one of two types of layers, full_attention or sliding_attention.

    In the older spelling, `rope_scaling` is that of the layers with full attention.
    """
    nested = _object("rope_parameters", values.get("rope_parameters"))
    for key in sorted(nested.keys() - set(LAYER_TYPES)):
        raise refusal(key, nested[key], f"rope_parameters must have {' and '.join(LAYER_TYPES)} alone")
    older = _object("rope_scaling", values.get("rope_scaling")) if layer_type == LAYER_TYPES[0] else {}
    rope = {"rope_theta": theta} | _object(layer_type, nested.get(layer_type)) | older
    for key in sorted(rope.keys() & {"truncate"}):
        raise refusal(key, rope[key], "it must be absent where layers have different embeddings")
    scaled = _rope_type(rope) in SCALED_FROM_A_LENGTH
    return ({ORIGINAL: values["max_position_embeddings"]} if scaled else {}) | rope


def _object(key: str, value: object) -> dict[str, Any]:
    """Read an object; a key in it whose value is null is as good as absent."""
    if value is not None and not isinstance(value, dict):
        raise refusal(key, value, "it must be an object or null")
    return {name: content for name, content in (value or {}).items() if content is not None}


def _beside(values: Mapping[str, Any]) -> dict[str, Any]:
    """Return the parameters that stand in config.json itself; those of the embedding override them."""
    return {key: values[key] for key in ("rope_theta", "partial_rotary_factor") if values.get(key) is not None}


def _rope_type(rope: Mapping[str, Any]) -> Any:
    return rope.get("rope_type", rope.get("type", "default"))


def _rotary_dim(rope: Mapping[str, Any], head_dim: int, *, partial_rotary: bool) -> int:
    factor = number(rope, "partial_rotary_factor", 1.0)
    if factor != 1 and not partial_rotary:
        raise refusal("partial_rotary_factor", factor, "only 1 is implemented")
    dim = int(head_dim * factor)
    if factor > 1 or dim < 2 or dim % 2:
        reason = f"of head_dim ({head_dim}) it must leave an even number of dimensions, at least 2"
        raise refusal("partial_rotary_factor", factor, reason)
    return dim


def _default(rope: Mapping[str, Any], values: Mapping[str, Any], dim: int) -> None:
    return None


def _linear(rope: Mapping[str, Any], values: Mapping[str, Any], dim: int) -> LinearScaling:
    return LinearScaling(number(rope, "factor"))


def _dynamic(rope: Mapping[str, Any], values: Mapping[str, Any], dim: int) -> DynamicScaling:
    if dim == 2:
        raise refusal("rope_type", "dynamic", "it needs more than 2 dimensions")
    return DynamicScaling(number(rope, "factor"), size(values, "max_position_embeddings"))


def _llama3(rope: Mapping[str, Any], values: Mapping[str, Any], dim: int) -> Llama3Scaling:
    factors = {key: number(rope, key) for key in ("factor", "low_freq_factor", "high_freq_factor")}
    if factors["low_freq_factor"] >= factors["high_freq_factor"]:
        raise refusal("low_freq_factor", rope["low_freq_factor"], "it must be below high_freq_factor")
    return Llama3Scaling(**factors, original_max_position_embeddings=size(rope, ORIGINAL))


def _yarn(rope: Mapping[str, Any], values: Mapping[str, Any], dim: int) -> YarnScaling:
    original = size(rope, ORIGINAL)
    factor = _factor(rope, values, original)
    derived = _yarn_magnitude(factor, 1.0)
    if rope.keys() >= {"mscale", "mscale_all_dim"}:
        above, below = (_yarn_magnitude(factor, number(rope, key)) for key in ("mscale", "mscale_all_dim"))
        derived = above / below
    fast, slow = number(rope, "beta_fast", 32.0), number(rope, "beta_slow", 1.0)
    truncate = boolean({"truncate": True} | dict(rope), "truncate")
    return YarnScaling(factor, original, number(rope, "attention_factor", derived), fast, slow, truncate)


def _yarn_magnitude(factor: float, mscale: float) -> float:
    return 1.0 if factor <= 1 else 0.1 * mscale * math.log(factor) + 1


def _longrope(rope: Mapping[str, Any], values: Mapping[str, Any], dim: int) -> LongRopeScaling:
    original = size(rope, ORIGINAL)
    factor = _factor(rope, values, original)
    derived = 1.0 if factor <= 1 or original == 1 else math.sqrt(1 + math.log(factor) / math.log(original))
    short, long = (_divisors(rope, key, dim // 2) for key in ("short_factor", "long_factor"))
    return LongRopeScaling(short, long, original, number(rope, "attention_factor", derived))


def _factor(rope: Mapping[str, Any], values: Mapping[str, Any], original: int) -> float:
    """Read the factor by which the positions are extended; if absent, it follows from the two lengths."""
    return number(rope, "factor", size(values, "max_position_embeddings") / original)


def _divisors(rope: Mapping[str, Any], key: str, count: int) -> tuple[float, ...]:
    divisors = required(rope, key)
    if not isinstance(divisors, list) or len(divisors) != count:
        raise refusal(key, divisors, f"it must be a list of {count} numbers, half of the rotated dimensions")
    return tuple(number({key: divisor}, key) for divisor in divisors)


Reader = Callable[[Mapping[str, Any], Mapping[str, Any], int], Scaling | None]
YARN_KEYS = "factor", ORIGINAL, "attention_factor", "beta_fast", "beta_slow", "mscale", "mscale_all_dim", "truncate"
READERS: dict[str, tuple[set[str], Reader]] = {
    "default": (set(), _default),
    "linear": ({"factor"}, _linear),
    "dynamic": ({"factor"}, _dynamic),
    "llama3": ({"factor", "low_freq_factor", "high_freq_factor", ORIGINAL}, _llama3),
    "yarn": (set(YARN_KEYS), _yarn),
    "longrope": ({"factor", "short_factor", "long_factor", "attention_factor", ORIGINAL}, _longrope),
}
"""By rope type, the keys of its parameters and what reads them."""
