"""The tokenizer in a GGUF file's metadata as the files that the Hub has for it, with the ids of llama.cpp.

Only byte-level BPE can be rebuilt: what decides its tokens is all in the file, or follows from the name that the file
has for llama.cpp's way to split a text. Like llama.cpp, it does not normalize.
"""

from collections.abc import Sequence
from typing import Any, NoReturn

from litlora.errors import LitLoraError
from litlora.hub.filenames import GENERATION_CONFIG
from litlora.models.gguf.reader import GGUFHeader
from litlora.models.gguf.splittings import OTHER_SPLITTING, SPLITTINGS, Splitting

PREFIX = "tokenizer.ggml."
NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED = 1, 2, 3, 4, 5
"""Kinds of tokens; those of bytes belong to sentencepiece."""
NAMES = {"bos": "bos_token", "eos": "eos_token", "unknown": "unk_token", "padding": "pad_token"}
"""Special tokens, by the names that GGUF files have for them."""
ENDINGS = "eos", "eot", "eom"


def tokenizer_files(header: GGUFHeader) -> dict[str, dict[str, Any]]:
    """Return the content of the tokenizer's files; LitLoraError where they could give other ids than llama.cpp."""
    return _Rebuilt(header).files()


class _Rebuilt:
    """A tokenizer that is rebuilt from metadata."""

    def __init__(self, header: GGUFHeader) -> None:
        self.header = header
        self.splitting = self._splitting()
        self.tokens: list[str] = self._list("tokens", str)
        self.kinds: list[int] = self._list("token_type", int)
        self.ids = {name: self._id(name) for name in (*NAMES, *ENDINGS)}
        self.vocab = {token: n for n, token in enumerate(self.tokens) if self.kinds[n : n + 1] != [UNUSED]}
        self._check()

    def files(self) -> dict[str, dict[str, Any]]:
        """Return the content of each file by its name."""
        stops = [token for name in ENDINGS if (token := self.ids[name]) is not None]
        files = {"tokenizer.json": self._tokenizer(), "tokenizer_config.json": self._settings()}
        return files | ({GENERATION_CONFIG: {"eos_token_id": stops}} if len(set(stops)) > 1 else {})

    def refuse(self, fault: str) -> NoReturn:
        files = "tokenizer.json or tokenizer.model (litlora download --tokenizer_only true)"
        hint = f"add {files} to the folder of --checkpoint_dir"
        raise LitLoraError(f"the tokenizer in {self.header.path} cannot be rebuilt exactly ({fault}): {hint}")

    def _get(self, name: str) -> Any:
        return self.header.metadata.get(f"{PREFIX}{name}")

    def _splitting(self) -> Splitting:
        if (kind := self._get("model")) != "gpt2":
            self.refuse(f"it is of the type {kind}, and only gpt2 can be")
        name = self._get("pre")
        found = next((each for each in SPLITTINGS if each.name == name), None)
        if found is None:
            self.refuse(f"its way to split a text is {name}, which litlora does not know")
        if self.header.metadata.get(OTHER_SPLITTING):
            self.refuse("llama.cpp has nothing that splits a text as it does")
        return found

    def _list(self, name: str, kind: type) -> list[Any]:
        values = self._get(name)
        if not isinstance(values, list) or not all(isinstance(value, kind) for value in values):
            self.refuse(f"{PREFIX}{name} is missing or of another type")
        return values

    def _id(self, name: str) -> int | None:
        token = self._get(f"{name}_token_id")
        if token is not None and (not isinstance(token, int) or not 0 <= token < len(self.tokens)):
            self.refuse(f"its {name} token is {token}")
        return token

    def _check(self) -> None:
        if len(self.kinds) != len(self.tokens) or not {UNUSED, *range(NORMAL, UNUSED)}.issuperset(self.kinds):
            self.refuse("the kinds of its tokens are not those of byte-level BPE")
        if len(self.vocab) != len(self.tokens) - self.kinds.count(UNUSED):
            self.refuse("it has a token twice")
        if self.ids["eos"] is None:
            self.refuse("it has no end-of-text token")
        for merge in self._list("merges", str):
            parts = merge.split(" ")
            if len(parts) != 2 or not {*parts, "".join(parts)} <= self.vocab.keys():
                self.refuse(f"its merge {merge!r} is not of its tokens")

    def _tokenizer(self) -> dict[str, Any]:
        """Return the content of tokenizer.json."""
        model: dict[str, Any] = {"type": "BPE", "dropout": None, "unk_token": None, "byte_fallback": False}
        model |= {
            "fuse_unk": False,
            "ignore_merges": self.splitting.is_llama_3,
            "vocab": self.vocab,
            "merges": self._get("merges"),
        }
        decoder = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": False, "use_regex": False}
        return {
            "version": "1.0",
            "truncation": None,
            "padding": None,
            "added_tokens": self._added_tokens(),
            "normalizer": None,
            "pre_tokenizer": self.splitting.pre_tokenizer,
            "post_processor": self._post_processor(),
            "decoder": decoder,
            "model": model,
        }

    def _added_tokens(self) -> list[dict[str, Any]]:
        plain = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False}
        return [
            {"id": n, "content": token, **plain, "special": kind != USER_DEFINED}
            for n, (token, kind) in enumerate(zip(self.tokens, self.kinds, strict=True))
            if kind in (UNKNOWN, CONTROL, USER_DEFINED)
        ]

    def _post_processor(self) -> dict[str, Any] | None:
        """Return what adds BOS and EOS to a text, if anything does."""
        adds = {"bos": self._adds("bos", self.splitting.is_llama_3), "eos": self._adds("eos", False)}
        before, after = ([self.ids[name]] if does else [] for name, does in adds.items())
        if None in (*before, *after):
            self.refuse("it adds a special token that it does not name")
        if not before and not after:
            return None
        texts = {token: self.tokens[token] for token in (*before, *after) if token is not None}
        single, pair = (self._template(before, after, text) for text in ("A", "AB"))
        special = {text: {"id": text, "ids": [token], "tokens": [text]} for token, text in texts.items()}
        return {"type": "TemplateProcessing", "single": single, "pair": pair, "special_tokens": special}

    def _adds(self, name: str, default: bool) -> bool:
        value = self._get(f"add_{name}_token")
        return default if value is None else bool(value)

    def _template(self, before: Sequence[int | None], after: Sequence[int | None], texts: str) -> list[dict[str, Any]]:
        def special(ids: Sequence[int | None], type_id: int) -> list[dict[str, Any]]:
            named = (self.tokens[token] for token in ids if token is not None)
            return [{"SpecialToken": {"id": text, "type_id": type_id}} for text in named]

        parts = [
            [*special(before, n), {"Sequence": {"id": text, "type_id": n}}, *special(after, n)]
            for n, text in enumerate(texts)
        ]
        return [piece for part in parts for piece in part]

    def _settings(self) -> dict[str, Any]:
        """Return the content of tokenizer_config.json."""
        named = {key: self.tokens[token] for name, key in NAMES.items() if (token := self.ids[name]) is not None}
        template = self.header.metadata.get("tokenizer.chat_template")
        chat = {"chat_template": template} if isinstance(template, str) else {}
        return {"tokenizer_class": "PreTrainedTokenizerFast", "clean_up_tokenization_spaces": False, **named, **chat}
