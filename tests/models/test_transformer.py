import pytest
import torch
from helpers.families import BIASED_BLOCKS
from helpers.reference import hugging_face, in_4_bits
from torch import nn

from litlora.generation.sampler import Sampler
from litlora.generation.session import generate
from litlora.lora.config import LoRAConfig
from litlora.lora.layer import add_lora
from litlora.models.checkpoint import Checkpoint
from litlora.models.kv_cache import KVCache
from litlora.models.transformer import GPT
from litlora.nn.activation import ACTIVATIONS, _Gated
from litlora.nn.nf4 import Quantization
from litlora.nn.norm import RMSNorm

LENGTHS = [11, 1, 40, 6]


@pytest.fixture
def model(checkpoint, device):
    return Checkpoint.open(checkpoint).load(torch.float32, device)


def random_tokens(*lengths: int) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randint(300, (length,), generator=generator) for length in lengths]


def logits(model: GPT, tokens: torch.Tensor, lengths: list[int], cache: KVCache | None = None) -> torch.Tensor:
    with torch.no_grad():
        return model.lm_head(model(tokens.to(model.lm_head.weight.device), lengths, cache)).cpu()


def test_logits_of_packed_sequences_equal_transformers(checkpoint, model):
    sequences = random_tokens(*LENGTHS)
    actual = logits(model, torch.cat(sequences), LENGTHS).split(LENGTHS)
    reference = hugging_face(checkpoint)
    for tokens, ours in zip(sequences, actual, strict=True):
        with torch.no_grad():
            torch.testing.assert_close(ours, reference(tokens[None]).logits[0], atol=1e-5, rtol=2e-6)


def test_logits_with_cache_equal_one_forward_pass(model, device):
    tokens = random_tokens(40)[0]
    cache = KVCache(model.config, 40, torch.float32, device)
    parts = [logits(model, part, [len(part)], cache) for part in tokens.split([9, 1, 1, 13, 1, 15])]
    torch.testing.assert_close(torch.cat(parts), logits(model, tokens, [40]), atol=1e-5, rtol=2e-6)


def test_greedy_tokens_equal_transformers(checkpoint, model):
    prompt = random_tokens(9)[0]
    ours = list(generate(model, prompt.tolist(), Sampler(), max_new_tokens=40, stop_ids=[]))
    settings = {"max_new_tokens": 40, "do_sample": False, "eos_token_id": -1, "pad_token_id": 0}
    theirs = hugging_face(checkpoint).generate(prompt[None], attention_mask=torch.ones(1, 9), **settings)
    assert ours == theirs[0, 9:].tolist()


def test_greedy_tokens_without_cache(model):
    tokens = random_tokens(9)[0].tolist()
    ours = list(generate(model, tokens, Sampler(), max_new_tokens=20, stop_ids=[]))
    for _ in range(20):
        tokens.append(int(logits(model, torch.tensor(tokens), [len(tokens)])[-1].argmax()))
    assert ours == tokens[9:]


def test_bfloat16_error_is_that_of_transformers(checkpoint, device):
    tokens = random_tokens(40)[0]
    exact = logits(Checkpoint.open(checkpoint).load(torch.float32, device), tokens, [40])
    ours = logits(Checkpoint.open(checkpoint).load(torch.bfloat16, device), tokens, [40])
    with torch.no_grad():
        theirs = hugging_face(checkpoint, torch.bfloat16)(tokens[None]).logits[0]
    assert (ours - exact).abs().mean() < 1.5 * (theirs - exact).abs().mean()


@pytest.mark.parametrize("family", BIASED_BLOCKS, ids=lambda family: family.name)
def test_nf4_logits_with_biases_equal_transformers(family, make_checkpoint):
    folder, tokens = make_checkpoint(family, dtype=torch.bfloat16), random_tokens(40)[0]
    quantization = Quantization("bnb.nf4", torch.float32)
    ours = logits(Checkpoint.open(folder).load(torch.float32, torch.device("cpu"), quantization), tokens, [40])
    with torch.no_grad():
        theirs = in_4_bits(folder, quantization, torch.device("cpu"))(tokens[None]).logits[0]
    torch.testing.assert_close(ours, theirs, atol=1e-4, rtol=0)


@pytest.mark.parametrize("activation", ACTIVATIONS.values(), ids=ACTIVATIONS)
def test_gated_activation_gradient_is_exact(activation):
    gate, up = (torch.randn(5, 6, dtype=torch.float64, requires_grad=True) for _ in range(2))
    assert torch.autograd.gradcheck(_Gated.apply, (gate, up, activation))


def test_activation_checkpointing_saves_block_inputs(tiny):
    model = Checkpoint.open(tiny).load(torch.float32, torch.device("cpu"))
    add_lora(model, LoRAConfig(2, 2, 0.1, ("q_proj", "down_proj")))
    saved = {}
    for on in (False, True):
        model.model.activation_checkpointing = on
        stored: dict[int, torch.Tensor] = {}
        with torch.autograd.graph.saved_tensors_hooks(lambda t: stored.update({t.data_ptr(): t}) or t, lambda t: t):  # noqa: B023
            model(torch.arange(60), [50, 10])
        weights = {p.data_ptr() for p in model.parameters()}
        saved[on] = sum(t.numel() for where, t in stored.items() if where not in weights)
    assert saved[True] < saved[False] / 5


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_norm_equals_torch_and_gradient_equals_float64(dtype):
    torch.manual_seed(0)
    norm, x, gradient = RMSNorm(100, 1e-5), torch.randn(7, 100).to(dtype), torch.randn(7, 100).to(dtype)
    norm.to(dtype).requires_grad_(False).weight.copy_(torch.rand(100) + 0.5)
    assert torch.equal(norm(x), nn.RMSNorm.forward(norm, x))
    assert torch.equal(norm(x), torch.cat([norm(row) for row in x.split(1)]))
    ours, theirs = x.clone().requires_grad_(), x.double().requires_grad_()
    norm(ours).backward(gradient)
    nn.RMSNorm.forward(norm.double(), theirs).backward(gradient.double())
    torch.testing.assert_close(
        ours.grad.double(), theirs.grad, atol=1e-5, rtol=1e-5 if dtype is torch.float32 else 2**-7
    )
