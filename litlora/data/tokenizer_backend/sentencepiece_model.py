"""A sentencepiece model with added tokens, behind the part of tokenizers.Tokenizer's interface that litlora uses.

Segmentation is sentencepiece's own. A BPE of tokenizers cannot express it: there, each way to merge two pieces into a
third has a priority of its own, while sentencepiece takes the leftmost, and the two differ in runs of spaces.
"""

import json
import re
from collections.abc import Iterator, Sequence
from copy import copy
from dataclasses import dataclass
from hashlib import sha256
from typing import NamedTuple

import numpy as np
import sentencepiece
from tokenizers import AddedToken, decoders

SPACE = "▁"  # sentencepiece's character for a space
# normalizer_spec.precompiled_charsmap = "" and add_dummy_prefix = false: of a repeated field, the last wins
PLAIN = b"\x1a\x04\x12\x00\x18\x00"
BLANKS = (
    r"(?:(?<!\s)\s++)?"  # looked for at their beginning alone, or many of them would take the square of their number
)
LONGEST_ADDED = 500_000  # characters of all added tokens together: each is looked for everywhere in a text
PROBE = "\nOnce upon  a time,\n\tein Fluß; 東京 ﬁ 🦙 and 12.5 %"


@dataclass(frozen=True)
class SentencePieceEncoding:
    """The tokens of a text with their character spans; the mask marks an added BOS or EOS."""

    ids: list[int]
    offsets: list[tuple[int, int]]
    special_tokens_mask: list[int]

    def __len__(self) -> int:
        return len(self.ids)


class Segment(NamedTuple):
    """A part of a text: an added token with its id, or what sentencepiece segments."""

    start: int
    text: str
    token_id: int | None
    has_prefix: bool


