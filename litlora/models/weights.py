"""The tensors of a checkpoint: headers of safetensors files, read once, and memory-mapped views of their content."""

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from litlora.errors import LitLoraError
from litlora.models.checkpoint_files import weight_files

SAMPLES, SAMPLE = 64, 1 << 16  # of a file that go into a fingerprint, and the bytes of each
DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
MASKS = {"BOOL": torch.bool, "U8": torch.uint8}  # as which old checkpoints store causal masks


@dataclass(frozen=True)
class StoredTensor:
    """Where a tensor is stored: its file, its first byte there, its dtype and shape."""

    path: Path
    start: int
    dtype: torch.dtype
    shape: torch.Size

    @property
    def nbytes(self) -> int:
        return self.shape.numel() * self.dtype.itemsize

    def view(self, content: Tensor) -> Tensor:
        """Return the tensor as a view of its file's content (bytes,)."""
        raw = content[self.start : self.start + self.nbytes]
        aligned = raw if self.start % self.dtype.itemsize == 0 else raw.clone()
        return aligned.view(self.dtype).view(self.shape)


class Weights(Mapping[str, Tensor]):
    """The tensors of a checkpoint by name.

    Each tensor is a memory map of its own: what was read of the file leaves memory with the tensor.
    """

    def __init__(self, checkpoint_dir: Path, files: Sequence[Path] | None = None) -> None:
        """Read the headers of a checkpoint's files, which are looked for unless they are passed."""
        self.files = weight_files(checkpoint_dir) if files is None else files
        self.stored: dict[str, StoredTensor] = {}
        for path in self.files:
            header = read_header(path)
            if twice := sorted(header.keys() & self.stored.keys()):
                raise LitLoraError(f"{checkpoint_dir} holds the tensor {twice[0]} twice; download it again")
            self.stored |= header

    def __getitem__(self, name: str) -> Tensor:
        stored = self.stored[name]
        return stored.view(map_file(stored.path))

    def __iter__(self) -> Iterator[str]:
        return iter(self.stored)

    def __len__(self) -> int:
        return len(self.stored)

    def in_file(self, path: Path) -> dict[str, Tensor]:
        """Return all tensors of a file, by one memory map that lasts as long as any of them."""
        content = map_file(path)
        return {name: stored.view(content) for name, stored in self.stored.items() if stored.path == path}


def read_header(path: Path) -> dict[str, StoredTensor]:
    """Read where the tensors of a safetensors file are; only floating-point tensors and masks are accepted."""
    handle = open_safetensors(path)
    names = handle.offset_keys()
    kinds = [(handle.get_slice(name).get_dtype(), torch.Size(handle.get_slice(name).get_shape())) for name in names]
    for name, (dtype, _) in zip(names, kinds, strict=True):
        if dtype not in DTYPES | MASKS:
            raise unsupported_dtype(path.parent, name, dtype)
    header: dict[str, StoredTensor] = {}
    end = path.stat().st_size  # safetensors has checked that the tensors leave no gaps up to here
    for name, (dtype, shape) in reversed(list(zip(names, kinds, strict=True))):
        stored_as = (DTYPES | MASKS)[dtype]
        end -= shape.numel() * stored_as.itemsize
        header[name] = StoredTensor(path, end, stored_as, shape)
    return dict(reversed(header.items()))


def unsupported_dtype(checkpoint_dir: Path, name: str, dtype: object) -> LitLoraError:
    """Return the error that refuses a tensor for its dtype."""
    fault = f"{name} is stored as {dtype}, but only {', '.join(DTYPES)} are supported"
    return LitLoraError(f"{checkpoint_dir}: {fault}; use a checkpoint that is not quantized")


def map_file(path: Path) -> Tensor:
    """Map a file into memory as bytes (size,)."""
    return torch.from_file(str(path), shared=False, size=path.stat().st_size, dtype=torch.uint8)


def open_safetensors(path: Path) -> Any:
    """Open a safetensors file as a memory map."""
    try:
        return safe_open(path, framework="pt")
    except SafetensorError as error:
        raise LitLoraError(f"{path} is truncated or not a safetensors file; replace it with an intact copy") from error
    except OSError as error:
        raise LitLoraError(f"cannot read {path}: {error}") from error


def fingerprint(files: Sequence[Path]) -> str:
    """Identify these weights among others of the same shape, at the cost of reading a few megabytes.

    A SHA-256 over samples of every file, the header with names, shapes and offsets of the tensors among them.
    """
    digest = hashlib.sha256()
    for path in files:
        size = path.stat().st_size
        with path.open("rb") as file:
            for start in range(0, size, max(SAMPLE, size // SAMPLES)):
                file.seek(start)
                digest.update(file.read(SAMPLE))
    return digest.hexdigest()
