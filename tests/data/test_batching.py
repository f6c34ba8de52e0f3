import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from litlora.args import TrainArgs
from litlora.data.batching import (
    DUMMY_MICRO_BATCH,
    Sample,
    Samples,
    epoch_order,
    longest_micro_batch,
    micro_batches,
    pack,
    pad,
    sequential_batches,
    share_prefixes,
    split_across_ranks,
    with_dropout_seeds,
)
from litlora.data.encoding import Tokens, encode
from litlora.data.examples import Example, Turn
from litlora.data.tokenizer import Tokenizer
from litlora.nn.loss import IGNORE_INDEX

CONVERSATION = Example((Turn("Hi", "Hello 🚪"), Turn("And?", "Bye")))


@pytest.fixture(scope="module")
def tokenizer(tiny) -> Tokenizer:
    return Tokenizer(tiny)


def encoded(
    tokenizer, *examples: Example, style: str = "{instruction}:", max_seq_length: int = 256, mask_prompt: bool = True
) -> Samples:
    built = tokenizer.prompt_style(style)
    return Samples(encode(examples, tokenizer, built, mask_prompt=mask_prompt), max_seq_length)


def of_lengths(*lengths: int) -> list[Sample]:
    """Return samples of these lengths, each of a token of its own."""
    return [Sample(torch.full((length,), n), torch.full((length,), n)) for n, length in enumerate(lengths)]


def numbered(count: int) -> Samples:
    """Return samples of which each holds its number alone."""
    ids = np.repeat(np.arange(count, dtype=np.int32), 2)
    return Samples(Tokens(ids, np.arange(0, 2 * count + 1, 2), np.zeros(count, np.int32)), max_seq_length=9)


def test_every_response_and_its_eos_are_supervised_and_nothing_else(tokenizer):
    sample = encoded(tokenizer, CONVERSATION)[0]
    learned = sample.labels[sample.labels != IGNORE_INDEX]
    assert tokenizer.decode(learned.tolist()) == "Hello 🚪Bye"
    assert (learned == tokenizer.eos_id).sum() == 2
    assert learned[-1] == tokenizer.eos_id


def test_labels_are_the_tokens_that_follow(tokenizer):
    sample = encoded(tokenizer, CONVERSATION, mask_prompt=False)[0]
    assert torch.equal(sample.labels[:-1], sample.tokens[1:])
    assert (sample.labels != IGNORE_INDEX).all()


def test_prompts_are_learned_too_without_masking(tokenizer):
    masked, unmasked = (encoded(tokenizer, CONVERSATION, mask_prompt=mask)[0] for mask in (True, False))
    assert torch.equal(masked.tokens, unmasked.tokens)
    assert (masked.labels == IGNORE_INDEX).any()


def test_an_example_that_fits_exactly_keeps_its_eos(tokenizer):
    whole = encoded(tokenizer, CONVERSATION)[0]
    fitting = encoded(tokenizer, CONVERSATION, max_seq_length=len(whole.tokens))
    assert fitting.cut == 0
    assert fitting[0].labels[-1] == tokenizer.eos_id


def test_longer_examples_are_cut_and_counted(tokenizer):
    whole = encoded(tokenizer, CONVERSATION)[0]
    found = encoded(tokenizer, CONVERSATION, CONVERSATION, max_seq_length=len(whole.tokens) - 1)
    assert (found.cut, found.dropped) == (2, 0)
    assert torch.equal(found[0].labels, whole.labels[:-1])


def test_examples_without_a_supervised_token_left_are_dropped_and_counted(tokenizer):
    found = encoded(tokenizer, CONVERSATION, Example((Turn("a" * 50, "b"),)), style="none", max_seq_length=10)
    assert (found.cut, found.dropped, len(found)) == (2, 1, 1)


def test_examples_that_are_not_dropped_stay_what_they_are(tokenizer):
    kept = encoded(tokenizer, CONVERSATION)[0]
    found = encoded(tokenizer, Example((Turn("a" * 300, "b"),)), CONVERSATION, style="{instruction}:")
    assert len(found) == 1
    assert torch.equal(found[0].tokens, kept.tokens)
    assert torch.equal(found[0].labels, kept.labels)


def test_a_micro_batch_holds_its_samples_end_to_end_without_padding():
    micro = pack(of_lengths(1, 2, 3))
    assert micro.tokens.tolist() == [0, 1, 1, 2, 2, 2]
    assert micro.lengths == (1, 2, 3)


def masked(tokens: list[int], prompt: int) -> Sample:
    """Return a sample of which what follows the prompt is learned."""
    labels = torch.tensor([*tokens[1:], 7])
    labels[: prompt - 1] = IGNORE_INDEX
    return Sample(torch.tensor(tokens), labels)


@given(st.lists(st.tuples(st.lists(st.integers(0, 1), min_size=1, max_size=9), st.integers(1, 9)), min_size=1))
def test_of_samples_that_begin_alike_what_they_share_is_there_once(drawn):
    samples = [masked(tokens, min(prompt, len(tokens))) for tokens, prompt in drawn]
    folded = share_prefixes(pack(samples))
    seen: list[tuple[int, int]] = []
    found, start = [], 0
    for shared, own in zip(folded.shared, folded.lengths, strict=True):
        rows = slice(start, start + own)
        path = list(zip(folded.tokens[rows].tolist(), folded.labels[rows].tolist(), strict=True))
        seen = [*((token, IGNORE_INDEX) for token, _ in seen[:shared]), *path]
        assert len(seen) == shared + own
        found.append(seen)
        start += own
    assert start == len(folded.tokens) <= sum(len(sample.tokens) for sample in samples)
    expected = (list(zip(s.tokens.tolist(), s.labels.tolist(), strict=True)) for s in samples)
    assert sorted(found) == sorted(expected)


