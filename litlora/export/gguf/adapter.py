"""An adapter alone as a GGUF file, which llama.cpp adds to the GGUF file of its base."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from litlora.errors import LitLoraError
from litlora.export.gguf.model import Model
from litlora.export.gguf.writer import write_file
from litlora.models.gguf.library import gguf
from litlora.models.gguf.tensors import HEAD, GGUFTensor, TensorNames


@dataclass(frozen=True)
class LowRank:
    """The pair of a layer: what is added to its weight is scaling · B A."""

    layer: str
    """The layer's name in the model."""
    a: Tensor  # (rank, in)
    b: Tensor  # (out, rank)
    scaling: float


def write_adapter(path: Path, model: Model, pairs: Sequence[LowRank], outtype: str) -> None:
    """Write an adapter of a model.

    llama.cpp scales each pair by alpha / rank, with one alpha for all: where that is not the scaling of a layer, its B
    takes up the difference.
    """
    own = model.architecture
    if model.config.tie_word_embeddings and any(f"{pair.layer}.weight" == HEAD for pair in pairs):
        fault = "llama.cpp cannot adapt the output head of a model with tied embeddings alone"
        raise LitLoraError(f"--format gguf-lora: {fault}; export it merged with --format gguf")
    alpha = next((pair.scaling * len(pair.a) for pair in pairs if pair.scaling), 1.0)  # 0 would leave scales out
    names = TensorNames(own, model.config)
    tensors = [tensor for pair in pairs for tensor in _tensors(names, pair, alpha)]

    def describe(writer: gguf.GGUFWriter) -> None:
        writer.add_type("adapter")
        writer.add_name(model.name)
        writer.add_string(gguf.Keys.Adapter.TYPE, "lora")
        writer.add_float32(gguf.Keys.Adapter.LORA_ALPHA, alpha)

    write_file(path, own.name, outtype, tensors, describe)


def _tensors(names: TensorNames, pair: LowRank, alpha: float) -> Iterator[GGUFTensor]:
    weight = f"{pair.layer}.weight"
    factor = pair.scaling * len(pair.a) / alpha
    name = names.of(weight)
    yield GGUFTensor(f"{name}.lora_a", tuple(pair.a.shape), lambda: pair.a)
    yield GGUFTensor(f"{name}.lora_b", tuple(pair.b.shape), lambda: names.rows(weight, pair.b.float() * factor))
