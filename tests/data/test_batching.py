import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from litlora.args.finetune import TrainArgs
from litlora.data.batching import (
    DUMMY_MICRO_BATCH,
    Sample,
    Samples,
    epoch_order,
    longest_micro_batch,
    micro_batches,
    optimize_layout,
    pack,
    pad,
    sequential_batches,
    share_prefixes,
    split_across_ranks,
    with_dropout_seeds,
)
from litlora.data.encoding import encode
from litlora.data.examples import Example, Turn
from litlora.data.tokenizer import Tokenizer
from litlora.data.tokens import ABOUT, Tokens
from litlora.nn.backend import CUDA
from litlora.nn.loss import IGNORE_INDEX

CONVERSATION = Example.of(Turn("Hi", "Hello 🚪"), Turn("And?", "Bye"))


def at_any_length(length: int) -> tuple[int, ...]:
    """Return the same for all lengths, which have the same rotary frequencies."""
    return ()


@pytest.fixture(scope="module")
def tokenizer(tiny) -> Tokenizer:
    return Tokenizer(tiny)


def encoded(
    tokenizer, *examples: Example, style: str = "{instruction}:", max_seq_length: int = 256, mask_prompt: bool = True
) -> Samples:
    built = tokenizer.prompt_style(style)
    return Samples(encode(examples, tokenizer, built, mask_prompt=mask_prompt), max_seq_length)


def of_lengths(*lengths: int) -> list[Sample]:
    """Return samples of these lengths, each of one repeated token."""
    return [Sample(torch.full((length,), n), torch.full((length,), n)) for n, length in enumerate(lengths)]


def numbered(count: int) -> Samples:
    """Return samples of one token, their index."""
    ids = np.repeat(np.arange(count, dtype=np.int32), 2)
    offsets, firsts = np.arange(0, 2 * count + 1, 2), np.zeros(count, np.int32)
    return Samples(Tokens(ids, offsets, firsts, np.zeros(count, ABOUT)), max_seq_length=9)


def test_responses_and_their_eos_are_supervised(tokenizer):
    sample = encoded(tokenizer, CONVERSATION)[0]
    supervised = sample.labels[sample.labels != IGNORE_INDEX]
    assert tokenizer.decode(supervised.tolist()) == "Hello 🚪Bye"
    assert (supervised == tokenizer.eos_id).sum() == 2
    assert supervised[-1] == tokenizer.eos_id


def test_labels_are_the_next_tokens(tokenizer):
    sample = encoded(tokenizer, CONVERSATION, mask_prompt=False)[0]
    assert torch.equal(sample.labels[:-1], sample.tokens[1:])
    assert (sample.labels != IGNORE_INDEX).all()


def test_prompts_are_supervised_without_masking(tokenizer):
    masked, unmasked = (encoded(tokenizer, CONVERSATION, mask_prompt=mask)[0] for mask in (True, False))
    assert torch.equal(masked.tokens, unmasked.tokens)
    assert (masked.labels == IGNORE_INDEX).any()


def test_example_of_maximum_length_keeps_its_eos(tokenizer):
    full = encoded(tokenizer, CONVERSATION)[0]
    fitting = encoded(tokenizer, CONVERSATION, max_seq_length=len(full.tokens))
    assert fitting.truncated == 0
    assert fitting[0].labels[-1] == tokenizer.eos_id


def test_longer_examples_are_truncated_and_counted(tokenizer):
    full = encoded(tokenizer, CONVERSATION)[0]
    actual = encoded(tokenizer, CONVERSATION, CONVERSATION, max_seq_length=len(full.tokens) - 1)
    assert (actual.truncated, actual.dropped) == (2, 0)
    assert torch.equal(actual[0].labels, full.labels[:-1])


def test_examples_without_labels_are_dropped_and_counted(tokenizer):
    actual = encoded(tokenizer, CONVERSATION, Example.of(Turn("a" * 50, "b")), style="none", max_seq_length=10)
    assert (actual.truncated, actual.dropped, len(actual)) == (2, 1, 1)


