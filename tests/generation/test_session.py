from pathlib import Path

import pytest
import torch
from torch._dynamo.utils import counters
from transformers import TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

from litlora.__main__ import main
from litlora.commands.generate import WORTH_LAYING_OUT
from litlora.generation.compile import compile_step, lay_out
from litlora.generation.sampler import Sampler
from litlora.generation.session import generate, next_logits
from litlora.lora.config import LoRAConfig
from litlora.lora.layer import add_lora, lora_parameters
from litlora.models.checkpoint import Checkpoint
from litlora.models.kv_cache import KVCache
from litlora.models.transformer import GPT, evaluating

DRAWS = 20_000


def frequencies(sampler: Sampler, logits: torch.Tensor) -> torch.Tensor:
    draws = torch.stack([sampler.choose(logits) for _ in range(DRAWS)])
    return draws.bincount(minlength=len(logits)) / DRAWS


@pytest.mark.parametrize(
    ("temperature", "top_k", "top_p"), [(1.0, None, 1.0), (0.6, 5, 1.0), (1.7, None, 0.7), (0.9, 6, 0.8)]
)
def test_tokens_come_as_often_as_transformers_says(temperature, top_k, top_p):
    torch.manual_seed(0)
    logits = torch.randn(12)
    warped = TemperatureLogitsWarper(temperature)(None, logits[None])
    if top_k:
        warped = TopKLogitsWarper(top_k)(None, warped)
    expected = TopPLogitsWarper(top_p)(None, warped).softmax(dim=-1)[0]
    found = frequencies(Sampler(temperature, top_k, top_p, torch.Generator().manual_seed(1)), logits)
    torch.testing.assert_close(found, expected, atol=0.015, rtol=0)
    assert not found[expected == 0].any()


def test_temperature_0_takes_the_likeliest():
    assert Sampler(0.0, 50, 0.1).choose(torch.tensor([1.0, 3.0, 2.0])) == 1


@pytest.mark.parametrize("sampler", [Sampler(), Sampler(0.8, 50), Sampler(1.0, None, 0.9)], ids=["greedy", "k", "p"])
@pytest.mark.parametrize("wrong", [float("nan"), float("inf")])
def test_nothing_is_chosen_where_a_score_is_not_a_number(sampler, wrong):
    assert sampler.choose(torch.tensor([1.0, wrong, 2.0])) == -1
    assert sampler.choose(torch.tensor([1.0, -torch.inf, 2.0])) in (0, 2)


def test_compiled_all_blocks_and_lengths_are_one_compilation_with_the_same_tokens(checkpoints, device):
    torch._dynamo.reset()
    counters.clear()
    for compilations, family in enumerate(["llama-gqa", "mistral"], start=1):
        model = adapted(checkpoints(family), torch.float32, device)
        eager = tokens_of(model)
        compile_step(model)
        assert tokens_of(model) == eager
        assert counters["stats"]["unique_graphs"] == 2 * compilations  # a block, and the head


@pytest.mark.parametrize("stored", [torch.float32, torch.bfloat16])
def test_compiled_blocks_with_and_without_an_adapter_say_what_they_said(checkpoints, stored, device):
    torch._dynamo.reset()
    targets = r".*layers\.1\.(self_attn\.q|mlp\.up)_proj"
    model = adapted(checkpoints("llama-gqa", stored), torch.float32, device, targets)
    eager = tokens_of(model)
    compile_step(model)
    assert tokens_of(model) == eager
    assert model.lm_head.weight.dtype is (stored if device.type == "cpu" else torch.float32)


@pytest.mark.parametrize("family", ["llama", "llama-gqa", "mistral"])
@pytest.mark.parametrize(
    ("stored", "dtype"),
    [(torch.float32, torch.float32), (torch.bfloat16, torch.float32), (torch.float32, torch.bfloat16)],
)
def test_once_the_weights_are_laid_out_the_scores_are_the_same(checkpoints, family, stored, dtype, device):
    model, tokens = adapted(checkpoints(family, stored), dtype, device), torch.tensor([5, 6, 7, 8, 9], device=device)
    expected = scores(model, tokens)
    lay_out(model)
    tolerances = {torch.float32: {}, torch.bfloat16: {"atol": 0.02, "rtol": 0.02}}[dtype]
    torch.testing.assert_close(scores(model, tokens), expected, **tolerances)


def test_an_answer_is_the_same_among_so_many_that_the_weights_are_laid_out(pico, capsys):
    asked = ["--prompt", "bridge", "--temperature", "0", "--precision", "32-true"]
    times = WORTH_LAYING_OUT // 16
    printed = []
    for count in (1, times):
        answers = ["--max_new_tokens", "16", "--num_samples", str(count)]
        assert main(["generate", "--checkpoint_dir", str(pico), *asked, *answers]) == 0
        printed.append(capsys.readouterr().out)
    assert printed[0].strip()
    assert printed[1] == printed[0] * times


@torch.inference_mode()
def scores(model: GPT, tokens: torch.Tensor) -> torch.Tensor:
    """Return the scores after a prompt, and after one token more."""
    weight = model.model.embed_tokens.weight
    cache = KVCache(model.config, 8, weight.dtype, weight.device)
    with evaluating(model):
        return torch.stack([next_logits(model, part, cache) for part in (tokens[:-1], tokens[-1:])]).float()


def adapted(
    checkpoint: Path,
    dtype: torch.dtype,
    device: torch.device,
    targets: tuple[str, ...] | str = ("q_proj", "v_proj", "up_proj", "down_proj", "lm_head"),
) -> GPT:
    """Return a model with an adapter that changes what it says."""
    model = Checkpoint.open(checkpoint).load(dtype, device)
    add_lora(model, LoRAConfig(r=4, lora_alpha=8, lora_dropout=0.5, target_modules=targets))
    for name, matrix in lora_parameters(model).items():
        if ".lora_B." in name:
            torch.nn.init.normal_(matrix, std=0.02)
    return model


def tokens_of(model: GPT) -> list[int]:
    return list(generate(model, [5, 6, 7, 8, 9], Sampler(), max_new_tokens=20, stop_ids=[]))
