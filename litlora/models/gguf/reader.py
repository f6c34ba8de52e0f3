"""The header of a GGUF file: metadata, and where each tensor is. Imports neither torch nor gguf.

Nothing in the file is believed before it is checked: each length and count against the bytes that are left, and each
tensor against the file's end.
"""

import math
import mmap
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn, Self

from litlora.errors import LitLoraError
from litlora.nn.gguf_types import BLOCK_TYPES, OTHER_TYPES, BlockType

SUFFIX = ".gguf"
MAGIC = b"GGUF"
VERSIONS = (2, 3)
NUMBERS = {0: "<B", 1: "<b", 2: "<H", 3: "<h", 4: "<I", 5: "<i", 6: "<f", 7: "<?", 10: "<Q", 11: "<q", 12: "<d"}
"""Formats of numbers in the metadata, by GGUF's types."""
STRING, ARRAY = 8, 9
LEAST_STRING = 8  # bytes: its length
LEAST_PAIR = LEAST_STRING + 4 + 1
LEAST_TENSOR = LEAST_STRING + 4 + 8 + 4 + 8
MAX_ITEMS = 2**22
"""Entries of an array; vocabularies have less than 2**19, and lists of merges less than 2**20."""
MAX_DIMENSIONS = 4
MAX_ALIGNMENT = 2**16
KIND, ADAPTER = "general.type", "adapter"
ARCHITECTURE, ALIGNMENT, SPLITS = "general.architecture", "general.alignment", "split.count"


@dataclass(frozen=True)
class TensorInfo:
    """Where a tensor is in a file, and how it is stored."""

    name: str
    shape: tuple[int, ...]
    """As in torch: the values of a row, which are next to each other, are the last dimension."""
    type: BlockType
    start: int
    """Its first byte in the file."""

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape[:-1]) * self.type.row_bytes(self.shape[-1])


@dataclass(frozen=True)
class GGUFHeader:
    """What a file holds beside the content of its tensors."""

    path: Path
    metadata: Mapping[str, Any]
    tensors: Mapping[str, TensorInfo]

    @property
    def architecture(self) -> str:
        """llama.cpp's name of what computes the model."""
        return str(self.metadata.get(ARCHITECTURE))

    def require_trainable(self) -> Self:
        """Refuse a file that is no model, or has tensors of a type that litlora cannot dequantize."""
        if self.metadata.get(KIND) == ADAPTER:
            raise LitLoraError(f"{self.path} is an adapter: name the GGUF file of its base")
        known = {kind.name for kind in BLOCK_TYPES.values()}
        for name, info in self.tensors.items():
            if info.type.name not in known:
                fault = f"{name} is stored as {info.type.name}, but only {', '.join(sorted(known))} can be trained over"
                raise LitLoraError(f"{self.path}: {fault}; choose a file of other types, or quantize it again")
        return self


def read_gguf(path: Path) -> GGUFHeader:
    """Read a file's header; LitLoraError names what is wrong with it."""
    if path.exists() and not path.is_file():
        raise LitLoraError(f"{path} is not a file: name a GGUF file")
    try:
        with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content:
            return _Cursor(path, content).header()
    except ValueError as error:  # an empty file cannot be mapped
        raise LitLoraError(f"{path} is empty: replace it with an intact copy") from error
    except OSError as error:
        raise LitLoraError(f"cannot read {path}: {error.strerror}") from error


