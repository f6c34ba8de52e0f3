"""Examples as token ids, with the supervised tokens marked by character offsets."""

from collections.abc import Iterable, Sequence
from typing import NamedTuple, Self

import numpy as np
from numpy.typing import NDArray

from litlora.data.checks.rows import SequenceFacts, flags_of_sequence
from litlora.data.examples import Example
from litlora.data.prompts.rendered import Rendered
from litlora.data.prompts.styles import PromptStyle
from litlora.data.tokenizer import Encodings, Tokenizer
from litlora.data.tokens import ABOUT, Tokens

CONTEXT = 32  # characters, behind which the tokens of a text do not depend on what comes before or after


class RenderedRow(NamedTuple):
    """A rendered sequence before it is tokenized, and what the checks of the data found about it."""

    rendered: Rendered
    line: int
    flags: int = 0
    same: int = 0
    similar: int = 0


class TokenizedText(NamedTuple):
    """A rendered text with its ids and their spans."""

    rendered: Rendered
    ids: NDArray[np.int32]
    spans: NDArray[np.int32]  # (tokens, 2)

    def from_character(self, position: int) -> "TokenizedText":
        """Return the same text with those tokens only that end behind a position."""
        first = int(np.searchsorted(self.spans[:, 1], position, side="right"))
        return self._replace(ids=self.ids[first:], spans=self.spans[first:])

    def begins_with(self, ids: NDArray[np.int32]) -> bool:
        """Tell whether these are the first ids."""
        return np.array_equal(self.ids[: len(ids)], ids)


class EndOfPrompt(NamedTuple):
    """The last characters of a prompt, and where they start."""

    start: int
    rendered: Rendered

    @classmethod
    def of(cls, row: TokenizedText, tokenizer: Tokenizer) -> Self:
        """Return the end of a row's prompt, from the last special token on or from a token far enough before it."""
        earliest = max(0, len(row.rendered.prompt) - 2 * CONTEXT)
        token = int(np.searchsorted(row.spans[:, 0], earliest, side="right")) - 1
        start = int(row.spans[token, 0])
        end = row.rendered.prompt_from(start)
        special = tokenizer.last_special(end)
        return cls(start + special, end.prompt_from(special))

    def is_same_in(self, row: TokenizedText, alone: TokenizedText) -> bool:
        """Tell whether its tokens alone are those of the row.

        The first ones of a long end are left out: they may depend on what comes before it.
        """
        length = len(alone.rendered.text)
        skipped = max(0, length - CONTEXT)
        theirs, own = row.from_character(self.start + skipped), alone.from_character(skipped)
        if not len(own.ids) or not len(theirs.ids):
            return False
        return bool(theirs.spans[0, 0] == self.start + own.spans[0, 0]) and theirs.begins_with(own.ids)


def encode(examples: Iterable[Example], tokenizer: Tokenizer, style: PromptStyle, *, mask_prompt: bool) -> Tokens:
    """Tokenize examples."""
    rendered = [(line, style.render(example)) for line, example in enumerate(examples, start=1)]
    rows = [RenderedRow(each, line) for line, sequences in rendered for each in sequences]
    return encode_rows(rows, tokenizer, style, mask_prompt=mask_prompt)


def encode_rows(rows: Sequence[RenderedRow], tokenizer: Tokenizer, style: PromptStyle, *, mask_prompt: bool) -> Tokens:
    """Tokenize rendered sequences.

    Prompt and responses are tokenized as one text; a token is a label if it holds a character of a response.
    """
    rendered = [row.rendered for row in rows]
    encodings = tokenizer.encode_rendered(rendered, style.add_special_tokens)
    texts = [r.text for r in rendered]
    supervised = [r.supervised if mask_prompt else ((0, len(r.text)),) for r in rendered]
    is_label = _overlaps_any(encodings, texts, supervised)
    offsets = np.concatenate([[0], np.cumsum(encodings.lengths, dtype=np.int64)])
    is_label[offsets[:-1]] = False
    first_labels, about = _first_labels(is_label, offsets), np.zeros(len(rows), ABOUT)
    for name in ("line", "flags", "same", "similar"):
        about[name] = [getattr(row, name) for row in rows]
    about["last_label"] = _last_labels(is_label, offsets)
    about["labels"] = np.add.reduceat(is_label, offsets[:-1], dtype=np.int32)
    about["flags"] |= np.array(_flags(rendered, encodings, about["labels"], tokenizer), np.uint32)
    return Tokens(np.where(is_label, encodings.ids, ~encodings.ids), offsets, first_labels, about)


