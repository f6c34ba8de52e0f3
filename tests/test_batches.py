import pytest
import torch

from litlora.batches import Sample, encode, global_batches, join, micro_batches
from litlora.examples import Example, Turn
from litlora.loss import IGNORE_INDEX
from litlora.tokenizer import Tokenizer

CONVERSATION = Example((Turn("Hi", "Hello 🚪"), Turn("And?", "Bye")))


@pytest.fixture(scope="module")
def tokenizer(tiny) -> Tokenizer:
    return Tokenizer(tiny)


def encoded(
    tokenizer, *examples: Example, style: str = "{instruction}:", max_seq_length: int = 256, mask_prompt: bool = True
):
    built = tokenizer.prompt_style(style)
    return encode(examples, tokenizer, built, max_seq_length=max_seq_length, mask_prompt=mask_prompt)


def numbered(count: int) -> list[Sample]:
    return [Sample(torch.full((n + 1,), n), torch.full((n + 1,), n)) for n in range(count)]


def test_every_response_and_its_eos_are_supervised_and_nothing_else(tokenizer):
    sample = encoded(tokenizer, CONVERSATION).samples[0]
    learned = sample.labels[sample.labels != IGNORE_INDEX]
    assert tokenizer.decode(learned.tolist()) == "Hello 🚪Bye"
    assert (learned == tokenizer.eos_id).sum() == 2
    assert learned[-1] == tokenizer.eos_id


def test_labels_are_the_tokens_that_follow(tokenizer):
    sample = encoded(tokenizer, CONVERSATION, mask_prompt=False).samples[0]
    assert torch.equal(sample.labels[:-1], sample.tokens[1:])
    assert (sample.labels != IGNORE_INDEX).all()


def test_prompts_are_learned_too_without_masking(tokenizer):
    masked, unmasked = (encoded(tokenizer, CONVERSATION, mask_prompt=mask).samples[0] for mask in (True, False))
    assert torch.equal(masked.tokens, unmasked.tokens)
    assert (masked.labels == IGNORE_INDEX).any()


def test_an_example_that_fits_exactly_keeps_its_eos(tokenizer):
    whole = encoded(tokenizer, CONVERSATION).samples[0]
    fitting = encoded(tokenizer, CONVERSATION, max_seq_length=len(whole.tokens))
    assert fitting.cut == 0
    assert fitting.samples[0].labels[-1] == tokenizer.eos_id


def test_longer_examples_are_cut_and_counted(tokenizer):
    whole = encoded(tokenizer, CONVERSATION).samples[0]
    found = encoded(tokenizer, CONVERSATION, CONVERSATION, max_seq_length=len(whole.tokens) - 1)
    assert (found.cut, found.dropped) == (2, 0)
    assert torch.equal(found.samples[0].labels, whole.labels[:-1])


def test_examples_without_a_supervised_token_left_are_dropped_and_counted(tokenizer):
    found = encoded(tokenizer, CONVERSATION, Example((Turn("a" * 50, "b"),)), style="none", max_seq_length=10)
    assert (found.cut, found.dropped, len(found.samples)) == (2, 1, 1)


def test_a_micro_batch_holds_its_samples_end_to_end_without_padding():
    micro = join(numbered(3))
    assert micro.tokens.tolist() == [0, 1, 1, 2, 2, 2]
    assert micro.lengths == (1, 2, 3)


def test_micro_batches_hold_all_samples_in_order():
    assert [micro.lengths for micro in micro_batches(numbered(5), 2)] == [(1, 2), (3, 4), (5,)]


def test_an_epoch_holds_every_sample_once_and_its_last_global_batch_is_smaller():
    batches = global_batches(numbered(10), 4, seed=1, epoch=1)
    assert [len(batch) for batch in batches] == [4, 4, 2]
    assert sorted(int(sample.tokens[0]) for batch in batches for sample in batch) == list(range(10))


def test_the_order_follows_from_seed_and_epoch_alone():
    def order(seed: int, epoch: int) -> list[int]:
        return [int(s.tokens[0]) for batch in global_batches(numbered(30), 4, seed=seed, epoch=epoch) for s in batch]

    assert order(1, 1) == order(1, 1)
    assert len({tuple(order(*pair)) for pair in ((1, 1), (1, 2), (5, 1))}) == 3
