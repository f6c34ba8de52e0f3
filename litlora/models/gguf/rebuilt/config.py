"""The config.json of the model in a GGUF file, from its metadata and its tensors of a few numbers."""

from collections.abc import Iterator, Mapping
from typing import Any

from litlora.models.gguf.reader import GGUFHeader
from litlora.models.gguf.rebuilt.families import FAMILIES, WINDOW_PATTERN, HubFamily
from litlora.models.gguf.rebuilt.metadata import Metadata
from litlora.models.gguf.rebuilt.rope import DIM, ROPE_KEYS, rope_of, unscaled_length
from litlora.models.rope_config import LAYER_TYPES

LENGTH = "context_length"
SIZES = {
    "hidden_size": "embedding_length",
    "intermediate_size": "feed_forward_length",
    "num_hidden_layers": "block_count",
    "num_attention_heads": "attention.head_count",
}
EPS, KV_HEADS = "attention.layer_norm_rms_epsilon", "attention.head_count_kv"
KEY_DIM, VALUE_DIM = "attention.key_length", "attention.value_length"
KNOWN = {*SIZES.values(), LENGTH, EPS, KV_HEADS, KEY_DIM, VALUE_DIM, *ROPE_KEYS, "vocab_size"}
EMBEDDING, HEAD = "token_embd.weight", "output.weight"
LAYERS_OF_LARGEST_GEMMAS = 46, 62


def config_of(header: GGUFHeader) -> dict[str, Any]:
    """Return the content of config.json; LitLoraError where metadata and tensors do not tell it."""
    metadata = Metadata(header)
    if metadata.arch not in FAMILIES:
        metadata.refuse(f"its architecture is {metadata.arch}, and only {', '.join(FAMILIES)} can be")
    family = FAMILIES[metadata.arch]
    _refuse_unknown(metadata, family)
    sizes = {key: metadata.size(name) for key, name in SIZES.items()}
    if (layers := sizes["num_hidden_layers"]) > len(header.tensors):
        metadata.refuse(f"its {metadata.arch}.block_count is {layers}, more than it has tensors")
    head_dim, length = _head_dim(metadata, family, sizes), metadata.size(LENGTH)
    return {
        "architectures": [f"{family.name}ForCausalLM"],
        "model_type": family.model_type or metadata.arch,
        "vocab_size": _vocab_size(metadata),
        **sizes,
        "max_position_embeddings": unscaled_length(metadata, length),
        "num_key_value_heads": metadata.size(KV_HEADS, sizes["num_attention_heads"]),
        "head_dim": head_dim,
        "rms_norm_eps": metadata.number(EPS),
        **rope_of(metadata, family, head_dim, length),
        "tie_word_embeddings": HEAD not in header.tensors,
        **dict(_of_family(metadata, family, sizes, head_dim)),
        **dict(_special_tokens(header)),
    }


def _refuse_unknown(metadata: Metadata, family: HubFamily) -> None:
    known = KNOWN | {*family.numbers.values(), *family.ignored} | ({WINDOW_PATTERN} if family.has_windows else set())
    for key, value in metadata.header.metadata.items():
        name = key.removeprefix(f"{metadata.arch}.")
        if name != key and name not in known and value:
            metadata.refuse(f"{key} is {value}, which is not known")


def _vocab_size(metadata: Metadata) -> int:
    if EMBEDDING not in metadata.header.tensors:
        metadata.refuse(f"it has no {EMBEDDING}")
    return metadata.header.tensors[EMBEDDING].shape[0]


def _head_dim(metadata: Metadata, family: HubFamily, sizes: Mapping[str, int]) -> int:
    default = sizes["hidden_size"] // sizes["num_attention_heads"]
    keys, values = (metadata.size(name, default) for name in (KEY_DIM, VALUE_DIM))
    rotated = metadata.size(DIM, keys)
    if keys != values or (rotated != keys and not family.is_partly_rotated):
        metadata.refuse(f"heads of keys, values and rotary embedding differ in size: {keys}, {values}, {rotated}")
    return keys


def _of_family(
    metadata: Metadata, family: HubFamily, sizes: Mapping[str, int], head_dim: int
) -> Iterator[tuple[str, Any]]:
    """Yield the keys that not all families have."""
    for flag, tensor in family.biases.items():
        yield flag, tensor in metadata.header.tensors
    for key, name in family.numbers.items():
        if metadata.get(name) is not None:
            yield key, metadata.number(name)
    if family.has_windows and (pattern := metadata.get(WINDOW_PATTERN)) is not None:
        yield "layer_types", _layer_types(metadata, pattern, sizes["num_hidden_layers"])
    if family.scales_by_pre_attn_scalar:
        width = sizes["hidden_size"] // sizes["num_attention_heads"]
        yield "query_pre_attn_scalar", width if sizes["num_hidden_layers"] in LAYERS_OF_LARGEST_GEMMAS else head_dim


def _layer_types(metadata: Metadata, pattern: Any, layers: int) -> list[str]:
    """Return which layers have a sliding window: those of a list, or all but every n-th."""
    if isinstance(pattern, int) and pattern > 0:
        pattern = [(layer + 1) % pattern != 0 for layer in range(layers)]
    if not isinstance(pattern, list) or len(pattern) != layers:
        metadata.refuse(f"its {metadata.arch}.{WINDOW_PATTERN} is {pattern}")
    full, sliding = LAYER_TYPES
    return [sliding if has_window else full for has_window in pattern]


def _special_tokens(header: GGUFHeader) -> Iterator[tuple[str, int]]:
    for name in ("bos", "eos"):
        token = header.metadata.get(f"tokenizer.ggml.{name}_token_id")
        if isinstance(token, int):
            yield f"{name}_token_id", token
