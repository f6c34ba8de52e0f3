"""Whether a GGUF file is of the model that a config.json describes, by the file's metadata."""

import math
from collections.abc import Iterator, Mapping
from typing import Any

import torch

from litlora.models.config import GPTConfig
from litlora.models.gguf.architectures import Architecture, architecture_of_checkpoint
from litlora.models.gguf.library import gguf
from litlora.models.gguf.metadata import add_computation
from litlora.models.gguf.reader import GGUFHeader
from litlora.models.gguf.rebuilt.rope import NO_SCALING, SCALING, scaling_of
from litlora.models.gguf.stored import StoredInGGUF
from litlora.models.gguf.tensors import ROPE_FACTORS, rope_factors
from litlora.models.mapped_file import map_file

DEFAULTS = {
    "rope.freq_base": 10000.0,
    "rope.scaling.attn_factor": 1.0,
    "rope.scaling.yarn_beta_fast": 32.0,
    "rope.scaling.yarn_beta_slow": 1.0,
}
"""What llama.cpp computes with where a file has none of these keys."""
NOT_COMPARED = "vocab_size", "sliding_window_pattern"
"""Keys whose meaning is in the shapes already, or that converters write in different forms."""
CLOSE = 1e-4
"""Relative difference up to which two numbers are one that was stored in float32."""


def differences(header: GGUFHeader, hub_config: Mapping[str, Any], config: GPTConfig) -> Iterator[str]:
    """Yield in what a file's metadata is of another model than that of a config.json."""
    own = architecture_of_checkpoint(hub_config, config)
    if (expected := own.name) != header.architecture:
        yield f"it is for llama.cpp's {header.architecture}, not {expected}"
        return
    yield from _different_keys(header, own, config)
    yield from _different_factors(header, config)


def _different_keys(header: GGUFHeader, own: Architecture, config: GPTConfig) -> Iterator[str]:
    """Yield how the file's metadata differs from that which the config would be exported with."""
    writer, arch = gguf.GGUFWriter(None, own.name), header.architecture
    add_computation(writer, own, config)
    expected: dict[str, Any] = {key: value.value for key, value in writer.kv_data[0].items()}
    scaling = f"{arch}.{SCALING}"
    defaults = {f"{arch}.{name}": value for name, value in DEFAULTS.items()} | {scaling: scaling_of(header)}
    for key in dict.fromkeys([*expected, scaling]):
        ours = expected.get(key, NO_SCALING if key == scaling else None)
        theirs = header.metadata.get(key, defaults.get(key))
        compared = key.removeprefix(f"{arch}.") not in NOT_COMPARED and key.startswith(f"{arch}.")
        if compared and theirs is not None and not _agree(theirs, ours):
            yield f"its {key} is {theirs}, and config.json implies {ours}"


def _agree(one: Any, other: Any) -> bool:
    """Tell whether two values are the same; a list is as good as its one value."""
    if isinstance(one, list):
        return all(_agree(each, other) for each in one) if not isinstance(other, list) else one == other
    numbers = isinstance(one, int | float) and isinstance(other, int | float)
    return math.isclose(one, other, rel_tol=CLOSE) if numbers else one == other


def _different_factors(header: GGUFHeader, config: GPTConfig) -> Iterator[str]:
    """Yield the factors of rotary frequencies that differ from the config's."""
    expected = {tensor.name: tensor.read() for tensor in rope_factors(config)}
    content = map_file(header.path)
    for name in ROPE_FACTORS:
        info = header.tensors.get(name)
        ours = expected.get(name)
        if info is None and ours is None:
            continue
        if info is None or ours is None or info.shape != tuple(ours.shape):
            yield f"{name} is in {'config.json' if info is None else 'it'} alone, or has another shape"
            continue
        theirs = StoredInGGUF(header.path, info, ours.shape).view(content)
        if not torch.allclose(theirs, ours, rtol=CLOSE):
            yield f"its {name} differs from the rope_scaling of config.json"
