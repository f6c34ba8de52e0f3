"""Text to token ids and back."""

import codecs
import json
import re
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import cached_property
from hashlib import sha256
from itertools import chain
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import tokenizers
from numpy.typing import NDArray
from tokenizers import AddedToken

from litlora.data.examples import Message
from litlora.data.prompts.chat_template import ChatTemplateError
from litlora.data.prompts.rendered import Rendered
from litlora.data.prompts.styles import AUTO, PromptStyle, StyleSettings, StyleTokens, build_prompt_style
from litlora.data.tokenizer_backend.files import (
    Backend,
    no_tokenizer,
    probe_decoder,
    read_backend,
    read_chat_template,
    read_optional_json,
    read_settings,
    reporting_failure,
    special_token_texts,
    token_text,
)
from litlora.data.tokenizer_backend.limits import encode_in_time
from litlora.data.tokenizer_backend.sentencepiece_model import SPACE, SentencePieceEncoding
from litlora.data.tokenizer_backend.special_tokens import LiteralEncoder, SpecialTokens
from litlora.errors import LitLoraError
from litlora.hub.filenames import TOKENIZER_FILES, TOKENIZERS


class Encoding(NamedTuple):
    """The tokens of a text, each with its character span [start, end) in the text."""

    ids: list[int]
    spans: list[tuple[int, int]]


class Encodings(NamedTuple):
    """The tokens of many texts, concatenated, their spans, and the number of tokens of each text."""

    ids: NDArray[np.int32]
    spans: NDArray[np.int32]  # (tokens, 2)
    lengths: NDArray[np.int32]

    def by_text(self, values: NDArray[np.int32]) -> list[NDArray[np.int32]]:
        """Return the ids or spans of each text."""
        return [values[end - length : end] for end, length in zip(self.lengths.cumsum(), self.lengths, strict=True)]


def check_prompt_style(checkpoint_dir: Path, settings: StyleSettings) -> str | None:
    """Refuse a checkpoint without a tokenizer or without what a prompt style needs, and return its chat template.

    Its vocabulary is not read.
    """
    if not any((checkpoint_dir / file).is_file() for file in TOKENIZERS):
        raise no_tokenizer(checkpoint_dir)
    with _reporting_inconsistency(checkpoint_dir):
        files = read_settings(checkpoint_dir)
        named = _named_tokens(files)
        template = read_chat_template(checkpoint_dir, files)
    if settings.name != AUTO:
        tokens = StyleTokens(named.get("eos_token") or "", named, SpecialTokens(()), frozenset(), template)
        build_prompt_style(settings, tokens)
    return template


def _named_tokens(settings: dict[str, Any]) -> dict[str, str | None]:
    """Return the special tokens by the names that chat templates have for them, such as bos_token."""
    return {key: token_text(value) for key, value in settings.items() if key.endswith("_token")}


