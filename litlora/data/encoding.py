"""Examples as token ids, with the supervised tokens marked by character offsets."""

import mmap
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from litlora.data.examples import Example
from litlora.data.prompt_styles import PromptStyle
from litlora.data.tokenizer import Tokenizer

CHUNK = 4_000_000  # ids that are read at once


class Tokens(NamedTuple):
    """The tokens of all examples, concatenated in `ids`; a token that is not a label is stored as -1 - id.

    The first token of an example is never a label, and the last token is only ever a label.
    """

    ids: NDArray[np.int32]
    offsets: NDArray[np.int64]
    """The start of each example in `ids`, and the end of the last one."""
    first_labels: NDArray[np.int32]
    """The number of input tokens before each example's first label; its number of input tokens if it has no label."""
    memory: mmap.mmap | None = None
    """The mapped file behind `ids`, if there is one."""

    def example(self, row: int, length: int) -> NDArray[np.int32]:
        """Return the first `length` tokens of an example, and one more as the last label."""
        start = int(self.offsets[row])
        ids = self.ids[start : start + length + 1].copy()
        self._release_pages()
        return ids

    def max_id(self) -> int:
        """Return the highest token id."""
        highest = 0
        for start in range(0, len(self.ids), CHUNK):
            chunk = self.ids[start : start + CHUNK]
            highest = max(highest, int(chunk.max()), ~int(chunk.min()))
            self._release_pages()
        return highest

    def _release_pages(self) -> None:
        if self.memory is not None:
            self.memory.madvise(mmap.MADV_DONTNEED)  # or every page read so far counts as this process's memory


def encode(examples: Sequence[Example], tokenizer: Tokenizer, style: PromptStyle, *, mask_prompt: bool) -> Tokens:
    """Tokenize examples.

    Prompt and responses are tokenized as one text; a token is a label if it holds a character of a response.
    """
    rendered = [style.render(example) for example in examples]
    texts = [r.text for r in rendered]
    ids, spans, lengths = tokenizer.encode_batch(texts, add_special_tokens=style.add_special_tokens)
    supervised = [r.supervised if mask_prompt else ((0, len(r.text)),) for r in rendered]
    is_label = _overlaps_any(spans, lengths, texts, supervised)
    offsets = np.concatenate([[0], np.cumsum(lengths, dtype=np.int64)])
    is_label[offsets[:-1]] = False
    return Tokens(np.where(is_label, ids, ~ids), offsets, _first_labels(is_label, offsets))


def _overlaps_any(
    spans: NDArray[np.int32],
    lengths: NDArray[np.int32],
    texts: Sequence[str],
    supervised: Sequence[Sequence[tuple[int, int]]],
) -> NDArray[np.bool_]:
    """Return for each token whether its span overlaps a supervised span of its text."""
    sizes = np.array([len(text) for text in texts], np.int64)
    text_starts = np.cumsum(sizes) - sizes  # character offsets of the texts in their concatenation
    starts, ends = (spans + np.repeat(text_starts, lengths)[:, None]).T
    pairs = zip(text_starts, supervised, strict=True)
    regions = np.array([(base + start, base + end) for base, regions in pairs for start, end in regions])
    next_region = np.searchsorted(regions[:, 1], starts, side="right")  # the first that ends after the token's start
    overlaps: NDArray[np.bool_] = np.append(regions[:, 0], sizes.sum())[next_region] < ends
    return overlaps


def _first_labels(is_label: NDArray[np.bool_], offsets: NDArray[np.int64]) -> NDArray[np.int32]:
    labels = np.append(np.flatnonzero(is_label), offsets[-1])
    first: NDArray[np.int64] = np.minimum(labels[np.searchsorted(labels, offsets[:-1])], offsets[1:])
    return (first - offsets[:-1] - 1).astype(np.int32)
