"""Completions of many prompts together, which are those of each alone."""

from collections.abc import Iterator
from dataclasses import dataclass, field

import pytest
import torch

from litlora.generation.batch import Request, complete_all
from litlora.generation.sampler import Sampler
from litlora.generation.session import generate
from litlora.models.checkpoint import Checkpoint
from litlora.models.transformer import GPT

PROMPTS = [[5, 6, 7, 8, 9], [11], [20, 21, 22], [5, 6, 7], [30] * 9, [40, 41], [50, 51, 52, 53]]


@pytest.fixture(scope="module")
def model(checkpoints, device) -> GPT:
    return Checkpoint.open(checkpoints("llama-gqa")).load(torch.float32, device)


def together(model: GPT, requests: list[Request], sampler: Sampler = Sampler(), **options: object) -> list[list[int]]:  # noqa: B008
    settings = {"stop_ids": (), "batch_size": 3} | options
    return [tokens for _, tokens in sorted(complete_all(model, requests, sampler, **settings))]


def alone(model: GPT, prompt: list[int], count: int, stop_ids: tuple[int, ...] = ()) -> list[int]:
    return list(generate(model, prompt, Sampler(), max_new_tokens=count, stop_ids=stop_ids))


@pytest.mark.parametrize("batch_size", [1, 3, 7, 100])
def test_limits_differ_and_prompts_wait_for_a_slot(model, batch_size):
    requests = [Request(prompt, 2 + 3 * n) for n, prompt in enumerate(PROMPTS)]
    expected = [alone(model, request.prompt, request.max_new_tokens) for request in requests]
    assert together(model, requests, batch_size=batch_size) == expected


def test_stop_ids_end_a_completion(model):
    complete = [alone(model, prompt, 12) for prompt in PROMPTS]
    stops = (complete[0][3], complete[4][0])
    expected = [alone(model, prompt, 12, stops) for prompt in PROMPTS]
    assert expected != complete
    assert together(model, [Request(prompt, 12) for prompt in PROMPTS], stop_ids=stops) == expected


@dataclass
class Third:
    """Ends a completion with its third token."""

    seen: list[int] = field(default_factory=list)

    def __call__(self, token: int) -> bool:
        self.seen.append(token)
        return len(self.seen) == 3


def test_a_request_says_where_it_ends(model):
    requests = [Request(prompt, 12, Third()) for prompt in PROMPTS]
    assert together(model, requests) == [alone(model, prompt, 3) for prompt in PROMPTS]


def test_last_position_ends_a_completion(model):
    positions = model.config.positions
    prompts = [[5] * positions, [5] * (positions - 2), [5, 6]]
    expected = [alone(model, prompt, 5) for prompt in prompts]
    assert [len(tokens) for tokens in expected] == [0, 2, 5]
    assert together(model, [Request(prompt, 5) for prompt in prompts]) == expected


def test_samples_do_not_depend_on_the_batch(model):
    def requests() -> Iterator[Request]:
        for n, prompt in enumerate(PROMPTS):
            yield Request(prompt, 8, generator=torch.Generator(model.lm_head.weight.device).manual_seed(n))

    sampler = Sampler(1.5, 40, 0.9)
    first, *others = (together(model, [*requests()], sampler, batch_size=size) for size in (1, 3, 7))
    assert others == [first, first]
    assert first != together(model, [Request(prompt, 8) for prompt in PROMPTS])


def test_prompts_are_packed_and_each_is_computed_once(model):
    computed = []
    handle = model.model.embed_tokens.register_forward_pre_hook(lambda _, inputs: computed.append(len(inputs[0])))
    together(model, [Request(prompt, 4) for prompt in PROMPTS[:3]])
    handle.remove()
    assert computed == [sum(map(len, PROMPTS[:3])), 3, 3, 3]