class Tokenizer:
    """A checkpoint's tokenizer; its ids are those of tokenizer.json as it stands, or of the sentencepiece model."""

    def __init__(self, checkpoint_dir: Path, hub_config: dict[str, Any] | None = None) -> None:
        """Read the tokenizer's files, and config.json unless its content is passed."""
        with _reporting_inconsistency(checkpoint_dir), reporting_failure(f"the tokenizer in {checkpoint_dir}"):
            settings = read_settings(checkpoint_dir)
            config = read_optional_json(checkpoint_dir / "config.json") if hub_config is None else hub_config
            self._backend = read_backend(checkpoint_dir, settings)
            self.unknown_token = token_text(settings.get("unk_token"))
            self.files = tuple(path for name in TOKENIZER_FILES if (path := checkpoint_dir / name).is_file())
            self.chat_template = read_chat_template(checkpoint_dir, settings)
            self.vocab_size = self._backend.get_vocab_size()
            self.bos_token = token_text(settings.get("bos_token"))
            self.bos_id = self._backend.token_to_id(self.bos_token) if self.bos_token else None
            eos_ids = self._eos_ids(checkpoint_dir, settings, config)
            self.eos_id, self.eos_token = eos_ids[0], self._backend.id_to_token(eos_ids[0]) or ""
            self.stop_ids = frozenset(eos_ids)
            self._register([*special_token_texts(settings), self.eos_token])
            self._added = self._backend.get_added_tokens_decoder()
            self._named_tokens = _named_tokens(settings)
            self.is_byte_level, self._drops_first_space = probe_decoder(checkpoint_dir, self._backend)

    def _eos_ids(self, checkpoint_dir: Path, settings: dict[str, Any], config: dict[str, Any]) -> list[int]:
        """Return every end-of-text id, the tokenizer's own first."""
        name = token_text(settings.get("eos_token"))
        named = None if name is None else self._backend.token_to_id(name)
        generation = read_optional_json(checkpoint_dir / "generation_config.json")
        candidates = [named, config.get("eos_token_id"), generation.get("eos_token_id")]
        flat = [i for value in candidates for i in (value if isinstance(value, list) else [value])]
        ids = [i for i in flat if isinstance(i, int) and 0 <= i < 2**32]
        if not ids or not self._backend.id_to_token(ids[0]):
            raise LitLoraError(
                f"the tokenizer in {checkpoint_dir} has no end-of-text token: "
                "set eos_token in tokenizer_config.json to one of its tokens"
            )
        return ids

    def _register(self, texts: list[str]) -> None:
        """Register tokens of the vocabulary as special, so that they are recognised inside a text."""
        known = {token.content for token in self._backend.get_added_tokens_decoder().values()}
        vocabulary = self._backend.get_vocab()
        if max(vocabulary.values(), default=0) >= 2**31:
            raise ValueError("a token has an id of 2^31 or more")
        missing = [text for text in texts if text in vocabulary and text not in known]
        self._backend.add_special_tokens([AddedToken(text, special=True, normalized=False) for text in missing])

    @property
    def backend(self) -> Backend:
        """What tokenizes: a tokenizer of tokenizers, or a sentencepiece model."""
        return self._backend

    @cached_property
    def style_tokens(self) -> StyleTokens:
        """What the prompt styles need to know."""
        special = [token.content for token in self._added.values() if token.special]
        others = [token.content for token in self._added.values() if not token.special]
        stops = frozenset(filter(None, map(self._backend.id_to_token, self.stop_ids)))
        return StyleTokens(
            self.eos_token, self._named_tokens, SpecialTokens(special, others), stops, self.chat_template
        )

    def prompt_style(self, settings: StyleSettings | str) -> PromptStyle:
        """Return the prompt style of these settings, or of this name, for the checkpoint."""
        return build_prompt_style(StyleSettings.of(settings), self.style_tokens)

    def stop_ids_of(self, style: PromptStyle) -> frozenset[int]:
        """Return the ids at which a generation stops: those of the checkpoint, and the end token of the style."""
        end = style.end_token and self._backend.token_to_id(style.end_token)
        return self.stop_ids | ({end} if end is not None and isinstance(end, int) else set())

    def adds_bos_to(self, style: PromptStyle) -> bool:
        """Whether a prompt of this style starts with the BOS that the tokenizer adds, or the style writes itself."""
        if style.add_special_tokens or not self.adds_bos:
            return self.adds_bos
        try:
            return style.conversation([Message("user", "x")]).text.startswith(self.bos_token or "")
        except ChatTemplateError:
            return True

    def encode_prompt(self, style: PromptStyle, prompt: Rendered) -> list[int]:
        """Return the ids of a prompt, as generation feeds them to the model."""
        ids: list[int] = self.encode_rendered([prompt], style.add_special_tokens).ids.tolist()
        return ids

    @cached_property
    def fingerprint(self) -> str:
        """Return a hash of everything that decides tokens and prompts."""
        parts = [tokenizers.__version__, self._backend.to_str(), self.bos_token, self.eos_token, self.chat_template]
        return sha256(json.dumps(parts).encode()).hexdigest()

    def encode(self, text: str, add_special_tokens: bool = True) -> Encoding:
        """Tokenize a text, with BOS and EOS if the checkpoint adds them."""
        ids, spans, _ = self.encode_batch([text], add_special_tokens)
        return Encoding(ids.tolist(), [(start, end) for start, end in spans.tolist()])

    def encode_batch(self, texts: Sequence[str], add_special_tokens: bool = True) -> Encodings:
        """Tokenize many texts on all cores."""
        try:
            with reporting_failure("the tokenizer"):
                encodings = encode_in_time(self._backend, list(texts), add_special_tokens)
        except TypeError as error:
            raise LitLoraError("a text contains an unpaired surrogate, which is not a character") from error
        lengths = np.array([len(encoding) for encoding in encodings], np.int32)
        ids = np.fromiter(chain.from_iterable(encoding.ids for encoding in encodings), np.int32, lengths.sum())
        return Encodings(ids, _spans(encodings, lengths), lengths)

    @reporting_failure("the tokenizer")
    def encode_rendered(self, rendered: Sequence[Rendered], add_special_tokens: bool = True) -> Encodings:
        """Tokenize rendered texts on all cores, with special tokens of an example's own text as plain text."""
        try:
            batch = encode_in_time(self._backend, [each.text for each in rendered], False)
        except TypeError as error:
            raise LitLoraError("a text contains an unpaired surrogate, which is not a character") from error
        pairs = [(encoding.ids, encoding.offsets) for encoding in batch]
        for n, each in enumerate(rendered):
            if each.literal:
                spans = self.style_tokens.special.spans(each.text, each.literal)
                pairs[n] = self._literal_encoder.encode(each.text, spans)
        prefix = self.added_ids[0] if add_special_tokens else []
        pairs = [pair if not prefix or pair[0][: len(prefix)] == prefix else _prefixed(prefix, *pair) for pair in pairs]
        lengths = np.array([len(ids) for ids, _ in pairs], np.int32)
        ids = np.fromiter(chain.from_iterable(ids for ids, _ in pairs), np.int32, lengths.sum())
        ends = chain.from_iterable(chain.from_iterable(offsets) for _, offsets in pairs)
        return Encodings(ids, np.fromiter(ends, np.int32, 2 * lengths.sum()).reshape(-1, 2), lengths)

    @cached_property
    def _literal_encoder(self) -> LiteralEncoder:
        return LiteralEncoder(self._backend)

    @cached_property
    def added_ids(self) -> tuple[list[int], list[int]]:
        """The ids that the tokenizer adds before and after a text, usually BOS and nothing."""
        ids, bare = (self._backend.encode_batch(["x"], add_special_tokens=add)[0].ids for add in (True, False))
        before = next((n for n in range(len(ids)) if ids[n : n + len(bare)] == bare), 0)
        return ids[:before], ids[before + len(bare) :]

    @property
    def adds_bos(self) -> bool:
        """Whether BOS is added before a text, and nothing else."""
        return self.bos_id is not None and self.added_ids[0] == [self.bos_id]

    def last_special(self, rendered: Rendered) -> int:
        """Return where the last special token of a prompt starts, 0 without one."""
        prompt = rendered.prompt
        spans = self.style_tokens.special.spans(prompt, rendered.literal)
        return spans[-1][0] if spans else 0

    def decode(self, ids: Sequence[int]) -> str:
        """Return the text of tokens, without special tokens."""
        return "".join(self.stream((), ids))

    def stream(self, prompt_ids: Sequence[int], ids: Iterable[int]) -> Iterator[str]:
        """Yield the text of `ids` after a prompt, in complete characters and without special tokens."""
        utf8 = codecs.getincrementaldecoder("utf-8")("replace")
        at_start = not any(map(self._bytes, prompt_ids))
        for token_id in ids:
            piece = self._bytes(token_id)
            if at_start and piece:
                # Encoding added this space before the text
                piece = piece.removeprefix(b" ") if self._drops_first_space else piece
                at_start = False
            if text := utf8.decode(piece):
                yield text
        if rest := utf8.decode(b"", final=True):
            yield rest

    def visible(self, ids: Sequence[int]) -> str:
        """Return the text of tokens, special tokens included; bytes that are no character are written as such."""
        pieces = (self._added[i].content.encode() if i in self._added else self._bytes(i) for i in ids)
        return b"".join(pieces).decode("utf-8", "backslashreplace")

    def _bytes(self, token_id: int) -> bytes:
        """Return the UTF-8 bytes of a token, maybe a part of a character; empty for a special token."""
        if added := self._added.get(token_id):
            return b"" if added.special else added.content.encode()
        token = self._backend.id_to_token(token_id) or ""  # an embedding may have more rows than the vocabulary
        if self.is_byte_level and BYTE_OF_CHARACTER.keys() >= set(token):
            return bytes(BYTE_OF_CHARACTER[character] for character in token)
        if re.fullmatch("<0x[0-9A-F]{2}>", token):
            return bytes([int(token[3:5], 16)])
        return token.replace(SPACE, " ").encode()


