"""In which type a file stores a tensor. Imports neither torch nor gguf."""

from collections.abc import Sequence

ROUNDED = "f16", "bf16", "q8_0", "q4_0"  # --outtype of files in which llama.cpp rounds
BLOCK = 32  # values of a row that q8_0 and q4_0 quantize together


def stored_type(shape: Sequence[int], outtype: str, *, is_end: bool) -> str:
    """Return GGML's name of the type of a weight, given --outtype, and whether it is the embedding or the output head.

    Vectors are small, and llama.cpp computes with them in float32.
    """
    if len(shape) == 1 or outtype == "f32":
        return "F32"
    if outtype in ("q8_0", "q4_0") and shape[-1] % BLOCK:
        return "F16"
    return "Q8_0" if outtype == "q4_0" and is_end else outtype.upper()  # where 4 bits cost most