def test_tokens_with_a_label_are_not_shared_and_all_before_them_are():
    alike = [masked([5, 6, 8, 9], 3), masked([5, 6, 8, 9], 4), masked([5, 6, 8, 9], 1)]
    assert sorted(share_prefixes(pack(alike)).shared) == [0, 0, 3]
    assert sum(share_prefixes(pack([masked([5, 6, 8, n], 3) for n in range(4)])).lengths) == 4 + 3 * 2


def test_a_micro_batch_is_filled_up_with_tokens_without_labels():
    filled = pad(pack(of_lengths(3, 8)), 4)
    assert filled.lengths == (3, 9)
    assert filled.tokens.tolist() == [0, 0, 0, *[1] * 8, 0]
    assert filled.supervised == 11
    assert pad(filled, 4).lengths == filled.lengths


@pytest.mark.parametrize("size", [1, 2, 3, 4, 16])
def test_a_global_batch_is_the_fewest_micro_batches_of_so_many_samples(size):
    samples = of_lengths(9, 1, 7, 3, 5, 2, 8, 4, 6, 10)
    found = micro_batches(samples, size, None)
    assert len(found) == math.ceil(10 / size)
    assert max(len(micro.lengths) for micro in found) <= size
    assert sorted(length for micro in found for length in micro.lengths) == list(range(1, 11))


def test_micro_batches_are_balanced_by_length():
    assert [micro.lengths for micro in micro_batches(of_lengths(90, 10, 80, 20, 70, 30), 2, None)] == [
        (90, 10),
        (80, 20),
        (70, 30),
    ]


def test_the_first_micro_batch_holds_the_first_sample_and_samples_keep_their_order():
    found = micro_batches(of_lengths(1, 50, 2, 60), 2, None)
    assert [micro.tokens.unique_consecutive().tolist() for micro in found] == [[0, 3], [1, 2]]


@pytest.mark.parametrize(
    ("lengths", "most", "count"),
    [
        ([5, 5, 5, 5], 20, 1),
        ([5, 5, 5, 5], 19, 2),
        ([5, 5, 5, 5], 5, 4),
        ([10] * 16, 70, 3),
        ([8, 7, 6, 5, 4], 15, 2),
        ([6, 5, 5, 4, 4, 3, 3], 10, 3),
        ([5, 5, 4, 3, 3], 10, 2),  # the shortest group first would need three
    ],
)
def test_a_bound_of_tokens_gives_the_fewest_micro_batches_whatever_the_number_of_samples(lengths, most, count):
    found = micro_batches(of_lengths(*lengths), 1, most)
    assert len(found) == count
    assert max(len(micro.tokens) for micro in found) <= most
    assert sorted(length for micro in found for length in micro.lengths) == sorted(lengths)


def test_micro_batches_within_a_bound_of_tokens_are_balanced():
    lengths = torch.randint(20, 200, (64,), generator=torch.Generator().manual_seed(1)).tolist()
    found = [len(micro.tokens) for micro in micro_batches(of_lengths(*lengths), 4, 1_000)]
    assert len(found) == math.ceil(sum(lengths) / 1_000)
    assert max(found) - min(found) < 20


def test_the_order_of_an_epoch_follows_from_seed_and_epoch_alone():
    found = [tuple(epoch_order(30, seed=seed, epoch=epoch)) for seed, epoch in ((1, 1), (1, 1), (1, 2), (5, 1))]
    assert found[0] == found[1]
    assert len(set(found)) == 3
    generator = torch.Generator().manual_seed(7)
    assert epoch_order(30, seed=3, epoch=4).tolist() == torch.randperm(30, generator=generator).tolist()


def test_a_split_may_be_read_in_the_order_of_its_file():
    groups = list(sequential_batches(numbered(5), 2))
    assert [[int(sample.tokens[0]) for sample in group] for group in groups] == [[0, 1], [2, 3], [4]]


@pytest.mark.parametrize("ranks", [1, 3])
@pytest.mark.parametrize(("size", "max_tokens"), [(4, None), (1, None), (16, None), (4, 700)])
def test_the_longest_micro_batch_of_all_epochs_is_found_without_reading_them(size, max_tokens, ranks):
    lengths = np.random.default_rng(0).integers(1, 300, 500)
    offsets = np.concatenate([[0], np.cumsum(lengths + 1)])
    samples = Samples(Tokens(np.zeros(offsets[-1], np.int32), offsets, np.zeros(500, np.int32)), max_seq_length=300)
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


def test_each_micro_batch_has_a_seed_of_its_own_that_follows_from_torchs():
    drawn = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        drawn.append([micro.seed for micro in with_dropout_seeds([DUMMY_MICRO_BATCH] * 5)])
    assert drawn[0] == drawn[1]
    assert len({*drawn[0], *drawn[2]}) == 10