def _byte_level_alphabet() -> dict[str, int]:
    """Return the byte that each character of a byte-level token represents."""
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    hidden = sorted(set(range(256)) - set(printable))
    return {chr(byte): byte for byte in printable} | {chr(256 + n): byte for n, byte in enumerate(hidden)}


BYTE_OF_CHARACTER = _byte_level_alphabet()


def _spans(
    encodings: Sequence[tokenizers.Encoding | SentencePieceEncoding], lengths: NDArray[np.int32]
) -> NDArray[np.int32]:
    """Return the span of each token, empty for an added BOS or EOS."""
    ends = chain.from_iterable(chain.from_iterable(encoding.offsets) for encoding in encodings)
    spans = np.fromiter(ends, np.int32, 2 * lengths.sum()).reshape(-1, 2)
    masks = chain.from_iterable(encoding.special_tokens_mask for encoding in encodings)
    is_added = np.fromiter(masks, bool, lengths.sum())
    is_first = np.zeros_like(is_added)
    is_first[(np.cumsum(lengths) - lengths)[lengths > 0]] = True
    for index in np.flatnonzero(is_added):
        spans[index] = 0 if is_first[index] else spans[index - 1, 1]
    return spans


def _prefixed(
    prefix: list[int], ids: list[int], offsets: list[tuple[int, int]]
) -> tuple[list[int], list[tuple[int, int]]]:
    return [*prefix, *ids], [*[(0, 0)] * len(prefix), *offsets]


@contextmanager
def _reporting_inconsistency(checkpoint_dir: Path) -> Iterator[None]:
    """Turn an error about an unexpected type or a missing token into a LitLoraError: the files are inconsistent."""
    try:
        yield
    except (AttributeError, LookupError, OverflowError, TypeError, ValueError) as error:
        raise LitLoraError(
            f"the tokenizer files in {checkpoint_dir} are inconsistent ({error}); download the checkpoint again"
        ) from error
