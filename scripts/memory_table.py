"""Print the peak memory that LoRA and QLoRA need on a GPU for Llamas of several sizes, computed from their shapes."""

from collections.abc import Iterable, Iterator, Sequence

import torch

from litlora.lora.config import TARGET_MODULES, LoRAConfig
from litlora.models.config import GPTConfig
from litlora.train.memory_estimate import Load, Network, breakdown

COMMON = {"max_position_embeddings": 4096, "rms_norm_eps": 1e-5, "rope_scaling": None, "sliding_window": None}
# vocabulary, hidden, intermediate, layers, heads, heads of keys and values, width of a head
SHAPES = {
    "1B (Llama 3.2)": (128256, 2048, 8192, 16, 32, 8, 64),
    "7B (Llama 2)": (32000, 4096, 11008, 32, 32, 32, 128),
    "13B (Llama 2)": (32000, 5120, 13824, 40, 40, 40, 128),
    "70B (Llama 2)": (32000, 8192, 28672, 80, 64, 8, 128),
}
TIED = {"1B (Llama 3.2)"}
BASES = {"bfloat16": None, "NF4": "bnb.nf4", "NF4, double": "bnb.nf4-dq"}
TOKENS = 512
LORA = LoRAConfig(8, 16, 0.05, TARGET_MODULES["query"] + TARGET_MODULES["value"])
COLUMNS = ("model", "base", "weights", "adapter, gradients, AdamW", "activations", "peak", "activations", "peak")


def config(name: str) -> GPTConfig:
    vocabulary, hidden, inner, layers, heads, keys, width = SHAPES[name]
    return GPTConfig(
        vocabulary, hidden, inner, layers, heads, keys, width,
        rope_theta=1e4, tie_word_embeddings=name in TIED, **COMMON,
    )  # fmt: skip


def gigabytes(name: str, base: str, *, checkpointing: bool, tokens: int = TOKENS) -> tuple[float, float, float, float]:
    """Return 10^9 bytes of the weights, of all that is trained, of the activations, and at the peak."""
    network = Network(config(name), LORA, "bf16-true", BASES[base], torch.device("cuda"))
    parts = breakdown(network, Load((tokens,), tokens, checkpointing), "AdamW")
    trained = sum(parts[part] for part in ("adapter, float32", "its gradients", "optimizer state"))
    passing = parts["activations"] + parts["temporaries"] + parts["cuBLAS"]
    peak = sum(parts.values())
    return (peak - trained - passing) / 1e9, trained / 1e9, passing / 1e9, peak / 1e9


def rows() -> Iterator[tuple[str, ...]]:
    for name in SHAPES:
        for base in BASES:
            whole, again = (gigabytes(name, base, checkpointing=on) for on in (False, True))
            yield name, base, *(f"{value:.2f}" for value in (*whole, *again[2:]))


def print_table(columns: Sequence[str], rows: Iterable[Sequence[str]]) -> None:
    """Print a table in Markdown: two columns of names, and numbers."""
    print(f"| {' | '.join(columns)} |")
    print(f"| --- | --- | {' | '.join(['--:'] * (len(columns) - 2))} |")
    for row in rows:
        print(f"| {' | '.join(row)} |")


def main() -> None:
    print_table(COLUMNS, rows())


if __name__ == "__main__":
    main()
