"""Files of rows before they are parsed: their text in UTF-8, unpacked, piece by piece or line by line."""

import codecs
import gzip
import io
import os
import zlib
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from itertools import chain
from pathlib import Path, PurePath
from typing import BinaryIO, Self

from litlora.errors import LitLoraError

BOM_UTF8 = codecs.BOM_UTF8
BYTE_ORDER_MARKS = {
    BOM_UTF8: "utf-8-sig", codecs.BOM_UTF32_LE: "utf-32", codecs.BOM_UTF32_BE: "utf-32",
    codecs.BOM_UTF16_LE: "utf-16", codecs.BOM_UTF16_BE: "utf-16",
}  # fmt: skip
"""Encodings by the bytes that a file begins with, UTF-32 before UTF-16, which begins with the same two."""
UTF8 = ("utf-8", "utf-8-sig")
CHUNK = 1 << 20  # bytes that are read at once
MAX_ROW = 32 << 20
"""Bytes of the longest row. A longer one has no end: a file without line ends, or with a bracket that is not closed."""
UNPACKED, RATIO = 1 << 30, 100
"""Bytes to which a gzip file may unpack, and the multiple of its size to which a larger one may: texts have 3 to 20."""


@dataclass(frozen=True)
class RawFile:
    """A file before it is parsed, and its name in error messages."""

    name: str
    suffix: str
    """The end of its name that tells its format, such as .jsonl or .csv.gz."""
    open: Callable[[], io.BufferedIOBase]
    encoding: str | None = None
    """The encoding of its text; None for the one that its byte order mark names, else UTF-8."""

    @classmethod
    def from_path(cls, path: Path, if_missing: str) -> Self:
        """Return a file on disk that can be read; `if_missing` is the error message if there is none."""
        open_file(path, if_missing).close()
        return cls(str(path), suffix_of(path.name), lambda: open_file(path, if_missing))

    @classmethod
    def from_bytes(cls, name: str, suffix: str, content: bytes) -> Self:
        """Return a file that is in memory."""
        return cls(name, suffix, lambda: io.BytesIO(content))

    @classmethod
    def from_descriptor(cls, name: str, suffix: str, descriptor: int) -> Self:
        """Return an open file, which need not have a name on the disk."""
        return cls(name, suffix, lambda: io.BufferedReader(_SharedFile(descriptor)))

    def chunks(self) -> Iterator[bytes]:
        """Yield the text in UTF-8, unpacked and without a byte order mark."""
        with self.open() as opened:
            is_packed = self.suffix.lower().endswith(".gz")
            stored = _unpacked(self.name, opened) if is_packed else read_chunks(opened)
            first = next(stored, b"")
            marked = (encoding for mark, encoding in BYTE_ORDER_MARKS.items() if first.startswith(mark))
            encoding = next(marked, self.encoding or "utf-8")
            if encoding.lower() in UTF8:
                yield first.removeprefix(BOM_UTF8)
                yield from stored
            else:
                yield from _recoded(self.name, chain([first], stored), encoding)

    def lines(self) -> Iterator[bytes]:
        """Yield the lines with their ends, in UTF-8."""
        return split_lines(self.name, self.chunks())


class _SharedFile(io.RawIOBase):
    """A reader with a position of its own in a file that others read as well."""

    def __init__(self, descriptor: int) -> None:
        self._descriptor = descriptor
        self._position = 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def readinto(self, buffer: bytearray | memoryview) -> int:  # type: ignore[override]
        content = os.pread(self._descriptor, len(buffer), self._position)
        buffer[: len(content)] = content
        self._position += len(content)
        return len(content)

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        start = {os.SEEK_SET: 0, os.SEEK_CUR: self._position, os.SEEK_END: os.fstat(self._descriptor).st_size}[whence]
        self._position = start + offset
        return self._position


def open_file(path: Path, if_missing: str) -> io.BufferedReader:
    """Open a file for reading; `if_missing` is the error message if there is none."""
    try:
        return path.open("rb")
    except FileNotFoundError as error:
        raise LitLoraError(if_missing) from error
    except OSError as error:
        raise LitLoraError(f"cannot read {path}: {error.strerror}") from error


def suffix_of(name: str) -> str:
    """Return the end of a file's name that tells its format, such as .jsonl or .csv.gz."""
    path = PurePath(name)
    return "".join(path.suffixes[-2:]) if path.suffix.lower() == ".gz" else path.suffix


def split_lines(name: str, chunks: Iterable[bytes]) -> Iterator[bytes]:
    r"""Yield the lines of a text with their ends; a \r alone ends a line too."""
    rest, number = b"", 1
    for chunk in chunks:
        # The last line may continue in the next chunk, or its \r be followed by \n
        *lines, rest = (rest + chunk).splitlines(keepends=True) or [b""]
        yield from lines
        number += len(lines)
        if len(rest) > MAX_ROW:
            raise LitLoraError(
                f"{name} line {number} is longer than {MAX_ROW >> 20} MB: give each row a line of its own"
            )
    if rest:
        yield rest


def not_utf8(error: UnicodeDecodeError) -> str:
    """Return what is wrong with a text that is not UTF-8, and the way out."""
    byte = f"the byte 0x{error.object[error.start]:02x} is not valid UTF-8"
    return f"{byte}; save the file as UTF-8, or prepare it with its encoding, such as --encoding cp1252"


def read_chunks(file: io.BufferedIOBase | BinaryIO) -> Iterator[bytes]:
    """Yield the content of a file piece by piece."""
    while chunk := file.read(CHUNK):
        yield chunk


def _unpacked(name: str, packed: io.BufferedIOBase) -> Iterator[bytes]:
    """Yield the content of a gzip file, as long as it is no bomb."""
    size = 0
    try:
        with gzip.GzipFile(fileobj=packed) as unpacked:
            for chunk in read_chunks(unpacked):
                size += len(chunk)
                if size > (limit := max(UNPACKED, RATIO * packed.tell())):
                    fault = f"unpacks to more than {limit >> 20:,} MB, over {RATIO} times its size"
                    raise LitLoraError(f"{name} {fault}: unpack it yourself if that is what it should hold")
                yield chunk
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise LitLoraError(f"{name} is not a valid gzip file ({error}): fetch or compress it again") from error


def _recoded(name: str, chunks: Iterable[bytes], encoding: str) -> Iterator[bytes]:
    try:
        io.TextIOWrapper(io.BytesIO(), encoding)  # refuses a codec that is no encoding of text, such as hex
        decoder = codecs.getincrementaldecoder(encoding)()
        for chunk in chunks:
            yield decoder.decode(chunk).encode()
        yield decoder.decode(b"", final=True).encode()
    except LookupError as error:
        raise LitLoraError(f"--encoding ({encoding}) is unknown: give one such as cp1252, latin-1 or utf-16") from error
    except UnicodeError as error:
        raise LitLoraError(f"{name} is not valid {encoding} ({error})") from error
