"""What the flags of all commands share: tokens that stay secret, checks of values, and the base of every command's."""

from dataclasses import dataclass, fields, is_dataclass
from pathlib import Path, PosixPath
from typing import Any, ClassVar, Literal

from litlora.errors import LitLoraError

GGUF = "gguf"


class GGUFPath(PosixPath):
    """The path of a GGUF file, which is a base as it is."""

    SUFFIX = f".{GGUF}"


Quantize = Literal["bnb.nf4", "bnb.nf4-dq"] | GGUFPath
Server = Literal["vllm", "llama.cpp", "peft", "ollama"]
"""What an adapter may be deployed on."""

MASK = "**********"


class SecretStr:
    """A token, which shows itself in no message, log or file."""

    def __init__(self, value: str) -> None:
        self._value = value

    def get_secret_value(self) -> str:
        """Return the token itself."""
        return self._value

    def __repr__(self) -> str:
        return MASK


def require(condition: bool, flag: str, value: object, need: str) -> None:
    """Refuse a value of a flag unless a condition holds, and state what it must be."""
    if not condition:
        raise LitLoraError(f"{flag} ({value}) must be {need}")


def require_seed(seed: int) -> None:
    """Refuse a seed that torch's generators do not accept."""
    require(0 <= seed < 2**63, "--seed", seed, "0 or more, and below 2^63")


def require_token(token: SecretStr | None) -> None:
    """Refuse what --print_config prints in place of a token."""
    if token is not None and token.get_secret_value() == MASK:
        fault = "is printed in place of a token: give the token itself, or leave the setting out"
        raise LitLoraError(f"--access_token ({MASK}) {fault}", exit_code=2)


def revealed(token: SecretStr | None) -> str | None:
    """Return a token itself, if one is given."""
    return None if token is None else token.get_secret_value()


def plain(value: Any) -> Any:
    """Turn nested dataclasses and paths into what YAML holds."""
    if is_dataclass(value):
        return {field.name: plain(getattr(value, field.name)) for field in fields(value)}
    if isinstance(value, tuple):
        return [plain(item) for item in value]
    return str(value) if isinstance(value, Path) else value


def as_gguf(value: Any) -> Any:
    """Return a path or text that ends as the name of a GGUF file does as GGUFPath, and any other value as it is."""
    return GGUFPath(value) if isinstance(value, str | Path) and str(value).endswith(GGUFPath.SUFFIX) else value


@dataclass(frozen=True)
class CommandArgs:
    """What --help shows beside the summary and the flags of a command."""

    groups: ClassVar[dict[str, tuple[str, ...]]] = {}
    """Titles of groups of flags, and patterns of the names in each."""
    examples: ClassVar[tuple[str, ...]] = ()
