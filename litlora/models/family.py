"""What an entry of the table of families holds, and how its flags, windows and rotary embeddings are read."""

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from types import MappingProxyType
from typing import Any

from litlora.models.hub_config import boolean, number, refusal, shown, size
from litlora.models.layer_ropes import LayerRopes, listed_layers, one_rope
from litlora.models.rope_config import Ropes, read_rope

FULL, SLIDING = "full_attention", "sliding_attention"
LAYER_TYPES = {FULL: FULL, SLIDING: SLIDING, "attention": FULL}
PARTIAL_ROTARY = "partial_rotary_factor"
# What transformers reads for every family, and the one value that is implemented; null is as good as absent.
SINGLE_VALUES: dict[str, Any] = {
    "attention_chunk_size": None,
    "is_causal": True,
    "kv_sharing_modes": None,
    PARTIAL_ROTARY: 1,
    "per_layer_config": {},
    "quantization_config": None,
    "transformers_weights": None,
}
ATTENTION_DROPOUT = "attention_dropout"
# Names of activations in config.json, with those of nn/activation.py.
ACTIVATIONS = {
    "silu": "silu", "swish": "silu", "gelu": "gelu",
    "gelu_new": "gelu_tanh", "gelu_fast": "gelu_tanh", "gelu_pytorch_tanh": "gelu_tanh",
}  # fmt: skip
REASONS = {"quantization_config": "use the checkpoint that it was made from, which --quantize can quantize"}

Windows = tuple[int | None, ...]
"""The sliding window of each layer, or None for a layer without one."""


Flags = Mapping[str, Any]
"""Fields of GPTConfig: the value of each, or a function that reads it from the keys of config.json."""


def flag(key: str) -> Callable[[Mapping[str, Any]], bool]:
    """Return a function that reads true or false."""
    return lambda values: boolean(values, key)


def positive(key: str) -> Callable[[Mapping[str, Any]], float]:
    """Return a function that reads a number above 0."""
    return lambda values: number(values, key)


def optional(key: str) -> Callable[[Mapping[str, Any]], float | None]:
    """Return a function that reads a number above 0, or null."""
    return lambda values: None if values.get(key) is None else number(values, key)


def activation(key: str, own: Mapping[str, str] = MappingProxyType({})) -> Callable[[Mapping[str, Any]], str]:
    """Return a function that reads the name of an activation, some of which may have a meaning of their own."""
    meanings = ACTIVATIONS | dict(own)

    def read(values: Mapping[str, Any]) -> str:
        name = values.get(key)
        if not isinstance(name, str) or name not in meanings:
            raise refusal(key, name, f"implemented are {', '.join(meanings)}")
        return meanings[name]

    return read


LLAMA: Flags = {"norm_eps": positive("rms_norm_eps"), "activation": activation("hidden_act")}
"""Flags of a family that does not set them."""
DEFAULTS: Mapping[str, Any] = {"rms_norm_eps": 1e-6, "hidden_act": "silu"}


@dataclass(frozen=True)
class Family:
    """What distinguishes the models of one model_type."""

    defaults: Mapping[str, Any]
    """Values of keys that a config.json may leave out."""
    windows: Callable[[Mapping[str, Any], int], Windows]
    """Reads the sliding window of each of n layers."""
    layer_ropes: LayerRopes = one_rope
    """Reads the rotary embedding of each layer, given the layers' windows."""
    interleaved_rope: bool = False
    """Whether neighbouring dimensions are rotated together, and not those of the two halves."""
    flags: Flags = field(default_factory=dict)
    """The flags of the transformer that differ from Llama's."""
    single_values: Mapping[str, Any] = field(default_factory=dict)
    """Keys that only this family's implementation reads, with the one value that litlora implements."""
    dropouts: tuple[str, ...] = ()
    """Keys of dropouts beside attention_dropout. They act in training alone, and are reported and not applied."""
    unread: tuple[str, ...] = ()
    """Keys of other families that have no effect in this one."""
    module_names: Mapping[str, str] = field(default_factory=dict)
    """Parts of the names of modules that differ from Llama's, with what transformers calls them."""
    file_names: tuple[tuple[str, str], ...] = ()
    """Starts of the names of tensors in files that differ from those of modules, with the start of these."""
    left_out: tuple[str, ...] = ()
    """Modules of a multi-modal checkpoint that are not loaded."""
    unused: str = ""
    """A pattern of names of tensors that a checkpoint may have and the model does without."""

    def check_keys(self, hub: Mapping[str, Any]) -> None:
        """Refuse a key that has an effect in transformers and is not implemented for its value.

        A key with a default is implemented.
        """
        for key, only in (SINGLE_VALUES | dict(self.single_values)).items():
            if key not in self.defaults and hub.get(key) is not None and hub[key] != only:
                reason = f"only {shown(only)} is implemented"
                raise refusal(key, hub[key], REASONS.get(key, reason))

    def values(self, hub: Mapping[str, Any]) -> dict[str, Any]:
        """Return the values of all keys that have one."""
        return dict(self.defaults) | {key: value for key, value in hub.items() if key not in self.unread}

    def unapplied_dropouts(self, values: Mapping[str, Any]) -> tuple[str, ...]:
        """Return the dropouts of the base's own training, each as it stands in config.json."""
        return tuple(f'"{key}": {shown(values[key])}' for key in (ATTENTION_DROPOUT, *self.dropouts) if values.get(key))

    def read_flags(self, values: Mapping[str, Any]) -> dict[str, Any]:
        """Return the flags for a config."""
        known = dict(DEFAULTS) | dict(values)
        return {
            name: value(known) if callable(value) else value for name, value in (dict(LLAMA) | dict(self.flags)).items()
        }

    def module_name(self, file_name: str) -> str:
        """Return the name that a tensor of a file has in transformers' model."""
        for start, own in self.file_names:
            if file_name.startswith(start):
                return own + file_name.removeprefix(start)
        return file_name

    def ropes(self, values: Mapping[str, Any], head_dim: int, windows: Windows) -> Ropes:
        """Return the rotary embedding of each layer."""
        read = partial(read_rope, values=values, head_dim=head_dim, partial_rotary=PARTIAL_ROTARY in self.defaults)
        ropes = self.layer_ropes(values, windows, read)
        return tuple(rope and replace(rope, interleaved=self.interleaved_rope) for rope in ropes)


