"""Which rotary embedding each layer has, as families of models differ in it.

Each function takes the content of config.json, the window of each layer, and the reader of an embedding's parameters.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

from litlora.models.hub_config import number, refusal, size
from litlora.models.rope_config import (
    LAYER_TYPES,
    ORIGINAL,
    QueryScaling,
    RopeConfig,
    Ropes,
    joined,
    joined_by_type,
)

Windows = Sequence[int | None]
RopeReader = Callable[[Mapping[str, Any]], RopeConfig]
"""Reads the parameters of one rotary embedding."""
LayerRopes = Callable[[Mapping[str, Any], Windows, RopeReader], Ropes]

MINISTRAL_3: dict[str, Any] = {
    "rope_type": "yarn",
    "rope_theta": 1e6,
    "factor": 16.0,
    ORIGINAL: 16384,
    "mscale": 1.0,
    "mscale_all_dim": 1.0,
    "llama_4_scaling_beta": 0.1,
}
"""Its parameters where config.json has none."""


def one_rope(values: Mapping[str, Any], windows: Windows, read: RopeReader) -> Ropes:
    """Read one embedding for all layers."""
    return (read(joined(values)),) * len(windows)


def rope_of_sliding_layers(values: Mapping[str, Any], windows: Windows, read: RopeReader) -> Ropes:
    """Read one embedding for the layers with a window; those with full attention have none."""
    rope = read(joined(values))
    return tuple(None if window is None else rope for window in windows)


def rope_of_sliding_layers_or_all(values: Mapping[str, Any], windows: Windows, read: RopeReader) -> Ropes:
    """Read one embedding for the layers with a window, or for all layers of a model without windows."""
    all_full = values.get("sliding_window") is None
    return one_rope(values, windows, read) if all_full else rope_of_sliding_layers(values, windows, read)


def rope_of_listed_layers(values: Mapping[str, Any], windows: Windows, read: RopeReader) -> Ropes:
    """Read one embedding for the layers that have a 1 in no_rope_layers."""
    rope = read(joined(values))
    return tuple(rope if listed else None for listed in listed_layers(values, len(windows)))


def listed_layers(values: Mapping[str, Any], layers: int) -> list[bool]:
    """Tell for each layer whether no_rope_layers has a 1, or without it, all but every no_rope_layer_interval-th."""
    key = "no_rope_layers"
    if (listed := values.get(key)) is None:
        interval = size(values, "no_rope_layer_interval")
        return [layer % interval != 0 for layer in range(1, layers + 1)]
    if not isinstance(listed, list) or len(listed) < layers or not all(entry in (0, 1) for entry in listed):
        raise refusal(key, listed, f"it must be a list of 0 and 1 with num_hidden_layers ({layers}) entries")
    return [bool(entry) for entry in listed[:layers]]


def rope_by_layer_type(theta: float, local_theta: float, local_key: str = "") -> LayerRopes:
    """Return what reads an embedding for the layers with full attention and another for those with a window.

    The numbers are the bases where config.json has none, and `local_key` is that of the second in the older spelling.
    """

    def read_both(values: Mapping[str, Any], windows: Windows, read: RopeReader) -> Ropes:
        bases = _base(values, "rope_theta", theta), _base(values, local_key, local_theta)
        full, local = (read(joined_by_type(values, *both)) for both in zip(LAYER_TYPES, bases, strict=True))
        return tuple(full if window is None else local for window in windows)

    return read_both


def _base(values: Mapping[str, Any], key: str, default: float) -> float:
    return default if values.get(key) is None else number(values, key)


def rope_with_query_scaling(values: Mapping[str, Any], windows: Windows, read: RopeReader) -> Ropes:
    """Read one embedding for all layers, whose queries grow with their position."""
    rope = joined(dict(values) | {"rope_parameters": values.get("rope_parameters") or MINISTRAL_3})
    scaling = QueryScaling(number(rope, "llama_4_scaling_beta"), size(rope, ORIGINAL))
    own = {"llama_4_scaling_beta", "max_position_embeddings"}
    config = read({key: value for key, value in rope.items() if key not in own})
    return (replace(config, query_scaling=scaling),) * len(windows)


def phi3_rope(values: Mapping[str, Any], windows: Windows, read: RopeReader) -> Ropes:
    """Read one embedding for all layers, whose type longrope has two older names."""
    rope = joined(values)
    older = rope.get("rope_type", rope.get("type")) in ("su", "yarn")
    # Under its own name, longrope takes original_max_position_embeddings from beside the parameters.
    rope = joined(dict(values) | {"rope_scaling": rope | {"rope_type": "longrope"}}) if older else rope
    return (read(rope),) * len(windows)


def neox_rope(values: Mapping[str, Any], windows: Windows, read: RopeReader) -> Ropes:
    """Read one embedding for all layers, whose base and rotated part have names of their own."""
    own = {"rope_theta": values["rotary_emb_base"], "partial_rotary_factor": values["rotary_pct"]}
    return one_rope(dict(values) | own, windows, read)
