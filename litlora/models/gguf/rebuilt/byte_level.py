"""The byte-level BPE in a GGUF file's metadata as tokenizer.json."""

from collections.abc import Sequence
from functools import cached_property
from typing import Any

from litlora.models.gguf.rebuilt.tokenizer import CONTROL, NORMAL, UNKNOWN, UNUSED, USER_DEFINED, HubTokenizer, to_json
from litlora.models.gguf.splittings import ALIASES, OTHER_SPLITTING, SPLITTINGS, Splitting


class HubBPE(HubTokenizer):
    """Byte-level BPE; llama.cpp's way to split a text has a name in the file."""

    KINDS = frozenset({NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED})
    WHAT = "byte-level BPE"

    def model_files(self) -> dict[str, bytes]:
        decoder = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": False, "use_regex": False}
        content = {
            "version": "1.0",
            "truncation": None,
            "padding": None,
            "added_tokens": [{"id": n} | token for n, token in self.added_tokens().items()],
            "normalizer": None,
            "pre_tokenizer": self.splitting.pre_tokenizer,
            "post_processor": self._post_processor(),
            "decoder": decoder,
            "model": self._model(),
        }
        return {"tokenizer.json": to_json(content)}

    def settings(self) -> dict[str, Any]:
        return {"tokenizer_class": "PreTrainedTokenizerFast"}

    @cached_property
    def splitting(self) -> Splitting:
        """What splits a text before it merges."""
        name = str(self.get("pre"))
        found = next((each for each in SPLITTINGS if each.name == ALIASES.get(name, name)), None)
        if found is None:
            self.refuse(f"its way to split a text is {name}, which litlora does not know")
        if self.header.metadata.get(OTHER_SPLITTING):
            self.refuse("llama.cpp has nothing that splits a text as it does")
        return found

    def _model(self) -> dict[str, Any]:
        vocab = {token: n for n, token in enumerate(self.tokens) if self.kinds[n] != UNUSED}
        merges = self.array("merges", str)
        for merge in merges:
            parts = merge.split(" ")
            if len(parts) != 2 or not {*parts, "".join(parts)} <= vocab.keys():
                self.refuse(f"its merge {merge!r} is not of its tokens")
        return {
            "type": "BPE",
            "dropout": None,
            "unk_token": None,
            "byte_fallback": False,
            "fuse_unk": False,
            "ignore_merges": self.splitting.is_llama_3,
            "vocab": vocab,
            "merges": merges,
        }

    def _post_processor(self) -> dict[str, Any] | None:
        """Return what adds BOS and EOS to a text, if anything does."""
        adds = {"bos": self.adds("bos_token", self.splitting.is_llama_3), "eos": self.adds("eos_token", False)}
        before, after = ([self.ids[name]] if does else [] for name, does in adds.items())
        if None in (*before, *after):
            self.refuse("it adds a special token that it does not name")
        if not before and not after:
            return None
        texts = {token: self.tokens[token] for token in (*before, *after) if token is not None}
        single, pair = (self._template(before, after, text) for text in ("A", "AB"))
        special = {text: {"id": text, "ids": [token], "tokens": [text]} for token, text in texts.items()}
        return {"type": "TemplateProcessing", "single": single, "pair": pair, "special_tokens": special}

    def _template(self, before: Sequence[int | None], after: Sequence[int | None], texts: str) -> list[dict[str, Any]]:
        def special(ids: Sequence[int | None], type_id: int) -> list[dict[str, Any]]:
            named = (self.tokens[token] for token in ids if token is not None)
            return [{"SpecialToken": {"id": text, "type_id": type_id}} for text in named]

        parts = [
            [*special(before, n), {"Sequence": {"id": text, "type_id": n}}, *special(after, n)]
            for n, text in enumerate(texts)
        ]
        return [piece for part in parts for piece in part]