def renamed(name: str, parts: Mapping[str, str]) -> str:
    """Replace parts of a dotted name, all at once."""
    if not parts:
        return name
    pattern = "|".join(re.escape(part) for part in sorted(parts, key=len, reverse=True))
    return re.sub(rf"(?<![^.])(?:{pattern})(?![^.])", lambda match: parts[match[0]], name)


def no_window(values: Mapping[str, Any], layers: int) -> Windows:
    """Refuse windows, which transformers would apply in generation alone."""
    if (window := values.get("sliding_window")) is not None:
        raise refusal("sliding_window", window, f"a model of the type {values['model_type']} has none")
    if SLIDING in (types := layer_types(values, layers)):
        raise refusal("layer_types", types, f"a model of the type {values['model_type']} has no sliding window")
    return (None,) * layers


def one_window(values: Mapping[str, Any], layers: int) -> Windows:
    """Read one window for all layers."""
    return (None if values.get("sliding_window") is None else size(values, "sliding_window"),) * layers


def window_by_layer(values: Mapping[str, Any], layers: int) -> Windows:
    """Read a window for the layers of type sliding_attention: those from max_window_layers on, unless listed."""
    return _window_if_used(values, layers, partial(_upper_layers, values, layers))


def _window_if_used(values: Mapping[str, Any], layers: int, unlisted: Callable[[], list[str]]) -> Windows:
    """Read a window that use_sliding_window switches on; without layer_types, `unlisted` returns the types."""
    used = boolean(values, "use_sliding_window") and values.get("sliding_window") is not None
    types = layer_types(values, layers) or (unlisted() if used else [FULL] * layers)
    if not used and SLIDING in types:
        raise refusal("layer_types", types, "there is no sliding window without use_sliding_window and sliding_window")
    window = size(values, "sliding_window") if used else None
    return tuple(window if kind == SLIDING else None for kind in types)


def window_by_pattern(pattern: int | str) -> Callable[[Mapping[str, Any], int], Windows]:
    """Return a function that reads the window of the layers of type sliding_attention.

    Unless their types are listed, every n-th layer has full attention, where n is a number or the value of a key.
    """

    def read(values: Mapping[str, Any], layers: int) -> Windows:
        window = None if values.get("sliding_window") is None else size(values, "sliding_window")
        types = layer_types(values, layers)
        if not types and window is not None:
            every = size(values, pattern) if isinstance(pattern, str) else pattern
            types = [FULL if n % every == 0 else SLIDING for n in range(1, layers + 1)]
        types = types or [FULL] * layers
        return tuple(window if kind == SLIDING else None for kind in types)

    return read


def window_of_layers_without_rope(values: Mapping[str, Any], layers: int) -> Windows:
    """Read a window for the layers of type sliding_attention: those without rotary embedding, unless listed."""
    return _window_if_used(
        values, layers, lambda: [FULL if has_rope else SLIDING for has_rope in listed_layers(values, layers)]
    )


def _upper_layers(values: Mapping[str, Any], layers: int) -> list[str]:
    """Return the type of each layer: full attention below max_window_layers, and a window from there on."""
    first = values.get("max_window_layers")
    if not isinstance(first, int) or isinstance(first, bool) or first < 0:
        raise refusal("max_window_layers", first, "it must be a whole number, 0 or above")
    return [FULL if layer < first else SLIDING for layer in range(layers)]


def layer_types(values: Mapping[str, Any], layers: int) -> list[str]:
    """Read the type of each layer, or an empty list where config.json does not list them."""
    types = values.get("layer_types")
    if types is None:
        return []
    if not isinstance(types, list) or not all(isinstance(kind, str) and kind in LAYER_TYPES for kind in types):
        raise refusal("layer_types", types, f"it must be a list of {FULL} and {SLIDING}")
    if len(types) != layers:
        raise refusal("layer_types", types, f"it must have num_hidden_layers ({layers}) entries")
    return [LAYER_TYPES[kind] for kind in types]