def _flags(
    rendered: Sequence[Rendered],
    encodings: Encodings,
    labels: NDArray[np.int32],
    tokenizer: Tokenizer,
) -> list[int]:
    """Return a bit for each check of sequences that found something, for each sequence."""
    ids, spans = encodings.by_text(encodings.ids), encodings.by_text(encodings.spans)
    prefixes = _prompts_are_prefixes(list(map(TokenizedText, rendered, ids, spans)), tokenizer)
    facts = map(SequenceFacts, rendered, ids, labels.tolist(), prefixes, [tokenizer.bos_id] * len(ids))
    return [flags_of_sequence(each) for each in facts]


def _prompts_are_prefixes(rows: Sequence[TokenizedText], tokenizer: Tokenizer) -> list[bool]:
    """Tell for each sequence whether the prompt alone has the ids with which the sequence begins.

    What follows a prompt changes the tokens next to it. So the end of a prompt is tokenized again, and the whole of it
    only where the end has other ids, since this can also come from what the end lacks before it.
    """
    have_end = _have_end_of_prompt(rows, tokenizer)
    have_whole = iter(_have_prompt([row for row, found in zip(rows, have_end, strict=True) if not found], tokenizer))
    return [found or next(have_whole) for found in have_end]


def _have_end_of_prompt(rows: Sequence[TokenizedText], tokenizer: Tokenizer) -> list[bool]:
    ends = [EndOfPrompt.of(row, tokenizer) for row in rows]
    alone = _tokenize([end.rendered for end in ends], tokenizer)
    return [end.is_same_in(row, text) for end, row, text in zip(ends, rows, alone, strict=True)]


def _have_prompt(rows: Sequence[TokenizedText], tokenizer: Tokenizer) -> list[bool]:
    """Tell the same from the prompts' last special tokens on: what comes before one cannot change."""
    starts = [tokenizer.last_special(row.rendered) for row in rows]
    alone = _tokenize([row.rendered.prompt_from(start) for row, start in zip(rows, starts, strict=True)], tokenizer)
    return [
        row.from_character(start).begins_with(text.from_character(0).ids)
        for row, start, text in zip(rows, starts, alone, strict=True)
    ]


def _tokenize(texts: Sequence[Rendered], tokenizer: Tokenizer) -> list[TokenizedText]:
    """Tokenize texts, equal ones once."""
    unique = {text: n for n, text in enumerate(dict.fromkeys(texts))}
    encodings = tokenizer.encode_rendered(list(unique), add_special_tokens=False)
    tokenized = list(map(TokenizedText, unique, encodings.by_text(encodings.ids), encodings.by_text(encodings.spans)))
    return [tokenized[unique[text]] for text in texts]


def _overlaps_any(
    encodings: Encodings, texts: Sequence[str], supervised: Sequence[Sequence[tuple[int, int]]]
) -> NDArray[np.bool_]:
    """Return for each token whether its span overlaps a supervised span of its text."""
    _, spans, lengths = encodings
    sizes = np.array([len(text) for text in texts], np.int64)
    text_starts = np.cumsum(sizes) - sizes  # character offsets of the texts in their concatenation
    starts, ends = (spans + np.repeat(text_starts, lengths)[:, None]).T
    pairs = zip(text_starts, supervised, strict=True)
    found = [(base + start, base + end) for base, regions in pairs for start, end in regions]
    regions = np.array(found, np.int64).reshape(-1, 2)
    next_region = np.searchsorted(regions[:, 1], starts, side="right")  # the first that ends after the token's start
    overlaps: NDArray[np.bool_] = np.append(regions[:, 0], sizes.sum())[next_region] < ends
    return overlaps


def _first_labels(is_label: NDArray[np.bool_], offsets: NDArray[np.int64]) -> NDArray[np.int32]:
    labels = np.append(np.flatnonzero(is_label), offsets[-1])
    first: NDArray[np.int64] = np.minimum(labels[np.searchsorted(labels, offsets[:-1])], offsets[1:])
    return (first - offsets[:-1] - 1).astype(np.int32)


def _last_labels(is_label: NDArray[np.bool_], offsets: NDArray[np.int64]) -> NDArray[np.int32]:
    """Return the number of input tokens before each sequence's last label, -1 where it has none."""
    positions = np.where(is_label, np.arange(len(is_label)), -1)
    last = np.maximum.reduceat(positions, offsets[:-1]) - offsets[:-1] - 1
    return np.where(np.add.reduceat(is_label, offsets[:-1], dtype=np.int32) > 0, last, -1).astype(np.int32)
