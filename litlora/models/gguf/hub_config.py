"""The config.json of the model in a GGUF file, from its metadata and the names of its tensors."""

import struct
from collections.abc import Iterator
from typing import Any, NoReturn

from litlora.errors import LitLoraError
from litlora.models.gguf.reader import GGUFHeader

CLASSES = {
    "llama": "LlamaForCausalLM",
    "qwen2": "Qwen2ForCausalLM",
    "qwen3": "Qwen3ForCausalLM",
    "smollm3": "SmolLM3ForCausalLM",
}
"""The class in transformers of each of llama.cpp's architectures whose config.json can be rebuilt."""
SIZES = {
    "hidden_size": "embedding_length",
    "intermediate_size": "feed_forward_length",
    "num_hidden_layers": "block_count",
    "num_attention_heads": "attention.head_count",
    "max_position_embeddings": "context_length",
}
EPS, THETA, KV_HEADS = "attention.layer_norm_rms_epsilon", "rope.freq_base", "attention.head_count_kv"
HEAD_SIZES = "attention.key_length", "attention.value_length", "rope.dimension_count"
SCALING, SCALING_FACTOR, NO_SCALING = "rope.scaling.type", "rope.scaling.factor", "none"
KNOWN = {*SIZES.values(), EPS, THETA, KV_HEADS, *HEAD_SIZES, SCALING, "vocab_size"}
EMBEDDING, HEAD, FACTORS = "token_embd.weight", "output.weight", "rope_freqs.weight"
LLAMA_3 = {"low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}
"""What is the same in all of Meta's models; the factor is the largest divisor."""


def config_of(header: GGUFHeader) -> dict[str, Any]:
    """Return the content of config.json; LitLoraError where metadata and names do not tell it."""
    return _Rebuilt(header).config()


def scaling_of(header: GGUFHeader) -> Any:
    """Return the rotary scaling of a file: a factor without a type is one of linear scaling to llama.cpp."""
    factor = header.metadata.get(f"{header.architecture}.{SCALING_FACTOR}")
    return header.metadata.get(f"{header.architecture}.{SCALING}", "linear" if factor else NO_SCALING)


def shortest(value: float) -> float:
    """Return the shortest decimal number that is this one in float32, as config.json would have it."""
    rounded = (float(f"{value:.{digits}g}") for digits in range(1, 18))
    return next((number for number in rounded if struct.pack("<f", number) == struct.pack("<f", value)), value)


def not_rebuilt(header: GGUFHeader, fault: str) -> LitLoraError:
    """Return the error of a file whose config.json has to be given."""
    hint = "add the model's config.json to the folder of --checkpoint_dir"
    return LitLoraError(f"config.json cannot be rebuilt exactly from {header.path} ({fault}): {hint}")


class _Rebuilt:
    """A config that is rebuilt from metadata."""

    def __init__(self, header: GGUFHeader) -> None:
        self.header, self.arch = header, header.architecture
        if self.arch not in CLASSES:
            self.refuse(f"its architecture is {self.arch}, and only {', '.join(CLASSES)} can be")
        if (kind := scaling_of(header)) != NO_SCALING:  # the context's length may be the base's or the extended one
            self.refuse(f"its rotary scaling is {kind}")
        for key, value in header.metadata.items():
            name = key.removeprefix(f"{self.arch}.")
            if name != key and name not in KNOWN and value:
                self.refuse(f"{key} is {value}, which is not known")

    def refuse(self, fault: str) -> NoReturn:
        raise not_rebuilt(self.header, fault)

    def config(self) -> dict[str, Any]:
        """Return the content of config.json."""
        values = {key: self.size(name) for key, name in SIZES.items()}
        heads = values["num_attention_heads"]
        return {
            "architectures": [CLASSES[self.arch]],
            "model_type": self.arch,
            "vocab_size": self.vocab_size(),
            **values,
            "num_key_value_heads": self.size(KV_HEADS, heads),
            "head_dim": self.head_dim(values["hidden_size"] // heads),
            "rms_norm_eps": self.number(EPS),
            "rope_parameters": self.rope(),
            "tie_word_embeddings": HEAD not in self.header.tensors,
            **dict(self.biases()),
            **dict(self.special_tokens()),
        }

    def number(self, name: str, default: float | None = None) -> float:
        value = self.header.metadata.get(f"{self.arch}.{name}", default)
        if isinstance(value, bool) or not isinstance(value, int | float):
            self.refuse(f"its {self.arch}.{name} is {value}")
        return shortest(value) if isinstance(value, float) else value

    def size(self, name: str, default: int | None = None) -> int:
        value = self.number(name, default)
        if not isinstance(value, int) or value < 1:
            self.refuse(f"its {self.arch}.{name} is {value}")
        return value

    def vocab_size(self) -> int:
        if EMBEDDING not in self.header.tensors:
            self.refuse(f"it has no {EMBEDDING}")
        return self.header.tensors[EMBEDDING].shape[0]

    def head_dim(self, default: int) -> int:
        sizes = {self.size(name, default) for name in HEAD_SIZES}
        if len(sizes) != 1:
            self.refuse(f"heads of keys, values and rotary embedding differ in size: {sorted(sizes)}")
        return sizes.pop()

    def rope(self) -> dict[str, Any]:
        """Return the rotary embedding; that of Llama 3 by the divisors of its frequencies, which are compared later."""
        theta = {"rope_theta": self.number(THETA, 10000.0)}
        if FACTORS in self.header.tensors:
            return {"rope_type": "llama3", **theta, "factor": self.largest_divisor(), **LLAMA_3}
        return {"rope_type": "default", **theta}

    def largest_divisor(self) -> float:
        info = self.header.tensors[FACTORS]
        if info.type.name != "F32":
            self.refuse(f"{FACTORS} is stored as {info.type.name}")
        with self.header.path.open("rb") as file:
            file.seek(info.start)
            content = file.read(info.nbytes)
        return shortest(max(value for (value,) in struct.iter_unpack("<f", content)))

    def biases(self) -> Iterator[tuple[str, bool]]:
        """Yield the flags of biases, where the family has them."""
        names = {"attention_bias": "blk.0.attn_q.bias", "mlp_bias": "blk.0.ffn_up.bias"}
        for flag, tensor in names.items():
            if self.arch != "qwen2":
                yield flag, tensor in self.header.tensors

    def special_tokens(self) -> Iterator[tuple[str, Any]]:
        for name in ("bos", "eos"):
            token = self.header.metadata.get(f"tokenizer.ggml.{name}_token_id")
            if isinstance(token, int):
                yield f"{name}_token_id", token
