"""Examples as token ids, with the supervised tokens marked by character offsets."""

from collections.abc import Iterable, Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from litlora.data.checks import SequenceFacts, flags_of_sequence
from litlora.data.examples import Example
from litlora.data.prompt_styles import PromptStyle
from litlora.data.rendered import Rendered
from litlora.data.tokenizer import Encodings, Tokenizer
from litlora.data.tokens import ABOUT, Tokens


class RenderedRow(NamedTuple):
    """A rendered sequence before it is tokenized, and what the checks of the data found about it."""

    rendered: Rendered
    line: int
    flags: int = 0
    same: int = 0
    similar: int = 0


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
    prefixes = _prompts_are_prefixes(rendered, ids, spans, tokenizer)
    facts = map(SequenceFacts, rendered, ids, labels.tolist(), prefixes, [tokenizer.bos_id] * len(ids))
    return [flags_of_sequence(each) for each in facts]


def _prompts_are_prefixes(
    rendered: Sequence[Rendered],
    ids: Sequence[NDArray[np.int32]],
    spans: Sequence[NDArray[np.int32]],
    tokenizer: Tokenizer,
) -> list[bool]:
    """Tell for each sequence whether the prompt alone has the ids with which the sequence begins.

    What comes before the last special token of a prompt cannot change: only the rest is tokenized again.
    """
    starts = [tokenizer.last_special(each) for each in rendered]
    rests = [each.prompt_from(start) for each, start in zip(rendered, starts, strict=True)]
    unique = {rest: n for n, rest in enumerate(dict.fromkeys(rests))}
    alone = tokenizer.encode_rendered(list(unique), add_special_tokens=False)
    pieces = alone.by_text(alone.ids)
    prompts = [pieces[unique[rest]] for rest in rests]
    firsts = [int(np.searchsorted(each[:, 1], start, side="right")) for each, start in zip(spans, starts, strict=True)]
    return [
        np.array_equal(each[first : first + len(prompt)], prompt)
        for each, first, prompt in zip(ids, firsts, prompts, strict=True)
    ]


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
