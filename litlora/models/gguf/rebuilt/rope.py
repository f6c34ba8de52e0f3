"""The rotary embedding of the model in a GGUF file, as config.json has it."""

import math
from typing import Any

from litlora.models.gguf.reader import GGUFHeader
from litlora.models.gguf.rebuilt.families import HubFamily
from litlora.models.gguf.rebuilt.metadata import Metadata
from litlora.models.rope_config import LAYER_TYPES, ORIGINAL

THETA, LOCAL_THETA, DIM = "rope.freq_base", "rope.freq_base_swa", "rope.dimension_count"
SCALING, FACTOR, NO_SCALING = "rope.scaling.type", "rope.scaling.factor", "none"
ORIGINAL_LENGTH, ATTENTION_FACTOR = "rope.scaling.original_context_length", "rope.scaling.attn_factor"
BETAS = {"beta_fast": "rope.scaling.yarn_beta_fast", "beta_slow": "rope.scaling.yarn_beta_slow"}
ROPE_KEYS = {THETA, LOCAL_THETA, DIM, SCALING, FACTOR, ORIGINAL_LENGTH, ATTENTION_FACTOR, *BETAS.values()}
LLAMA_3_DIVISORS = "rope_freqs.weight"
LONGROPE_DIVISORS = {"long_factor": "rope_factors_long.weight", "short_factor": "rope_factors_short.weight"}
LLAMA_3 = {"low_freq_factor": 1.0, "high_freq_factor": 4.0, ORIGINAL: 8192}
"""What is the same in all of Meta's models; the factor is the largest divisor."""


def scaling_of(header: GGUFHeader) -> Any:
    """Return the rotary scaling of a file.

    Without a type, lists of divisors are those of longrope, and a factor is one of linear scaling to llama.cpp.
    """
    has_lists = LONGROPE_DIVISORS["long_factor"] in header.tensors
    factor = header.metadata.get(f"{header.architecture}.{FACTOR}")
    implied = "longrope" if has_lists else "linear" if factor else NO_SCALING
    return header.metadata.get(f"{header.architecture}.{SCALING}", implied)


def rope_of(metadata: Metadata, family: HubFamily, head_dim: int, length: int) -> dict[str, Any]:
    """Return the keys of the rotary embedding, given the length of the file's context."""
    full = {"rope_type": "default", "rope_theta": metadata.number(THETA, 10000.0)} | _scaling(metadata, length)
    if family.has_local_rope:
        local = {"rope_type": "default", "rope_theta": metadata.number(LOCAL_THETA, 10000.0)}
        return {"rope_parameters": dict(zip(LAYER_TYPES, (full, local), strict=True))}
    rotated = metadata.size(DIM, head_dim)
    partly = {"partial_rotary_factor": rotated / head_dim} if rotated != head_dim else {}
    beside = {ORIGINAL: full[ORIGINAL]} if full["rope_type"] == "longrope" else {}  # where Phi 3 has it
    return {"rope_parameters": full | partly, **beside}


def unscaled_length(metadata: Metadata, length: int) -> int:
    """Return max_position_embeddings for the length of a file's context, which is what linear scaling reaches."""
    return max(1, int(length / _factor(metadata))) if scaling_of(metadata.header) == "linear" else length


def _factor(metadata: Metadata) -> float:
    factor = metadata.number(FACTOR, 1.0)
    if not 0 < factor < math.inf:
        metadata.refuse(f"its {metadata.arch}.{FACTOR} is {factor}")
    return factor


def _scaling(metadata: Metadata, length: int) -> dict[str, Any]:
    kind = scaling_of(metadata.header)
    if LLAMA_3_DIVISORS in metadata.header.tensors:
        return {"rope_type": "llama3", "factor": max(metadata.values(LLAMA_3_DIVISORS)), **LLAMA_3}
    if kind == NO_SCALING:
        return {}
    if kind == "linear":
        return {"rope_type": kind, "factor": _factor(metadata)}
    original = {ORIGINAL: metadata.size(ORIGINAL_LENGTH, length)}
    if kind == "yarn":
        return {"rope_type": kind, **original, **_yarn(metadata)}
    if kind == "longrope":
        divisors = {key: metadata.values(name) for key, name in LONGROPE_DIVISORS.items()}
        return {"rope_type": kind, **divisors, **original, "attention_factor": metadata.number(ATTENTION_FACTOR, 1.0)}
    return metadata.refuse(f"its rotary scaling is {kind}")


def _yarn(metadata: Metadata) -> dict[str, float]:
    """Return the parameters of YaRN; llama.cpp multiplies the factor of queries and keys by that of the paper."""
    factor, own = _factor(metadata), metadata.number(ATTENTION_FACTOR, 1.0)
    attention = {"attention_factor": own * (0.1 * math.log(factor) + 1)} if own != 1 else {}
    betas = {key: metadata.number(name) for key, name in BETAS.items() if metadata.get(name) is not None}
    return {"factor": factor, **attention, **betas}
