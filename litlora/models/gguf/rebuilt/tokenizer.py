"""The tokenizer in a GGUF file's metadata as the files that the Hub has for it, with the ids of llama.cpp.

What decides its tokens is all in the file, or follows from a name that llama.cpp has for it. Like llama.cpp, it does
not normalize.
"""

import json
from abc import ABC, abstractmethod
from typing import Any, ClassVar, NoReturn

from litlora.errors import LitLoraError
from litlora.hub.filenames import GENERATION_CONFIG
from litlora.models.gguf.reader import GGUFHeader

PREFIX = "tokenizer.ggml."
NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = range(1, 7)
"""Kinds of tokens."""
NAMES = {"bos": "bos_token", "eos": "eos_token", "unknown": "unk_token", "padding": "pad_token"}
"""Special tokens, by the names that GGUF files have for them."""
ENDINGS = "eos", "eot", "eom"
PHI_3 = "phi-3", "phi3"
"""In a model's name, they have llama.cpp drop the blanks behind special tokens, except for `KEEPS_BLANKS`."""
KEEPS_BLANKS = "<unk>", "<s>", "<|endoftext|>"


class HubTokenizer(ABC):
    """A tokenizer that is rebuilt from metadata."""

    DEFAULT_IDS: ClassVar[dict[str, int]] = {}
    """Those of special tokens that a file does not name."""
    KINDS: ClassVar[frozenset[int]]
    """What its tokens may be."""
    WHAT: ClassVar[str]

    def __init__(self, header: GGUFHeader) -> None:
        self.header = header
        self.tokens: list[str] = self.array("tokens", str)
        self.kinds: list[int] = self.array("token_type", int)
        self.ids = {name: self._id(name) for name in (*NAMES, *ENDINGS)}
        self._check()

    @abstractmethod
    def model_files(self) -> dict[str, bytes]:
        """Return the content of the files that make tokens of a text."""

    @abstractmethod
    def settings(self) -> dict[str, Any]:
        """Return the content of tokenizer_config.json, without the special tokens and the chat template."""

    def files(self) -> dict[str, bytes]:
        """Return the content of each file by its name; LitLoraError where it could give other ids than llama.cpp."""
        stops = [token for name in ENDINGS if (token := self.ids[name]) is not None]
        generation = {GENERATION_CONFIG: {"eos_token_id": stops}} if len(set(stops)) > 1 else {}
        contents = {"tokenizer_config.json": self._settings()} | generation
        return self.model_files() | {name: to_json(content) for name, content in contents.items()}

    def refuse(self, fault: str) -> NoReturn:
        raise not_rebuilt(self.header, fault)

    def get(self, name: str) -> Any:
        return self.header.metadata.get(f"{PREFIX}{name}")

    def array(self, name: str, kind: type) -> list[Any]:
        """Return a list whose entries are of one type."""
        values = self.get(name)
        if not isinstance(values, list) or not all(isinstance(value, kind) for value in values):
            self.refuse(f"{PREFIX}{name} is missing or of another type")
        return values

    def adds(self, name: str, default: bool) -> bool:
        """Tell whether something is added to a text: bos_token, eos_token or space_prefix."""
        value = self.get(f"add_{name}")
        return default if value is None else bool(value)

    def added_tokens(self) -> dict[int, dict[str, Any]]:
        """Return, by their ids, the tokens that are found in a text before it is parted into others."""
        plain = {"single_word": False, "lstrip": False, "normalized": False}
        drops_blanks = any(name in str(self.header.metadata.get("general.name")).lower() for name in PHI_3)
        return {
            n: {
                "content": token,
                **plain,
                "rstrip": drops_blanks and token not in KEEPS_BLANKS,
                "special": kind != USER_DEFINED,
            }
            for n, (token, kind) in enumerate(zip(self.tokens, self.kinds, strict=True))
            if kind in (UNKNOWN, CONTROL, USER_DEFINED)
        }

    def _id(self, name: str) -> int | None:
        token = self.get(f"{name}_token_id")
        token = self.DEFAULT_IDS.get(name) if token is None else token
        if token is not None and (not isinstance(token, int) or not 0 <= token < len(self.tokens)):
            self.refuse(f"its {name} token is {token}")
        return token

    def _check(self) -> None:
        if len(self.kinds) != len(self.tokens) or not self.KINDS.issuperset(self.kinds):
            self.refuse(f"the kinds of its tokens are not those of {self.WHAT}")
        used = [token for token, kind in zip(self.tokens, self.kinds, strict=True) if kind != UNUSED]
        if len(set(used)) != len(used):
            self.refuse("it has a token twice")
        if self.ids["eos"] is None:
            self.refuse("it has no end-of-text token")

    def _settings(self) -> dict[str, Any]:
        named = {key: self.tokens[token] for name, key in NAMES.items() if (token := self.ids[name]) is not None}
        template = self.header.metadata.get("tokenizer.chat_template")
        chat = {"chat_template": template} if isinstance(template, str) else {}
        return self.settings() | {"clean_up_tokenization_spaces": False} | named | chat


def not_rebuilt(header: GGUFHeader, fault: str) -> LitLoraError:
    """Return the error of a file whose tokenizer has to be given."""
    files = "tokenizer.json or tokenizer.model (litlora download --tokenizer_only true)"
    hint = f"add {files} to the folder of --checkpoint_dir"
    return LitLoraError(f"the tokenizer in {header.path} cannot be rebuilt exactly ({fault}): {hint}")


def to_json(content: dict[str, Any]) -> bytes:
    """Return the content of a JSON file."""
    return json.dumps(content, indent=2, ensure_ascii=False).encode()