class SentencePieceModel:
    """A sentencepiece model whose added tokens are recognised before it segments what lies between them."""

    def __init__(self, proto: bytes, *, prefix: bool, prefix_each: bool) -> None:
        """Load a serialized model; RuntimeError if it is none.

        `prefix` has the model write its prefix space before a text, `prefix_each` also after each added token.
        """
        with_prefix = sentencepiece.SentencePieceProcessor(model_proto=proto)
        self._plain = sentencepiece.SentencePieceProcessor(model_proto=proto + PLAIN)
        self.has_prefix = prefix and with_prefix.encode("x") != self._plain.encode("x")
        self._has_charsmap = len(self._plain.serialized_model_proto()) < len(with_prefix.serialized_model_proto())
        self._prefixed = with_prefix if self.has_prefix else self._plain
        self._prefix_each = prefix_each
        self._digest = sha256(proto).hexdigest()
        pieces = [with_prefix.id_to_piece(token_id) for token_id in range(len(with_prefix))]
        self._tokens = dict(enumerate(pieces))
        self._ids = {piece: token_id for token_id, piece in self._tokens.items()}
        self._sizes = np.array([self._size(token_id) for token_id in self._tokens])  # bytes of each piece in a text
        self._added: dict[int, AddedToken] = {}
        self._before: list[int] = []
        self._after: list[int] = []
        self.bos_token, self.eos_token = (self._tokens.get(i) for i in (self._plain.bos_id(), self._plain.eos_id()))
        special = [i for i in self._tokens if self._plain.is_control(i) or self._plain.is_unknown(i)]
        self.add_tokens([AddedToken(pieces[i], special=True, normalized=False) for i in special])

    def _size(self, token_id: int) -> int:
        return 1 if self._plain.is_byte(token_id) else len(self._tokens[token_id].replace(SPACE, " ").encode())

    def is_lossless(self) -> bool:
        """Tell whether pieces hold each byte of a text: unknown text has byte pieces, and nothing is normalized.

        A character map can make megabytes of one character, and is not tried.
        """
        if self._has_charsmap:
            return False
        ids = self._plain.encode(PROBE)
        return self._plain.unk_id() not in ids and int(self._sizes[ids].sum()) == len(PROBE.encode())

    @property
    def decoder(self) -> decoders.Decoder:
        """The decoder that undoes the segmentation."""
        steps = [decoders.Replace(SPACE, " "), decoders.ByteFallback(), decoders.Fuse()]
        return decoders.Sequence([*steps, decoders.Strip(" ", 1, 0)] if self.has_prefix else steps)

    def add_tokens(self, tokens: Sequence[AddedToken]) -> None:
        """Recognise tokens in a text: pieces by their ids, others by the next free id; ValueError for too many."""
        for token in tokens:
            token_id = self._ids.setdefault(token.content, len(self._tokens))
            self._tokens[token_id] = token.content
            self._added[token_id] = token
        if sum(len(token.content) for token in self._added.values()) > LONGEST_ADDED:
            raise ValueError(f"the added tokens have more than {LONGEST_ADDED:,} characters")
        longest_first = sorted(self._added.values(), key=lambda token: len(token.content), reverse=True)
        self._in_groups = [token.content for token in longest_first if _pattern(token).startswith("(")]
        self._pattern = re.compile("|".join(map(_pattern, longest_first)))

    def add_special_tokens(self, tokens: Sequence[AddedToken]) -> None:
        """Recognise special tokens in a text."""
        self.add_tokens(tokens)

    def without_special_tokens(self) -> "SentencePieceModel":
        """Return a copy that takes special tokens as plain text."""
        other = copy(self)
        other._ids, other._tokens = dict(self._ids), dict(self._tokens)
        other._added = {token_id: token for token_id, token in self._added.items() if not token.special}
        return other

    def surround(self, before: Sequence[str], after: Sequence[str]) -> None:
        """Write these tokens before and after every text."""
        self._before, self._after = ([self._ids[token] for token in tokens] for tokens in (before, after))

    def score(self, token_id: int) -> float:
        """Return by which score a piece is merged; 0 for an added token, which never is."""
        return float(self._plain.get_score(token_id)) if token_id < len(self._plain) else 0.0

    def get_vocab_size(self) -> int:
        """Return the number of tokens, added ones included."""
        return len(self._tokens)

    def get_vocab(self) -> dict[str, int]:
        """Return the id of each token."""
        return dict(self._ids)

    def get_added_tokens_decoder(self) -> dict[int, AddedToken]:
        """Return the added tokens by their ids."""
        return dict(self._added)

    def token_to_id(self, token: str) -> int | None:
        """Return the id of a token, if there is such a token."""
        return self._ids.get(token)

    def id_to_token(self, token_id: int) -> str | None:
        """Return the token of an id, if there is one."""
        return self._tokens.get(token_id)

    def to_str(self) -> str:
        """Return a text that differs wherever ids could."""
        added = [[token_id, str(token.__getstate__())] for token_id, token in self._added.items()]
        prefix = [self.has_prefix, self._prefix_each]
        return json.dumps([self._digest, sentencepiece.__version__, prefix, added, self._before, self._after])

    def encode_batch(self, texts: Sequence[str], add_special_tokens: bool = True) -> list[SentencePieceEncoding]:
        """Tokenize texts; TypeError if one has an unpaired surrogate."""
        segments = [list(self._segments(text)) for text in texts]
        ids = self._segment_ids([segment for parts in segments for segment in parts])
        before, after = (self._before, self._after) if add_special_tokens else ([], [])
        return [_joined([(part, *next(ids)) for part in parts], before, after) for parts in segments]

    def _segments(self, text: str) -> Iterator[Segment]:
        end = 0
        for match in self._pattern.finditer(text):
            if match.start() > end:
                yield Segment(end, text[end : match.start()], None, end == 0 or self._prefix_each)
            token = self._in_groups[match.lastindex - 1] if match.lastindex else match[0]
            yield Segment(match.start(), match[0], self._ids[token], False)
            end = match.end()
        if len(text) > end:
            yield Segment(end, text[end:], None, end == 0 or self._prefix_each)

    def _segment_ids(self, segments: Sequence[Segment]) -> Iterator[tuple[list[int], list[tuple[int, int]]]]:
        """Yield the ids and spans of each segment in order, segmented in one call for each kind."""
        processors = {True: self._prefixed, False: self._plain}
        found = {}
        for has_prefix, processor in processors.items():
            texts = [s.text for s in segments if s.token_id is None and s.has_prefix == has_prefix]
            found[has_prefix] = iter(processor.encode(texts))
        for segment in segments:
            start, text, token_id, has_prefix = segment
            if token_id is not None:
                yield [token_id], [(start, start + len(text))]
            else:
                ids = next(found[has_prefix])
                yield ids, self._spans(ids, segment)

    def _spans(self, ids: list[int], segment: Segment) -> list[tuple[int, int]]:
        """Return the characters of each token; the tokens of one character share its span."""
        data = np.frombuffer(segment.text.replace(SPACE, " ").encode(), np.uint8)
        characters = np.cumsum((data & 0xC0) != 0x80)  # begun up to each byte
        ends = np.cumsum(self._sizes[ids]) - (self.has_prefix and segment.has_prefix)
        starts = np.maximum(ends - self._sizes[ids], 0)
        first = np.append(characters - 1, len(segment.text))[starts]
        last = np.concatenate([[0], characters])[ends]
        return list(zip((first + segment.start).tolist(), (last + segment.start).tolist(), strict=True))


def _pattern(token: AddedToken) -> str:
    """Return a regular expression for a token: a group where it takes blanks along or must stand alone.

    Without groups, re looks only where a first character of a token is.
    """
    word = re.escape(token.content)
    if not (token.lstrip or token.rstrip or token.single_word):
        return word
    word = rf"(?<!\w){word}(?!\w)" if token.single_word else word
    return "(" + (BLANKS if token.lstrip else "") + word + (r"\s*" if token.rstrip else "") + ")"


def _joined(
    parts: Sequence[tuple[Segment, list[int], list[tuple[int, int]]]], before: list[int], after: list[int]
) -> SentencePieceEncoding:
    ids = [token_id for _, ids, _ in parts for token_id in ids]
    offsets = [span for _, _, spans in parts for span in spans]
    empty = (0, 0)
    return SentencePieceEncoding(
        [*before, *ids, *after],
        [*(empty for _ in before), *offsets, *(empty for _ in after)],
        [*(1 for _ in before), *(0 for _ in ids), *(1 for _ in after)],
    )
