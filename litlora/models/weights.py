"""The tensors of a checkpoint: headers of safetensors files, read once, and memory-mapped views of their content."""

import hashlib
import os
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Protocol

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from litlora.errors import LitLoraError
from litlora.models.checkpoint_files import weight_files
from litlora.models.mapped_file import map_file
from litlora.nn.quantization import StoredWeight
from litlora.utils.files import HASH_THREADS, refuse_device

SAMPLES, SAMPLE = 64, 1 << 16  # of a file that go into a fingerprint, and the bytes of each
PIECES, PIECE = 4, 1 << 14  # of a tensor that go into its digest, and the bytes of each
WHOLE = 1 << 22  # bytes up to which tensors are read as a whole
DIGITS = 8  # of each tensor's digest that are recorded, to name those that differ
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


class Stored(Protocol):
    """Where and how a tensor is stored."""

    @property
    def path(self) -> Path: ...

    @property
    def start(self) -> int:
        """Its first byte in the file."""

    @property
    def dtype(self) -> torch.dtype:
        """Of what `view` returns."""

    @property
    def shape(self) -> torch.Size: ...

    @property
    def nbytes(self) -> int: ...

    def view(self, content: Tensor) -> Tensor:
        """Return the tensor, given the content of its file (bytes,)."""


class InFile(Mapping[str, Tensor]):
    """All tensors of a file, by one memory map that lasts as long as any of them."""

    def __init__(self, path: Path, stored: Mapping[str, Stored]) -> None:
        self.content, self.stored = map_file(path), {n: each for n, each in stored.items() if each.path == path}

    def __getitem__(self, name: str) -> Tensor:
        return self.stored[name].view(self.content)

    def __iter__(self) -> Iterator[str]:
        return iter(self.stored)

    def __len__(self) -> int:
        return len(self.stored)


class Weights(Mapping[str, Tensor]):
    """The tensors of a checkpoint by name.

    Each tensor is a memory map of its own: what was read of the file leaves memory with the tensor.
    """

    is_quantized = False
    """Whether the files themselves are quantized."""
    stored: dict[str, Stored]

    def __init__(self, checkpoint_dir: Path, files: Sequence[Path] | None = None) -> None:
        """Read the headers of a checkpoint's files, which are looked for unless they are passed."""
        self.files = weight_files(checkpoint_dir) if files is None else files
        self.stored = {}
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

    def in_file(self, path: Path) -> InFile:
        """Return all tensors of a file."""
        return InFile(path, self.stored)

    def stored_weight(self, name: str, dtype: torch.dtype, device: torch.device) -> StoredWeight | None:
        """Return a tensor as a frozen weight in the storage of a quantized file, if it is one."""
        return None

    def stored_type(self, name: str) -> str | None:
        """Return GGML's name of the type in which a quantized file has a tensor, if it is one."""
        return None


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


def open_safetensors(path: Path) -> Any:
    """Open a safetensors file as a memory map."""
    refuse_device(path)
    try:
        return safe_open(path, framework="pt")
    except SafetensorError as error:
        raise LitLoraError(f"{path} is truncated or not a safetensors file; replace it with an intact copy") from error
    except OSError as error:
        raise LitLoraError(f"cannot read {path}: {error}") from error


def tensor_digests(tensors: Mapping[str, Stored]) -> dict[str, str]:
    """Return a hash of each tensor by name, sorted: equal wherever and beside whatever the tensor is stored.

    It covers dtype, shape and samples of the content, so that a few megabytes are read; of a small model, all of it.
    """
    is_small = sum(tensor.nbytes for tensor in tensors.values()) <= WHOLE
    names = sorted(tensors)
    with ExitStack() as stack, ThreadPoolExecutor(HASH_THREADS) as pool:
        paths = {tensor.path for tensor in tensors.values()}
        files = {path: stack.enter_context(path.open("rb")).fileno() for path in paths}
        digests = pool.map(partial(_digest, files, PIECE if is_small else None), (tensors[name] for name in names))
        return dict(zip(names, digests, strict=True))


def _digest(files: Mapping[Path, int], step: int | None, tensor: Stored) -> str:
    """Hash a piece of a tensor at every `step` bytes, or PIECES of them."""
    digest = hashlib.sha256(f"{tensor.dtype} {list(tensor.shape)}".encode())
    step = step or max(PIECE, tensor.nbytes // PIECES)
    for start in range(0, tensor.nbytes, step):
        digest.update(os.pread(files[tensor.path], min(PIECE, tensor.nbytes - start), tensor.start + start))
    return digest.hexdigest()


def fingerprint(files: Sequence[Path]) -> str:
    """Identify files of weights by a SHA-256 over samples of each, at the cost of reading a few megabytes."""
    digest = hashlib.sha256()
    for path in files:
        size = path.stat().st_size
        with path.open("rb") as file:
            for start in range(0, size, max(SAMPLE, size // SAMPLES)):
                file.seek(start)
                digest.update(file.read(SAMPLE))
    return digest.hexdigest()
