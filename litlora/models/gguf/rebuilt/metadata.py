"""The numbers in a GGUF file that describe its network, each checked, for a config.json that is rebuilt."""

import struct
from typing import Any, NoReturn

from litlora.errors import LitLoraError
from litlora.models.gguf.reader import GGUFHeader

LARGEST = 3.4028234663852886e38
"""In float32."""


class Metadata:
    """Reads what belongs to a file's architecture; LitLoraError where a number is missing or none."""

    def __init__(self, header: GGUFHeader) -> None:
        self.header, self.arch = header, header.architecture

    def refuse(self, fault: str) -> NoReturn:
        raise not_rebuilt(self.header, fault)

    def get(self, name: str, default: Any = None) -> Any:
        return self.header.metadata.get(f"{self.arch}.{name}", default)

    def number(self, name: str, default: float | None = None) -> float:
        value = self.get(name, default)
        if isinstance(value, bool) or not isinstance(value, int | float):
            self.refuse(f"its {self.arch}.{name} is {value}")
        return shortest(value) if isinstance(value, float) else value

    def size(self, name: str, default: int | None = None) -> int:
        value = self.number(name, default)
        if not isinstance(value, int) or value < 1:
            self.refuse(f"its {self.arch}.{name} is {value}")
        return value

    def values(self, name: str) -> list[float]:
        """Return the few values of a tensor."""
        if name not in self.header.tensors:
            self.refuse(f"it has no {name}")
        info = self.header.tensors[name]
        if info.type.name != "F32":
            self.refuse(f"{name} is stored as {info.type.name}")
        with self.header.path.open("rb") as file:
            file.seek(info.start)
            content = file.read(info.nbytes)
        return [shortest(value) for (value,) in struct.iter_unpack("<f", content)]


def not_rebuilt(header: GGUFHeader, fault: str) -> LitLoraError:
    """Return the error of a file whose config.json has to be given."""
    hint = "add the model's config.json to the folder of --checkpoint_dir"
    return LitLoraError(f"config.json cannot be rebuilt exactly from {header.path} ({fault}): {hint}")


def shortest(value: float) -> float:
    """Return the shortest decimal number that is this one in float32, as config.json would have it."""
    if abs(value) > LARGEST:
        return value
    rounded = (float(f"{value:.{digits}g}") for digits in range(1, 18))
    return next((number for number in rounded if struct.pack("<f", number) == struct.pack("<f", value)), value)
