"""The flags of the command that writes files for other programs."""

from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar, Literal

from litlora.args.common import GGUFPath, Server
from litlora.args.inference import ModelArgs
from litlora.errors import LitLoraError


@dataclass(frozen=True)
class ExportArgs(ModelArgs):
    """Write a checkpoint or an adapter as a GGUF file for llama.cpp and Ollama."""

    examples: ClassVar = (
        "litlora export out/alpaca/final --out_dir out/gguf --outtype q8_0",
        "litlora export out/alpaca/final --format gguf-lora --out_dir out/gguf-lora",
    )

    out_dir: Path | None = None
    """Output folder for the GGUF file and the Modelfile."""
    format: Literal["gguf", "gguf-lora"] = "gguf"
    """gguf: the model, with the adapter merged into it; gguf-lora: the adapter alone."""
    outtype: Literal["f32", "f16", "bf16", "q8_0", "q4_0"] | None = None
    """Type of the weights, by default f16, and f32 for an adapter alone."""
    quantize: GGUFPath | None = None
    """GGUF file over which the adapter was trained, by default the one that it names."""
    dequantized_base: bool = False
    """Merge into the dequantized 4-bit weights on which the adapter was trained."""
    verify: bool = True
    """Compare what llama.cpp computes from the file with the receipt of the training, if there is one."""
    check: bool = False
    """Print what servers cannot load of the adapter, or would compute otherwise, and write nothing."""
    deploy: tuple[Server, ...] = ()
    """Servers for --check, by default all; exit with 1 if one of those named here does not do."""
    quiet: bool = False
    """Print warnings and errors only."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.out_dir is None and not self.check:
            raise LitLoraError("missing --out_dir", exit_code=2)
        if self.deploy and not self.check:
            raise LitLoraError(f"--deploy ({','.join(self.deploy)}) is for --check true: add that, or leave it out")
        alone = self.format == "gguf-lora"
        if alone and self.outtype in ("q8_0", "q4_0"):
            raise LitLoraError(f"--outtype ({self.outtype}) must be f32, f16 or bf16 for an adapter alone")
        if alone and self.dequantized_base:
            raise LitLoraError("--dequantized_base is for a merged model: leave it out, or use --format gguf")

    @property
    def folder(self) -> Path:
        """The output folder, without which nothing is written."""
        assert self.out_dir is not None  # or the arguments would have been refused
        return self.out_dir
