"""The sentencepiece BPE in a GGUF file's metadata as tokenizer.model.

llama.cpp merges as sentencepiece does: of all pairs that make a piece the one with the best score, the leftmost of
equals. Special and user-defined tokens are found before, and the space before a text is written after each of them.
"""

import math
from typing import Any, ClassVar

import sentencepiece

from litlora.errors import LitLoraError
from litlora.models.gguf.rebuilt.tokenizer import BYTE, CONTROL, NORMAL, UNKNOWN, UNUSED, USER_DEFINED, HubTokenizer

BYTES = {f"<0x{value:02X}>" for value in range(256)}


class HubSentencePiece(HubTokenizer):
    """A model of sentencepiece with byte pieces; GGUF numbers the kinds of its pieces as sentencepiece does."""

    DEFAULT_IDS: ClassVar = {"unknown": 0, "bos": 1, "eos": 2}
    KINDS = frozenset({NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE})
    WHAT = "sentencepiece"

    def model_files(self) -> dict[str, bytes]:
        scores = self._scores()
        self._check_pieces()
        content = _serialized(self.tokens, scores, self._kinds_of_pieces(), prefix=self.adds("space_prefix", True))
        try:
            sentencepiece.SentencePieceProcessor(model_proto=content)
        except RuntimeError:
            self.refuse("sentencepiece does not take its pieces")
        return {"tokenizer.model": content}

    def settings(self) -> dict[str, Any]:
        return {
            "tokenizer_class": "LlamaTokenizer",
            "added_tokens_decoder": {str(n): token for n, token in self.added_tokens().items()},
            "add_bos_token": self.adds("bos_token", True),
            "add_eos_token": self.adds("eos_token", False),
            "add_prefix_space": self.adds("space_prefix", True),
            "legacy": True,  # a space after each added token, too
        }

    def _scores(self) -> list[float]:
        scores = self.array("scores", float)
        if len(scores) != len(self.tokens) or not all(map(math.isfinite, scores)):
            self.refuse("it has not a finite score for each token")
        return scores

    def _check_pieces(self) -> None:
        if {token for token, kind in zip(self.tokens, self.kinds, strict=True) if kind == BYTE} != BYTES:
            self.refuse("it has not a token for each byte")
        if "" in self.tokens or len(set(self.tokens)) != len(self.tokens):
            self.refuse("it has an empty token, or a token twice")

    def _kinds_of_pieces(self) -> list[int]:
        """Return the kinds with one piece for what is unknown, as sentencepiece needs; with bytes, nothing is."""
        kinds = [CONTROL if kind == UNKNOWN else kind for kind in self.kinds]
        unknown = self.ids["unknown"]
        if unknown is None or kinds[unknown] != CONTROL:
            self.refuse("its unknown token is an ordinary one")
        kinds[unknown] = UNKNOWN
        return kinds


def _serialized(tokens: list[str], scores: list[float], kinds: list[int], *, prefix: bool) -> bytes:
    try:
        from sentencepiece.sentencepiece_model_pb2 import ModelProto, TrainerSpec
    except ImportError as error:
        hint = "pip install 'litlora[gguf]'"
        raise LitLoraError(f"the tokenizer of a GGUF file needs the protobuf package: {hint}") from error
    model = ModelProto()
    for token, score, kind in zip(tokens, scores, kinds, strict=True):
        model.pieces.add(piece=token, score=score, type=kind)
    model.trainer_spec.model_type = TrainerSpec.BPE
    model.trainer_spec.vocab_size = len(tokens)
    model.trainer_spec.byte_fallback = True
    model.trainer_spec.unk_piece = tokens[kinds.index(UNKNOWN)]
    model.normalizer_spec.name = "identity"
    model.normalizer_spec.add_dummy_prefix = prefix
    model.normalizer_spec.remove_extra_whitespaces = False
    return bytes(model.SerializeToString())