def test_dropped_examples_leave_the_others_unchanged(tokenizer):
    expected = encoded(tokenizer, CONVERSATION)[0]
    actual = encoded(tokenizer, Example.of(Turn("a" * 300, "b")), CONVERSATION, style="{instruction}:")
    assert len(actual) == 1
    assert torch.equal(actual[0].tokens, expected.tokens)
    assert torch.equal(actual[0].labels, expected.labels)


def test_packing_concatenates_without_padding():
    micro = pack(of_lengths(1, 2, 3))
    assert micro.tokens.tolist() == [0, 1, 1, 2, 2, 2]
    assert micro.lengths == (1, 2, 3)


@pytest.mark.parametrize("lengths", [(1, 2, 3), (100, 28), (200, 57)])
def test_micro_batches_of_a_gpu_have_few_shapes(lengths):
    micro = pack(of_lengths(*lengths))
    padded = optimize_layout(micro, CUDA, torch.bfloat16, at_any_length)
    assert len(padded.tokens) == -(-sum(lengths) // 128) * 128
    assert padded.lengths[: len(lengths)] == lengths
    assert torch.equal(padded.labels[: sum(lengths)], micro.labels)
    assert set(padded.labels[sum(lengths) :].tolist()) <= {IGNORE_INDEX}


def masked(tokens: list[int], prompt: int) -> Sample:
    """Return a sample whose tokens after the prompt are supervised."""
    labels = torch.tensor([*tokens[1:], 7])
    labels[: prompt - 1] = IGNORE_INDEX
    return Sample(torch.tensor(tokens), labels)


@given(st.lists(st.tuples(st.lists(st.integers(0, 1), min_size=1, max_size=9), st.integers(1, 9)), min_size=1))
def test_shared_prefixes_are_stored_once(drawn):
    samples = [masked(tokens, min(prompt, len(tokens))) for tokens, prompt in drawn]
    shared_batch = share_prefixes(pack(samples), at_any_length)
    seen: list[tuple[int, int]] = []
    actual, start = [], 0
    for shared, own in zip(shared_batch.shared, shared_batch.lengths, strict=True):
        rows = slice(start, start + own)
        path = list(zip(shared_batch.tokens[rows].tolist(), shared_batch.labels[rows].tolist(), strict=True))
        seen = [*((token, IGNORE_INDEX) for token, _ in seen[:shared]), *path]
        assert len(seen) == shared + own
        actual.append(seen)
        start += own
    assert start == len(shared_batch.tokens) <= sum(len(sample.tokens) for sample in samples)
    expected = (list(zip(s.tokens.tolist(), s.labels.tolist(), strict=True)) for s in samples)
    assert sorted(actual) == sorted(expected)


def test_labelled_tokens_are_not_shared():
    samples = [masked([5, 6, 8, 9], 3), masked([5, 6, 8, 9], 4), masked([5, 6, 8, 9], 1)]
    assert sorted(share_prefixes(pack(samples), at_any_length).shared) == [0, 0, 3]
    batch = pack([masked([5, 6, 8, n], 3) for n in range(4)])
    assert sum(share_prefixes(batch, at_any_length).lengths) == 4 + 3 * 2


def test_prefixes_are_not_shared_across_rotary_frequencies():
    samples = [masked([5, 6, 8, *[n] * more], 3) for n, more in enumerate((1, 4, 1, 5))]
    shared_batch = share_prefixes(pack(samples), lambda length: (int(length > 5),))
    assert (shared_batch.lengths, shared_batch.shared) == ((4, 2, 7, 6), (0, 2, 0, 2))


def test_padding_has_no_labels():
    padded = pad(pack(of_lengths(3, 8)), 4)
    assert padded.lengths == (3, 8, 1)
    assert padded.tokens.tolist() == [0, 0, 0, *[1] * 8, 0]
    assert padded.supervised == 11
    assert pad(padded, 4).lengths == padded.lengths


@pytest.mark.parametrize("size", [1, 2, 3, 4, 16])
def test_fewest_micro_batches_of_a_number_of_samples(size):
    samples = of_lengths(9, 1, 7, 3, 5, 2, 8, 4, 6, 10)
    actual = micro_batches(samples, size, None)
    assert len(actual) == math.ceil(10 / size)
    assert max(len(micro.lengths) for micro in actual) <= size
    assert sorted(length for micro in actual for length in micro.lengths) == list(range(1, 11))


def test_micro_batches_are_balanced_by_length():
    assert [micro.lengths for micro in micro_batches(of_lengths(90, 10, 80, 20, 70, 30), 2, None)] == [
        (90, 10),
        (80, 20),
        (70, 30),
    ]


def test_micro_batches_keep_the_order_of_samples():
    actual = micro_batches(of_lengths(1, 50, 2, 60), 2, None)
    assert [micro.tokens.unique_consecutive().tolist() for micro in actual] == [[0, 3], [1, 2]]


@pytest.mark.parametrize(
    ("lengths", "most", "count"),
    [
        ([5, 5, 5, 5], 20, 1),
        ([5, 5, 5, 5], 19, 2),
        ([5, 5, 5, 5], 5, 4),
        ([10] * 16, 70, 3),
        ([8, 7, 6, 5, 4], 15, 2),
        ([6, 5, 5, 4, 4, 3, 3], 10, 3),
        ([5, 5, 4, 3, 3], 10, 2),  # greedy balancing would need three
    ],
)
def test_fewest_micro_batches_within_a_token_limit(lengths, most, count):
    actual = micro_batches(of_lengths(*lengths), 1, most)
    assert len(actual) == count
    assert max(len(micro.tokens) for micro in actual) <= most
    assert sorted(length for micro in actual for length in micro.lengths) == sorted(lengths)


def test_micro_batches_within_a_token_limit_are_balanced():
    lengths = torch.randint(20, 200, (64,), generator=torch.Generator().manual_seed(1)).tolist()
    actual = [len(micro.tokens) for micro in micro_batches(of_lengths(*lengths), 4, 1_000)]
    assert len(actual) == math.ceil(sum(lengths) / 1_000)
    assert max(actual) - min(actual) < 20


def test_epoch_order_depends_on_seed_and_epoch():
    actual = [tuple(epoch_order(30, seed=seed, epoch=epoch)) for seed, epoch in ((1, 1), (1, 1), (1, 2), (5, 1))]
    assert actual[0] == actual[1]
    assert len(set(actual)) == 3
    generator = torch.Generator().manual_seed(7)
    assert epoch_order(30, seed=3, epoch=4).tolist() == torch.randperm(30, generator=generator).tolist()


def test_sequential_batches_keep_the_order_of_the_file():
    groups = list(sequential_batches(numbered(5), 2))
    assert [[int(sample.tokens[0]) for sample in group] for group in groups] == [[0, 1], [2, 3], [4]]


@pytest.mark.parametrize("ranks", [1, 3])
@pytest.mark.parametrize(("size", "max_tokens"), [(4, None), (1, None), (16, None), (4, 700)])
def test_longest_micro_batch_equals_exhaustive_search(size, max_tokens, ranks):
    lengths = np.random.default_rng(0).integers(1, 300, 500)
    offsets = np.concatenate([[0], np.cumsum(lengths + 1)])
    samples = Samples(
        Tokens(np.zeros(offsets[-1], np.int32), offsets, np.zeros(500, np.int32), np.zeros(500, ABOUT)),
        max_seq_length=300,
    )
    orders = [epoch_order(500, seed=1, epoch=epoch) for epoch in (1, 2, 3)]
    batches = [order[start : start + 16].tolist() for order in orders for start in range(0, 500, 16)]
    sizes = [
        sum(micro.lengths)
        for batch in batches
        for share in split_across_ranks([samples[number] for number in batch], samples.lengths[batch].tolist(), ranks)
        for micro in micro_batches(share, size, max_tokens)
    ]
    train = TrainArgs(micro_batch_size=size, micro_batch_tokens=max_tokens)
    assert len(pack(longest_micro_batch(samples, orders, train, ranks)).tokens) == max(sizes)


def test_dropout_seeds_follow_from_torch_seed():
    drawn = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        drawn.append([micro.seed for micro in with_dropout_seeds([DUMMY_MICRO_BATCH] * 5)])
    assert drawn[0] == drawn[1]
    assert len({*drawn[0], *drawn[2]}) == 10
