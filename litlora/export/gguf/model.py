"""A whole model as a GGUF file."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from torch import Tensor

from litlora.data.prompts.styles import PromptStyle
from litlora.data.tokenizer import Tokenizer
from litlora.export.gguf.tokenizer import add_tokenizer
from litlora.export.gguf.writer import write_file
from litlora.models.config import GPTConfig
from litlora.models.gguf.architectures import Architecture, architecture_of_checkpoint
from litlora.models.gguf.library import gguf
from litlora.models.gguf.metadata import add_metadata
from litlora.models.gguf.tensors import model_tensors


@dataclass(frozen=True)
class Model:
    """What a file is written from."""

    name: str
    hub_config: Mapping[str, Any]
    """The content of config.json."""
    config: GPTConfig
    shapes: Mapping[str, tuple[int, ...]]
    """Of each tensor, by the model's names."""
    read: Callable[[str], Tensor]
    """Returns a tensor by the model's name."""
    tokenizer: Tokenizer
    style: PromptStyle
    """Of the prompts that it was trained on."""

    def reading(self, read: Callable[[str], Tensor], *, untied: bool) -> "Model":
        """Return the model with other tensors, and with an output head of its own if it is untied."""
        config = replace(self.config, tie_word_embeddings=False) if untied else self.config
        return replace(self, config=config, read=read)

    @property
    def architecture(self) -> Architecture:
        """llama.cpp's implementation; LitLoraError where there is none that computes the same."""
        return architecture_of_checkpoint(self.hub_config, self.config)


def write_model(path: Path, model: Model, outtype: str) -> None:
    """Write a model with its metadata and tokenizer."""
    own = model.architecture
    tensors = list(model_tensors(own, model.config, dict(model.shapes), model.read))

    def describe(writer: gguf.GGUFWriter) -> None:
        writer.add_type("model")
        writer.add_name(model.name)
        add_metadata(writer, own, model.config)
        add_tokenizer(writer, model.tokenizer, model.config.vocab_size, model.style)

    write_file(path, own.name, outtype, tensors, describe)
