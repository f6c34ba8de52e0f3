"""The header of a GGUF file is not believed before it is checked."""

import os
import struct
from pathlib import Path

import gguf
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from litlora.errors import LitLoraError
from litlora.models.gguf.reader import GGUFHeader, read_gguf
from litlora.nn.gguf_types import OTHER_TYPES


def text(value: str) -> bytes:
    return struct.pack("<Q", len(value)) + value.encode()


def pair(key: str, kind: int, content: bytes) -> bytes:
    return text(key) + struct.pack("<I", kind) + content


def tensor(name: str = "a", dims: tuple[int, ...] = (8,), kind: int = 0, offset: int = 0) -> bytes:
    sizes = b"".join(struct.pack("<Q", dim) for dim in dims)
    return text(name) + struct.pack("<I", len(dims)) + sizes + struct.pack("<IQ", kind, offset)


def file(
    pairs: tuple[bytes, ...] = (),
    tensors: tuple[bytes, ...] = (),
    data: bytes = b"\0" * 64,
    version: int = 3,
    counts: tuple[int, int] | None = None,
) -> bytes:
    n_tensors, n_pairs = counts or (len(tensors), len(pairs))
    header = b"GGUF" + struct.pack("<IQQ", version, n_tensors, n_pairs) + b"".join(pairs) + b"".join(tensors)
    return header + b"\0" * (-len(header) % 32) + data


def read(tmp_path: Path, content: bytes) -> GGUFHeader:
    path = tmp_path / "model.gguf"
    path.write_bytes(content)
    return read_gguf(path)


def test_a_file_of_the_gguf_package_is_read_alike(tmp_path):
    writer = gguf.GGUFWriter(tmp_path / "model.gguf", "llama")
    writer.add_float32("llama.x", 0.5)
    writer.add_array("tokens", ["a", "é", ""])
    writer.add_array("scores", [1.5, -2.0])
    writer.add_bool("flag", True)
    one, other = np.arange(12, dtype=np.float32).reshape(3, 4), np.ones((2, 32), np.float16)
    writer.add_tensor("one", one)
    writer.add_tensor("other", other)
    for write in (writer.write_header_to_file, writer.write_kv_data_to_file, writer.write_tensors_to_file):
        write()
    writer.close()
    header = read_gguf(tmp_path / "model.gguf")
    assert header.architecture == "llama"
    expected = {"llama.x": 0.5, "tokens": ["a", "é", ""], "scores": [1.5, -2.0], "flag": True}
    assert expected.items() <= header.metadata.items()
    content = (tmp_path / "model.gguf").read_bytes()
    info = header.tensors["one"]
    assert (info.shape, info.type.name) == ((3, 4), "F32")
    assert content[info.start :][: info.nbytes] == one.tobytes()
    assert header.tensors["other"].nbytes == other.nbytes


