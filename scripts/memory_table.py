"""Print the peak memory that LoRA and QLoRA need on a GPU for Llamas of several sizes, computed from their shapes."""

from collections.abc import Iterable, Iterator, Sequence

import torch

from litlora.lora.config import TARGET_MODULES, LoRAConfig
from litlora.models.config import GPTConfig
from litlora.train.memory_estimate import breakdown
from litlora.train.network_shape import Load, Network

KEYS = (
    "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
    "num_key_value_heads", "head_dim",
)  # fmt: skip
SHAPES = {
    "135M (SmolLM2)": (49152, 576, 1536, 30, 9, 3, 64),
    "1B (Llama 3.2)": (128256, 2048, 8192, 16, 32, 8, 64),
    "7B (Llama 2)": (32000, 4096, 11008, 32, 32, 32, 128),
    "8B (Llama 3.1)": (128256, 4096, 14336, 32, 32, 8, 128),
    "13B (Llama 2)": (32000, 5120, 13824, 40, 40, 40, 128),
    "70B (Llama 2)": (32000, 8192, 28672, 80, 64, 8, 128),
}
TIED = {"135M (SmolLM2)", "1B (Llama 3.2)"}
TABLE = tuple(name for name in SHAPES if name.endswith("(Llama 2)") or name.startswith("1B"))
BASES = {"bfloat16": None, "NF4": "bnb.nf4", "NF4, double": "bnb.nf4-dq"}
TOKENS = 512
LORA = LoRAConfig(8, 16, 0.05, TARGET_MODULES["query"] + TARGET_MODULES["value"])
COLUMNS = ("model", "base", "weights", "adapter, gradients, AdamW", "activations", "peak", "activations", "peak")


def config(name: str) -> GPTConfig:
    shape = dict(zip(KEYS, SHAPES[name], strict=True))
    return GPTConfig.from_hub({"model_type": "llama", "tie_word_embeddings": name in TIED} | shape)


def gigabytes(name: str, base: str, *, checkpointing: bool, tokens: int = TOKENS) -> tuple[float, float, float, float]:
    """Return gigabytes of weights, of adapter, gradients and optimizer state, of activations, and at the peak."""
    network = Network(config(name), LORA, "bf16-true", BASES[base], torch.device("cuda"))
    parts = breakdown(network, Load((tokens,), tokens, checkpointing), "AdamW")
    training_state = sum(parts[part] for part in ("adapter, float32", "its gradients", "optimizer state"))
    activations = parts["activations"] + parts["temporaries"] + parts["cuBLAS"]
    peak = sum(parts.values())
    weights = peak - training_state - activations
    return weights / 1e9, training_state / 1e9, activations / 1e9, peak / 1e9


def rows() -> Iterator[tuple[str, ...]]:
    for name in TABLE:
        for base in BASES:
            saved, recomputed = (gigabytes(name, base, checkpointing=on) for on in (False, True))
            yield name, base, *(f"{value:.2f}" for value in (*saved, *recomputed[2:]))


def print_table(columns: Sequence[str], rows: Iterable[Sequence[str]]) -> None:
    """Print a Markdown table: two columns of text, then numbers."""
    print(f"| {' | '.join(columns)} |")
    print(f"| --- | --- | {' | '.join(['--:'] * (len(columns) - 2))} |", flush=True)
    for row in rows:
        print(f"| {' | '.join(row)} |", flush=True)


def main() -> None:
    print_table(COLUMNS, rows())


if __name__ == "__main__":
    main()
