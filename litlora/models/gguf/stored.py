"""A tensor of the model as a GGUF file has it."""

from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from litlora.models.gguf.reader import TensorInfo
from litlora.nn.gguf_weight import dequantize


@dataclass(frozen=True)
class StoredInGGUF:
    """A tensor of the model in a GGUF file."""

    path: Path
    info: TensorInfo
    shape: torch.Size
    """Of the tensor in the model, which may be one part of that in the file."""
    part: int | None = None
    order: Tensor | None = None
    """Which of the file's rows is each of the model's."""
    offset: float = 0.0
    """What the file has added to it."""
    dtype: torch.dtype = torch.float32

    @property
    def start(self) -> int:
        """The first byte in the file."""
        return self.info.start

    @property
    def nbytes(self) -> int:
        """The bytes in the file."""
        return self.info.nbytes

    def packed(self, content: Tensor) -> Tensor:
        """Return the bytes of each row (rows, bytes) in the model's order, of the content of the file (bytes,)."""
        raw = content[self.info.start :][: self.info.nbytes].view(-1, self.info.type.row_bytes(self.info.shape[-1]))
        raw = raw if self.part is None else raw[self.part : self.part + 1]
        return raw if self.order is None or len(raw) == 1 else raw[self.order]

    def view(self, content: Tensor) -> Tensor:
        """Return the tensor dequantized."""
        packed, kind = self.packed(content), self.info.type
        values = dequantize(packed, kind, torch.empty(len(packed), packed.shape[1] // kind.nbytes * kind.values))
        values = values.view(self.shape)
        if self.order is not None and values.dim() == 1:
            values = values[self.order]
        return values - self.offset if self.offset else values
