"""Writing a GGUF file: its header first, then one tensor after the other in the requested type."""

from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from litlora.errors import LitLoraError
from litlora.export.gguf.types import stored_type
from litlora.models.gguf.library import gguf
from litlora.models.gguf.tensors import ROPE_FACTORS, GGUFTensor
from litlora.utils.files import reporting_write_errors

Type = gguf.GGMLQuantizationType
FILE_TYPES = {
    "f32": gguf.LlamaFileType.ALL_F32,
    "f16": gguf.LlamaFileType.MOSTLY_F16,
    "bf16": gguf.LlamaFileType.MOSTLY_BF16,
    "q8_0": gguf.LlamaFileType.MOSTLY_Q8_0,
    "q4_0": gguf.LlamaFileType.MOSTLY_Q4_0,
}
FLOAT16 = torch.finfo(torch.float16).max
LARGEST = {Type.F16: FLOAT16, Type.Q8_0: 127 * FLOAT16, Type.Q4_0: 8 * FLOAT16}  # as float16 scales a block
ENDS = "token_embd.weight", "output.weight"


def type_of(tensor: GGUFTensor, outtype: str) -> gguf.GGMLQuantizationType:
    """Return the type in which a tensor is stored."""
    if "_norm." in tensor.name or tensor.name in ROPE_FACTORS:
        return Type.F32
    kind: gguf.GGMLQuantizationType = getattr(Type, stored_type(tensor.shape, outtype, is_end=tensor.name in ENDS))
    return kind


def write_file(
    path: Path, arch: str, outtype: str, tensors: Sequence[GGUFTensor], describe: Callable[[gguf.GGUFWriter], None]
) -> None:
    """Write a file; `describe` adds its metadata."""
    writer = gguf.GGUFWriter(path, arch)
    describe(writer)
    writer.add_file_type(FILE_TYPES[outtype])
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
    types = [type_of(tensor, outtype) for tensor in tensors]
    for tensor, kind in zip(tensors, types, strict=True):
        add_info(writer, tensor, kind)
    with reporting_write_errors(path):
        try:
            writer.write_header_to_file()
            writer.write_kv_data_to_file()
            writer.write_ti_data_to_file()
            for tensor, kind in zip(tensors, types, strict=True):
                writer.write_tensor_data(encoded(tensor, kind))
        finally:
            writer.close()


def add_info(writer: gguf.GGUFWriter, tensor: GGUFTensor, kind: gguf.GGMLQuantizationType) -> None:
    """Add name, shape and type of a tensor to the header."""
    plain = {Type.F32: np.float32, Type.F16: np.float16}
    stored = gguf.quant_shape_to_byte_shape(tensor.shape, kind)
    nbytes = int(np.prod(stored))
    if kind in plain:
        writer.add_tensor_info(tensor.name, tensor.shape, np.dtype(plain[kind]), nbytes)
    else:
        writer.add_tensor_info(tensor.name, stored, np.dtype(np.uint8), nbytes, raw_dtype=kind)


def encoded(tensor: GGUFTensor, kind: gguf.GGMLQuantizationType) -> NDArray[np.generic]:
    """Read a tensor and return it as it is stored."""
    content: Tensor = tensor.read().float()
    assert tuple(content.shape) == tensor.shape, tensor.name
    if not content.isfinite().all():
        raise LitLoraError(f"{tensor.name} has NaN or infinity: replace the weights or the adapter with an intact copy")
    if content.abs().amax() > LARGEST.get(kind, torch.inf):
        raise LitLoraError(f"{tensor.name} has values beyond those of {kind.name.lower()}: pass --outtype bf16 or f32")
    with torch.no_grad():
        array: NDArray[np.generic] = gguf.quants.quantize(content.contiguous().numpy(), kind)
    return array
