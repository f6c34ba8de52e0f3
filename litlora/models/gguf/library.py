"""The gguf package, which is an extra."""

from litlora.errors import LitLoraError

try:
    import gguf
except ImportError as error:
    raise LitLoraError("GGUF files need the gguf package: pip install 'litlora[gguf]'") from error

__all__ = ["gguf"]