HUGE = 2**63
CASES = {
    "empty": (b"", "is empty: replace it with an intact copy"),
    "another format": (b"PK\3\4" + b"\0" * 60, "is not a GGUF file: it does not start with GGUF"),
    "only the magic": (b"GGUF", "is truncated or corrupt: 4 bytes are expected at byte 4, and 0 are left"),
    "version 1": (file(version=1), "is of version 1, but only versions 2 and 3, little-endian, are supported"),
    "big-endian": (file(version=3 << 24), "is big-endian, but only versions 2 and 3, little-endian, are supported"),
    "too many keys": (file(counts=(0, HUGE)), f"{HUGE} keys do not fit in the"),
    "too many tensors": (file(counts=(HUGE, 0)), f"{HUGE} tensors do not fit in the"),
    "a long key": (file((struct.pack("<Q", HUGE),), counts=(0, 1)), f"{HUGE} bytes are expected"),
    "a long text": (file((pair("k", 8, struct.pack("<Q", 2**40)),)), f"{2**40} bytes are expected"),
    "a long list": (file((pair("k", 9, struct.pack("<IQ", 6, 2**61)),)), f"{2**61} entries of k do not fit"),
    "a list of lists": (file((pair("k", 9, struct.pack("<IQ", 9, 1)),)), "k is of the unknown type 9"),
    "an unknown type": (file((pair("k", 77, b"\0" * 8),)), "k is of the unknown type 77"),
    "a key twice": (file((pair("k", 4, b"\0" * 4),) * 2), "it has the key 'k' twice"),
    "a name that is no text": (file((struct.pack("<Q", 1) + b"\xff" + b"\0" * 8,)), "a key is not a text"),
    "alignment 0": (file((pair("general.alignment", 4, b"\0" * 4),)), "general.alignment is 0, not a power of 2"),
    "an alignment as text": (file((pair("general.alignment", 8, text("32")),)), "general.alignment is 32, not a power"),
    "one of several files": (
        file((pair("split.count", 2, b"\2\0"),)), "is one of 2 files of a model: join them with: llama-gguf-split"
    ),
    "no dimension": (file(tensors=(tensor(dims=()) + b"\0" * 8,)), "a has 0 dimensions"),
    "many dimensions": (file(tensors=(tensor(dims=(1,) * 5),)), "a has 5 dimensions"),
    "a dimension of 0": (file(tensors=(tensor(dims=(0, 2)),)), "a has the shape (2, 0)"),
    "a product beyond 64 bits": (file(tensors=(tensor(dims=(2**32, 2**32)),)), "a would end at byte 737"),
    "part of a block": (file(tensors=(tensor(dims=(33,), kind=2),)), "a has the shape (33,), and blocks of 32 values"),
    "beyond the end": (file(tensors=(tensor(dims=(17,)),)), "a would end at byte 132, and the file has 128"),
    "an offset beyond the end": (file(tensors=(tensor(offset=2**62),)), "a would end at byte 4611686018427388"),
    "a crooked offset": (file(tensors=(tensor(offset=4),)), "a does not start at a multiple of 32"),
    "a tensor twice": (file(tensors=(tensor(), tensor())), "it has the tensor a twice"),
    "part of a block of another type": (file(tensors=(tensor(kind=23),)), "a has the shape (8,), and blocks of 256"),
    "beyond the end in another type": (
        file(tensors=(tensor(dims=(256,), kind=23),)), "a would end at byte 200, and the file has 128"
    ),
    "a type unknown": (file(tensors=(tensor(kind=4096),)), "a is stored as type 4096, which is not known"),
}  # fmt: skip


@pytest.mark.parametrize("name", CASES)
def test_faults_are_named_in_one_sentence(name, tmp_path):
    content, sentence = CASES[name]
    with pytest.raises(LitLoraError) as refused:
        read(tmp_path, content)
    assert sentence in str(refused.value)
    assert str(refused.value).startswith(str(tmp_path / "model.gguf"))
    assert "\n" not in str(refused.value)


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(LitLoraError, match=r"^cannot read .*model\.gguf: No such file or directory$"):
        read_gguf(tmp_path / "model.gguf")


def test_what_is_no_file_is_refused(tmp_path):
    os.mkfifo(tmp_path / "model.gguf")  # which nobody writes to
    with pytest.raises(LitLoraError, match=r"model\.gguf is not a file: name a GGUF file$"):
        read_gguf(tmp_path / "model.gguf")


WHOLE = file((pair("k", 9, struct.pack("<IQ", 8, 2) + text("ab") + text("")),), (tensor(), tensor("b", offset=32)))


@pytest.mark.parametrize("end", range(0, len(WHOLE), 7))
def test_every_truncation_is_refused(end, tmp_path):
    read(tmp_path, WHOLE)
    with pytest.raises(LitLoraError):
        read(tmp_path, WHOLE[:end])


@given(st.lists(st.tuples(st.integers(4, len(WHOLE) - 1), st.integers(0, 255)), min_size=1, max_size=6))
def test_any_change_is_read_or_refused(tmp_path_factory, changes):
    content = bytearray(WHOLE)
    for position, value in changes:
        content[position] = value
    try:
        header = read(tmp_path_factory.mktemp("changed"), bytes(content))
    except LitLoraError:
        return
    assert all(info.start + info.nbytes <= len(content) for info in header.tensors.values())


def test_other_types_are_read_but_not_trained_over(tmp_path):
    header = read(tmp_path, file(tensors=(tensor(dims=(256,), kind=23),), data=b"\0" * 136))
    assert header.tensors["a"].nbytes == 136
    with pytest.raises(LitLoraError, match=r"a is stored as IQ4_XS, but only BF16, F16, F32, Q4_0, .* can be trained"):
        header.require_trainable()


def test_other_types_are_those_of_the_format():
    for number, kind in OTHER_TYPES.items():
        other = gguf.GGMLQuantizationType(number)
        assert (kind.name, kind.values, kind.nbytes) == (other.name, *gguf.GGML_QUANT_SIZES[other])
