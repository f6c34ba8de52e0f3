from pathlib import Path

import pytest
import torch
from helpers.families import MATRIX
from torch._dynamo.utils import counters
from transformers import TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

from litlora.__main__ import main
from litlora.cpu.tuning import REPACK_TOKENS
from litlora.generation.compile import compile_decode_step, prepare_for_decoding
from litlora.generation.sampler import Sampler
from litlora.generation.session import Session, generate, generate_samples
from litlora.lora.config import LoRAConfig
from litlora.lora.layer import add_lora, lora_parameters
from litlora.models.checkpoint import Checkpoint
from litlora.models.transformer import GPT, evaluating

DRAWS = 20_000


def frequencies(sampler: Sampler, logits: torch.Tensor) -> torch.Tensor:
    draws = torch.stack([sampler.choose(logits) for _ in range(DRAWS)])
    return draws.bincount(minlength=len(logits)) / DRAWS


@pytest.mark.parametrize(
    ("temperature", "top_k", "top_p"), [(1.0, None, 1.0), (0.6, 5, 1.0), (1.7, None, 0.7), (0.9, 6, 0.8)]
)
def test_sampling_frequencies_equal_transformers(temperature, top_k, top_p):
    torch.manual_seed(0)
    logits = torch.randn(12)
    warped = TemperatureLogitsWarper(temperature)(None, logits[None])
    if top_k:
        warped = TopKLogitsWarper(top_k)(None, warped)
    expected = TopPLogitsWarper(top_p)(None, warped).softmax(dim=-1)[0]
    actual = frequencies(Sampler(temperature, top_k, top_p, torch.Generator().manual_seed(1)), logits)
    torch.testing.assert_close(actual, expected, atol=0.015, rtol=0)
    assert not actual[expected == 0].any()


def test_temperature_0_is_greedy():
    assert Sampler(0.0, 50, 0.1).choose(torch.tensor([1.0, 3.0, 2.0])) == 1


@pytest.mark.parametrize("sampler", [Sampler(), Sampler(0.8, 50), Sampler(1.0, None, 0.9)], ids=["greedy", "k", "p"])
@pytest.mark.parametrize("wrong", [float("nan"), float("inf")])
def test_no_token_for_logits_that_are_not_finite(sampler, wrong):
    assert sampler.choose(torch.tensor([1.0, wrong, 2.0])) == -1
    assert sampler.choose(torch.tensor([1.0, -torch.inf, 2.0])) in (0, 2)


@pytest.mark.parametrize(("name", "graphs"), [("mistral-0", 2), ("gemma2-0", 2), ("cohere2-0", 3)])
def test_one_compilation_for_all_blocks_and_lengths(name, graphs, tmp_path, tokenizer_files, device):
    """The head is one graph, and each kind of block; cohere2 has one without rotary embedding."""
    next(case for case in MATRIX if case.name == name).write(tmp_path, tokenizer_files)
    torch._dynamo.reset()
    counters.clear()
    model = adapted(tmp_path, torch.float32, device)
    assert model.config.sliding_window < 5 + 20  # of tokens_of
    eager = tokens_of(model)
    compile_decode_step(model)
    assert tokens_of(model) == eager
    assert counters["stats"]["unique_graphs"] == graphs


@pytest.mark.parametrize("stored", [torch.float32, torch.bfloat16])
def test_compiled_blocks_with_and_without_an_adapter(checkpoints, stored, device):
    torch._dynamo.reset()
    targets = r".*layers\.1\.(self_attn\.q|mlp\.up)_proj"
    model = adapted(checkpoints("llama-gqa", stored), torch.float32, device, targets)
    eager = tokens_of(model)
    compile_decode_step(model)
    assert tokens_of(model) == eager
    assert model.lm_head.weight.dtype is (stored if device.type == "cpu" else torch.float32)


@pytest.mark.parametrize("family", ["llama", "llama-gqa", "mistral"])
@pytest.mark.parametrize(
    ("stored", "dtype"),
    [(torch.float32, torch.float32), (torch.bfloat16, torch.float32), (torch.float32, torch.bfloat16)],
)
def test_repacked_weights_give_the_same_logits(checkpoints, family, stored, dtype, device):
    model, tokens = adapted(checkpoints(family, stored), dtype, device), torch.tensor([5, 6, 7, 8, 9], device=device)
    expected = logits_of(model, tokens)
    prepare_for_decoding(model)
    tolerances = {torch.float32: {}, torch.bfloat16: {"atol": 0.02, "rtol": 0.02}}[dtype]
    torch.testing.assert_close(logits_of(model, tokens), expected, **tolerances)


@pytest.mark.parametrize(("name", "frequencies"), [("gemma2-0", 1), ("qwen2-lengths-1", 2)])
def test_samples_compute_their_prompt_once(name, frequencies, tmp_path, tokenizer_files, device):
    """It is computed again only where a completion has grown into other rotary frequencies."""
    next(case for case in MATRIX if case.name == name).write(tmp_path, tokenizer_files)
    model = adapted(tmp_path, torch.float32, device)
    prompt, limits = [5, 6, 7, 8, 9], {"max_new_tokens": 20, "stop_ids": []}
    sampler, again = (Sampler(1.0, None, 1.0, torch.Generator(device).manual_seed(3)) for _ in range(2))
    assert (len({model.config.rope_regimes(length) for length in (5, 25)})) == frequencies
    expected = [list(generate(model, prompt, sampler, **limits)) for _ in range(3)]
    computed = []
    model.model.embed_tokens.register_forward_pre_hook(lambda _, inputs: computed.append(len(inputs[0])))
    assert [list(tokens) for tokens in generate_samples(model, prompt, again, 3, **limits)] == expected
    assert computed.count(len(prompt)) == (1 if frequencies == 1 else 3)


def test_repacking_leaves_completions_unchanged(pico, capsys):
    flags = ["--prompt", "bridge", "--temperature", "0", "--precision", "32-true"]
    times = REPACK_TOKENS // 16
    printed = []
    for count in (1, times):
        limits = ["--max_new_tokens", "16", "--num_samples", str(count)]
        assert main(["generate", "--checkpoint_dir", str(pico), *flags, *limits]) == 0
        printed.append(capsys.readouterr().out)
    assert printed[0].strip()
    assert printed[1] == printed[0] * times


@torch.inference_mode()
def logits_of(model: GPT, tokens: torch.Tensor) -> torch.Tensor:
    """Return the logits after a prompt, and after one token more."""
    session = Session(model, 8)
    with evaluating(model):
        return torch.stack([session.next_logits(part) for part in (tokens[:-1], tokens[-1:])]).float()


def adapted(
    checkpoint: Path,
    dtype: torch.dtype,
    device: torch.device,
    targets: tuple[str, ...] | str = ("q_proj", "v_proj", "up_proj", "down_proj", "lm_head"),
) -> GPT:
    """Return a model with an adapter that changes its logits."""
    model = Checkpoint.open(checkpoint).load(dtype, device)
    add_lora(model, LoRAConfig(r=4, lora_alpha=8, lora_dropout=0.5, target_modules=targets))
    for name, matrix in lora_parameters(model).items():
        if ".lora_B." in name:
            torch.nn.init.normal_(matrix, std=0.02)
    return model


def tokens_of(model: GPT) -> list[int]:
    return list(generate(model, [5, 6, 7, 8, 9], Sampler(), max_new_tokens=20, stop_ids=[]))
