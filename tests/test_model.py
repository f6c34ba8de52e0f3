import pytest
import torch
from reference import hugging_face

from litlora.checkpoint import load_model
from litlora.model import GPT, KVCache
from litlora.sampling import Sampler, generate

LENGTHS = [11, 1, 40, 6]


@pytest.fixture
def model(checkpoint):
    return load_model(checkpoint, torch.float32, torch.device("cpu"))


def random_tokens(*lengths: int) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randint(300, (length,), generator=generator) for length in lengths]


def logits(model: GPT, tokens: torch.Tensor, lengths: list[int], cache: KVCache | None = None) -> torch.Tensor:
    with torch.no_grad():
        return model.lm_head(model(tokens, lengths, cache))


def test_logits_of_sequences_end_to_end_equal_those_of_transformers_one_by_one(checkpoint, model):
    sequences = random_tokens(*LENGTHS)
    found = logits(model, torch.cat(sequences), LENGTHS).split(LENGTHS)
    reference = hugging_face(checkpoint)
    for tokens, ours in zip(sequences, found, strict=True):
        with torch.no_grad():
            torch.testing.assert_close(ours, reference(tokens[None]).logits[0], atol=1e-5, rtol=0)


def test_logits_with_a_cache_equal_those_of_one_pass(model):
    tokens = random_tokens(40)[0]
    cache = KVCache(model.config, 40, torch.float32, torch.device("cpu"))
    parts = [logits(model, part, [len(part)], cache) for part in tokens.split([9, 1, 1, 13, 1, 15])]
    torch.testing.assert_close(torch.cat(parts), logits(model, tokens, [40]), atol=1e-5, rtol=2e-6)


def test_greedy_tokens_equal_those_of_transformers(checkpoint, model):
    prompt = random_tokens(9)[0]
    ours = list(generate(model, prompt.tolist(), Sampler(), max_new_tokens=40, stop_ids=[]))
    settings = {"max_new_tokens": 40, "do_sample": False, "eos_token_id": -1, "pad_token_id": 0}
    theirs = hugging_face(checkpoint).generate(prompt[None], attention_mask=torch.ones(1, 9), **settings)
    assert ours == theirs[0, 9:].tolist()


def test_greedy_tokens_are_the_same_without_a_cache(model):
    tokens = random_tokens(9)[0].tolist()
    ours = list(generate(model, tokens, Sampler(), max_new_tokens=20, stop_ids=[]))
    for _ in range(20):
        tokens.append(int(logits(model, torch.tensor(tokens), [len(tokens)])[-1].argmax()))
    assert ours == tokens[9:]


def test_bfloat16_logits_are_as_close_to_float32_as_those_of_transformers(checkpoint):
    tokens = random_tokens(40)[0]
    exact = logits(load_model(checkpoint, torch.float32, torch.device("cpu")), tokens, [40])
    ours = logits(load_model(checkpoint, torch.bfloat16, torch.device("cpu")), tokens, [40])
    with torch.no_grad():
        theirs = hugging_face(checkpoint, torch.bfloat16)(tokens[None]).logits[0]
    assert (ours - exact).abs().mean() < 1.5 * (theirs - exact).abs().mean()
