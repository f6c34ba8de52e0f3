"""Examples -> token ids and labels -> micro-batches without padding."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import islice

import torch
from torch import Tensor

from litlora.examples import Example
from litlora.loss import IGNORE_INDEX
from litlora.prompts import PromptStyle
from litlora.tokenizer import Encoding, Tokenizer


@dataclass(frozen=True)
class Sample:
    """An example as the model sees it: labels[i] is the token that follows tokens[i], or IGNORE_INDEX."""

    tokens: Tensor
    labels: Tensor


@dataclass(frozen=True)
class MicroBatch:
    """Samples end to end in one row: tokens (T,), labels (T,), and the length of each sample."""

    tokens: Tensor
    labels: Tensor
    lengths: tuple[int, ...]

    @property
    def supervised(self) -> int:
        """How many of the tokens have a label."""
        return int((self.labels != IGNORE_INDEX).sum())


@dataclass(frozen=True)
class Encoded:
    """The samples of a split, and what was lost to max_seq_length."""

    samples: list[Sample]
    cut: int
    dropped: int
    """Examples of which not one supervised token was left."""


def encode(
    examples: Sequence[Example], tokenizer: Tokenizer, style: PromptStyle, *, max_seq_length: int, mask_prompt: bool
) -> Encoded:
    """Turn examples into samples of at most `max_seq_length` tokens.

    Prompt and responses are one text, encoded once; a token is supervised when it holds a character of a response.
    The last token of a text is only ever a label, so an example that fits keeps its EOS.
    """
    rendered = [style.render(example) for example in examples]
    encodings = tokenizer.encode_batch([r.text for r in rendered], add_special_tokens=style.add_special_tokens)
    samples, cut = [], 0
    for encoding, r in zip(encodings, rendered, strict=True):
        supervised = r.supervised if mask_prompt else ((0, len(r.text)),)
        sample = _sample(encoding, supervised)
        cut += len(sample.tokens) > max_seq_length
        samples.append(Sample(sample.tokens[:max_seq_length], sample.labels[:max_seq_length]))
    kept = [sample for sample in samples if (sample.labels != IGNORE_INDEX).any()]
    return Encoded(kept, cut=cut, dropped=len(samples) - len(kept))


def _sample(encoding: Encoding, supervised: Sequence[tuple[int, int]]) -> Sample:
    ids = torch.tensor(encoding.ids)
    starts, ends = torch.tensor(encoding.spans).unbind(1)
    counts = torch.zeros(len(ids), dtype=torch.bool)
    for start, end in supervised:
        counts |= (starts < end) & (ends > start)
    return Sample(ids[:-1], torch.where(counts[1:], ids[1:], IGNORE_INDEX))


def join(samples: Sequence[Sample]) -> MicroBatch:
    """Lay samples end to end."""
    tokens = torch.cat([sample.tokens for sample in samples])
    labels = torch.cat([sample.labels for sample in samples])
    return MicroBatch(tokens, labels, tuple(len(sample.tokens) for sample in samples))


def micro_batches(samples: Sequence[Sample], micro_batch_size: int) -> list[MicroBatch]:
    """Split samples, in order, into micro-batches of at most `micro_batch_size`."""
    return [join(group) for group in _groups(samples, micro_batch_size)]


def global_batches(samples: Sequence[Sample], size: int, *, seed: int, epoch: int) -> list[list[Sample]]:
    """Split an epoch into global batches, in an order that follows from seed and epoch; the last may be smaller."""
    order = torch.randperm(len(samples), generator=torch.Generator().manual_seed(seed + epoch)).tolist()
    return list(_groups([samples[i] for i in order], size))


def _groups(samples: Sequence[Sample], size: int) -> Iterator[list[Sample]]:
    rest = iter(samples)
    while group := list(islice(rest, size)):
        yield group