class _Cursor:
    """A position in a file, which moves over what is read."""

    def __init__(self, path: Path, content: mmap.mmap) -> None:
        self.path, self.content, self.position = path, content, 0

    def header(self) -> GGUFHeader:
        if self.take(4) != MAGIC:
            raise LitLoraError(f"{self.path} is not a GGUF file: it does not start with {MAGIC.decode()}")
        version = self.number("<I")
        if version not in VERSIONS:
            swapped = int.from_bytes(version.to_bytes(4, "little"), "big") in VERSIONS
            what = "big-endian" if swapped else f"of version {version}"
            raise LitLoraError(f"{self.path} is {what}, but only versions 2 and 3, little-endian, are supported")
        tensors = self.count(LEAST_TENSOR, "tensors")
        pairs = self.count(LEAST_PAIR, "keys")
        metadata: dict[str, Any] = {}
        for _ in range(pairs):
            key = self.name("a key")
            if key in metadata:
                self.refuse(f"it has the key {key!r} twice")
            metadata[key] = self.value(self.number("<I"), key)
        if metadata.get(SPLITS, 1) != 1:
            hint = "join them with: llama-gguf-split --merge"
            raise LitLoraError(f"{self.path} is one of {metadata[SPLITS]} files of a model: {hint}")
        return GGUFHeader(self.path, metadata, self.tensors(tensors, self.alignment(metadata)))

    def refuse(self, fault: str) -> NoReturn:
        raise LitLoraError(f"{self.path} is truncated or corrupt: {fault}; replace it with an intact copy")

    def take(self, size: int) -> bytes:
        """Return the next bytes."""
        left = len(self.content) - self.position
        if size > left:
            self.refuse(f"{size} bytes are expected at byte {self.position}, and {left} are left")
        self.position += size
        return self.content[self.position - size : self.position]

    def number(self, form: str) -> Any:
        return struct.unpack(form, self.take(struct.calcsize(form)))[0]

    def count(self, least: int, what: str) -> int:
        """Read a count of things that take `least` bytes each, or more."""
        count: int = self.number("<Q")
        if count * least > (left := len(self.content) - self.position):
            self.refuse(f"{count} {what} do not fit in the {left} bytes that are left")
        return count

    def string(self) -> bytes:
        return self.take(self.number("<Q"))

    def name(self, what: str) -> str:
        try:
            return self.string().decode()
        except UnicodeDecodeError:
            self.refuse(f"{what} is not a text")

    def value(self, kind: int, key: str) -> Any:
        """Read a value of the metadata: a number, a text, or a list of them."""
        if kind == STRING:
            return self.string().decode(errors="replace")
        if kind != ARRAY:
            return self.number(self.format_of(kind, key))
        kind = self.number("<I")
        form = None if kind == STRING else self.format_of(kind, key)
        count = self.count(LEAST_STRING if form is None else struct.calcsize(form), f"entries of {key}")
        if count > MAX_ITEMS:
            self.refuse(f"{key} has {count} entries, more than any model")
        if form is None:
            return [self.string().decode(errors="replace") for _ in range(count)]
        return list(struct.unpack(f"<{count}{form[1]}", self.take(count * struct.calcsize(form))))

    def format_of(self, kind: int, key: str) -> str:
        if kind not in NUMBERS:  # a list of lists as well, which llama.cpp does not read either
            self.refuse(f"{key} is of the unknown type {kind}")
        return NUMBERS[kind]

    def alignment(self, metadata: Mapping[str, Any]) -> int:
        """Return what the starts of tensors are multiples of."""
        alignment = metadata.get(ALIGNMENT, 32)
        if not isinstance(alignment, int) or not 8 <= alignment <= MAX_ALIGNMENT or alignment & (alignment - 1):
            self.refuse(f"{ALIGNMENT} is {alignment}, not a power of 2 from 8 to {MAX_ALIGNMENT}")
        return alignment

    def tensors(self, count: int, alignment: int) -> dict[str, TensorInfo]:
        """Read where the tensors are, relative to the end of the header, and return where they are in the file."""
        relative = [self.tensor() for _ in range(count)]
        start = -(-self.position // alignment) * alignment
        tensors: dict[str, TensorInfo] = {}
        for name, shape, kind, offset in relative:
            if name in tensors:
                self.refuse(f"it has the tensor {name} twice")
            if offset % alignment:
                self.refuse(f"{name} does not start at a multiple of {alignment}")
            tensors[name] = info = TensorInfo(name, shape, kind, start + offset)
            if info.start + info.nbytes > len(self.content):
                end = info.start + info.nbytes
                self.refuse(f"{name} would end at byte {end}, and the file has {len(self.content)}")
        return tensors

    def tensor(self) -> tuple[str, tuple[int, ...], BlockType, int]:
        name = self.name("the name of a tensor")
        dimensions = self.number("<I")
        if not 1 <= dimensions <= MAX_DIMENSIONS:
            self.refuse(f"{name} has {dimensions} dimensions")
        shape = tuple(reversed([self.number("<Q") for _ in range(dimensions)]))
        number = self.number("<I")
        kind = BLOCK_TYPES.get(number) or OTHER_TYPES.get(number)
        if kind is None:
            raise LitLoraError(f"{self.path}: {name} is stored as type {number}, which is not known: quantize it again")
        if 0 in shape or shape[-1] % kind.values:
            self.refuse(f"{name} has the shape {shape}, and blocks of {kind.values} values")
        return name, shape, kind, self.number("<Q")
