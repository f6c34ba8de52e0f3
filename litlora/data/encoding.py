"""Examples as token ids, with the supervised tokens marked by character offsets."""

import mmap
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from litlora.data.examples import Example
from litlora.data.prompt_styles import PromptStyle
from litlora.data.tokenizer import Tokenizer

PIECE = 4_000_000  # bytes of a split, or ids, that a process reads at one time


class Tokens(NamedTuple):
    """Examples end to end, in `ids`; a token that is no label is stored as -1 - id.

    The first token of an example is never a label, the last one is never anything else.
    """

    ids: NDArray[np.int32]
    offsets: NDArray[np.int64]
    """Where each example begins, and where the last one ends."""
    first_labels: NDArray[np.int32]
    """How many tokens of each example are read before its first label; all that could be, if it has none."""
    memory: mmap.mmap | None = None
    """The file behind `ids`, if it is one."""

    def example(self, row: int, length: int) -> NDArray[np.int32]:
        """Return the first tokens of an example, and one more to be the last label."""
        start = int(self.offsets[row])
        taken = self.ids[start : start + length + 1].copy()
        self._let_go()
        return taken

    def highest(self) -> int:
        """Return the highest of all ids."""
        highest = 0
        for start in range(0, len(self.ids), PIECE):
            piece = self.ids[start : start + PIECE]
            highest = max(highest, int(piece.max()), ~int(piece.min()))
            self._let_go()
        return highest

    def _let_go(self) -> None:
        if self.memory is not None:
            self.memory.madvise(mmap.MADV_DONTNEED)  # or all that was ever read counts as this process's memory


def encode(examples: Sequence[Example], tokenizer: Tokenizer, style: PromptStyle, *, mask_prompt: bool) -> Tokens:
    """Turn examples into tokens.

    Prompt and responses are one text, encoded once; a token is a label when it holds a character of a response.
    """
    rendered = [style.render(example) for example in examples]
    texts = [r.text for r in rendered]
    ids, spans, lengths = tokenizer.encode_batch(texts, add_special_tokens=style.add_special_tokens)
    learned = [r.supervised if mask_prompt else ((0, len(r.text)),) for r in rendered]
    is_label = _holds_any(spans, lengths, texts, learned)
    offsets = np.concatenate([[0], np.cumsum(lengths, dtype=np.int64)])
    is_label[offsets[:-1]] = False
    return Tokens(np.where(is_label, ids, ~ids), offsets, _first_labels(is_label, offsets))


def _holds_any(
    spans: NDArray[np.int32],
    lengths: NDArray[np.int32],
    texts: Sequence[str],
    learned: Sequence[Sequence[tuple[int, int]]],
) -> NDArray[np.bool_]:
    """Say of each token whether it holds a character of those that are learned in its text."""
    sizes = np.array([len(text) for text in texts], np.int64)
    before = np.cumsum(sizes) - sizes  # characters of the texts before each text, as if all were one
    starts, ends = (spans + np.repeat(before, lengths)[:, None]).T
    regions = np.array([(b + start, b + end) for b, pairs in zip(before, learned, strict=True) for start, end in pairs])
    first_behind = np.searchsorted(regions[:, 1], starts, side="right")
    overlaps: NDArray[np.bool_] = np.append(regions[:, 0], sizes.sum())[first_behind] < ends
    return overlaps


def _first_labels(is_label: NDArray[np.bool_], offsets: NDArray[np.int64]) -> NDArray[np.int32]:
    labels = np.append(np.flatnonzero(is_label), offsets[-1])
    first: NDArray[np.int64] = np.minimum(labels[np.searchsorted(labels, offsets[:-1])], offsets[1:])
    return (first - offsets[:-1] - 1).astype(np.int32)
