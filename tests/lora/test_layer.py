from itertools import combinations
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from helpers.reference import hugging_face, with_peft
from torch.nn.utils.rnn import pad_sequence

from litlora.data.batching import MicroBatch, Sample, pack, pad, share_prefixes
from litlora.lora.checkpoint import write_adapter
from litlora.lora.config import TARGET_MODULES, LoRAConfig
from litlora.lora.layer import LoRALinear, add_lora, count, lora_parameters
from litlora.models.checkpoint import Checkpoint
from litlora.models.config import GPTConfig
from litlora.models.transformer import GPT
from litlora.nn.dropout import Dropout
from litlora.nn.loss import IGNORE_INDEX, supervised_loss

LLAMA_2_7B = {
    "model_type": "llama",
    "vocab_size": 32000,
    "hidden_size": 4096,
    "intermediate_size": 11008,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
}
CPU = torch.device("cpu")
SWITCHES = tuple(TARGET_MODULES)
COMBINATIONS = [chosen for n in range(1, 7) for chosen in combinations(SWITCHES, n)]
LENGTHS = [9, 23, 4]


def lora_config(switches: tuple[str, ...], dropout: float = 0.0) -> LoRAConfig:
    return LoRAConfig(4, 6, dropout, tuple(module for switch in switches for module in TARGET_MODULES[switch]))


def adapted(
    checkpoint: Path, config: LoRAConfig, dtype: torch.dtype = torch.float32, device: torch.device = CPU
) -> GPT:
    """Return the checkpoint's model with an adapter whose B is not zero, as if trained."""
    torch.manual_seed(2)
    model = Checkpoint.open(checkpoint).load(dtype, torch.device("cpu"))
    add_lora(model, config)
    for name, parameter in lora_parameters(model).items():
        if ".lora_B." in name:
            torch.nn.init.normal_(parameter, std=0.1)
    return model.to(device)


def batch() -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    """Return sequences, and labels at about two thirds of their positions."""
    generator = torch.Generator().manual_seed(3)
    tokens = [torch.randint(300, (n,), generator=generator) for n in LENGTHS]
    labels = [F.pad(ids[1:], (0, 1), value=IGNORE_INDEX) for ids in tokens]
    for row in labels:
        row[: len(row) // 3] = IGNORE_INDEX
    return tokens, labels


@pytest.mark.parametrize(
    ("switches", "trainable"), [(("query", "value"), 4_194_304), (SWITCHES, 20_277_248)], ids=["two", "six"]
)
def test_parameter_counts_of_llama_2_7b_are_the_published_ones(switches, trainable):
    with torch.device("meta"):
        model = GPT(GPTConfig.from_hub(LLAMA_2_7B))
        targets = tuple(module for switch in switches for module in TARGET_MODULES[switch])
        add_lora(model, LoRAConfig(8, 16, 0.0, targets))
    assert count(model, trainable=True) == trainable
    assert count(model, trainable=False) == 6_738_415_616


def test_untrained_adapter_leaves_logits_unchanged_to_the_bit(checkpoint):
    tokens = torch.cat(batch()[0])
    model = Checkpoint.open(checkpoint).load(torch.float32, torch.device("cpu"))
    before = model.lm_head(model(tokens, LENGTHS))
    add_lora(model, lora_config(SWITCHES))
    assert torch.equal(model.lm_head(model(tokens, LENGTHS)), before)


def test_layers_keep_the_names_of_their_weights(tiny):
    model = Checkpoint.open(tiny).load(torch.float32, torch.device("cpu"))
    before = set(model.state_dict())
    add_lora(model, lora_config(SWITCHES))
    assert before == {name for name in model.state_dict() if ".lora_" not in name}


def test_only_the_adapter_trains_and_it_is_float32_over_a_bfloat16_base(tiny):
    model = adapted(tiny, lora_config(("query", "mlp")), torch.bfloat16)
    trainable = {name: p.dtype for name, p in model.named_parameters() if p.requires_grad}
    assert trainable == dict.fromkeys(lora_parameters(model), torch.float32)
    assert model(torch.arange(5), [5]).dtype is torch.bfloat16


def test_a_starts_uniform_and_b_at_zero():
    torch.manual_seed(0)
    layer = LoRALinear(torch.nn.Linear(64, 48, bias=False), rank=32, scaling=1.0, dropout=0.0)
    bound = 1 / 64**0.5  # kaiming_uniform_ with a = sqrt(5)
    assert 0.95 * bound < layer.lora_A.weight.abs().max() <= bound
    assert not layer.lora_B.weight.any()


def test_dropout_acts_in_training_only_and_keeps_the_mean():
    torch.manual_seed(0)
    layer = LoRALinear(torch.nn.Linear(50, 3, bias=False), rank=2, scaling=1.0, dropout=0.4)
    torch.nn.init.normal_(layer.lora_B.weight)
    x = torch.ones(20_000, 50)
    trained = layer(x)
    layer.eval()
    assert torch.equal(layer(x[:1]), layer(x[:1]))
    assert trained.std(dim=0).min() > 0
    torch.testing.assert_close(trained.mean(dim=0), layer(x)[0], atol=0.02, rtol=0.02)


@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_the_branch_and_its_gradients_are_those_of_the_formula(dropout):
    torch.manual_seed(0)
    layer = LoRALinear(torch.nn.Linear(10, 7, bias=False), rank=3, scaling=1.5, dropout=dropout).double()
    torch.nn.init.normal_(layer.lora_B.weight)
    layer.weight.requires_grad_(False)
    x, gradient = torch.randn(21, 10).double().requires_grad_(), torch.randn(21, 7).double()
    sources = [x, layer.lora_A.weight, layer.lora_B.weight]
    torch.manual_seed(4)
    y = layer(x)
    ours = torch.autograd.grad(y, sources, gradient)

    torch.manual_seed(4)
    kept = Dropout.draw(dropout).mask(x)
    dropped = x if kept is None else x * kept.ne(0) / (1 - round(dropout * 2**16) / 2**16)
    formula = x @ layer.weight.T + 1.5 * dropped @ layer.lora_A.weight.T @ layer.lora_B.weight.T
    torch.testing.assert_close(y, formula)
    for found, exact in zip(ours, torch.autograd.grad(formula, sources, gradient), strict=True):
        torch.testing.assert_close(found, exact)


@pytest.mark.parametrize("probability", [0.05, 0.5])
def test_dropout_drops_its_share_at_every_place_of_a_word_and_differently_each_time(probability):
    torch.manual_seed(0)
    x = torch.empty(50_000, 5)
    kept = torch.stack([Dropout.draw(probability).mask(x).ne(0) for _ in range(8)])
    by_place = kept.view(-1, 4).double().mean(dim=0)
    assert (by_place - (1 - probability)).abs().max() < 0.004
    assert not torch.equal(kept[0], kept[1])


def test_a_layer_keeps_its_input_once_for_all_of_its_branches():
    layers = [LoRALinear(torch.nn.Linear(32, 32, bias=False), rank=2, scaling=1.0, dropout=0.1) for _ in range(3)]
    x = torch.randn(100, 32, requires_grad=True)
    kept = {}
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.update({t.data_ptr(): t}) or t, lambda t: t):
        for layer in layers:
            layer.weight.requires_grad_(False)
            layer(x)
    assert [t.shape for t in kept.values() if t.numel() >= x.numel()] == [x.shape]


def check_equals_padded_peft(
    checkpoint: Path, switches: tuple[str, ...], samples: list[Sample], micro: MicroBatch, folder: Path
):
    """Compare what a micro-batch teaches with what its samples teach, one below the other, with padding."""
    config = lora_config(switches)
    device = micro.tokens.device
    model = adapted(checkpoint, config, device=device)
    write_adapter(folder, model, config, checkpoint, Checkpoint.open(checkpoint).fingerprint(), "alpaca")
    hidden = model(micro.tokens, micro.lengths, shared=micro.shared)
    loss = supervised_loss(hidden, model.lm_head, micro.labels) / micro.supervised
    loss.backward()

    tokens, labels = [sample.tokens for sample in samples], [sample.labels for sample in samples]
    theirs = with_peft(checkpoint, folder, trainable=True)
    mask = pad_sequence([torch.ones_like(ids) for ids in tokens], batch_first=True)
    logits = theirs(pad_sequence(tokens, batch_first=True), attention_mask=mask).logits
    padded = pad_sequence(labels, batch_first=True, padding_value=IGNORE_INDEX)
    reference = F.cross_entropy(logits.flatten(0, 1), padded.flatten(), ignore_index=IGNORE_INDEX)
    reference.backward()
    assert abs(loss.item() - reference.item()) < 1e-6 * reference.item()
    gradients = {n.replace(".default", ""): p.grad for n, p in theirs.named_parameters() if p.requires_grad}
    ours = {f"base_model.model.{name}": p.grad for name, p in lora_parameters(model).items()}
    assert gradients.keys() == ours.keys()
    for name, gradient in gradients.items():
        torch.testing.assert_close(ours[name].cpu(), gradient, atol=1e-5, rtol=0 if device == CPU else 1e-5)


@pytest.mark.parametrize("switches", [("query", "value"), SWITCHES], ids=["two", "six"])
def test_loss_and_gradients_of_a_batch_equal_those_of_peft(checkpoint, switches, tmp_path, device):
    samples = [Sample(*pair) for pair in zip(*batch(), strict=True)]
    micro = pack([Sample(sample.tokens.to(device), sample.labels.to(device)) for sample in samples])
    check_equals_padded_peft(checkpoint, switches, samples, micro, tmp_path)


@pytest.mark.parametrize("switches", [("query", "value"), SWITCHES], ids=["two", "six"])
def test_loss_and_gradients_of_samples_that_begin_alike_equal_those_of_peft(checkpoint, switches, tmp_path):
    generator = torch.Generator().manual_seed(5)
    start, ends = torch.randint(300, (15,), generator=generator), torch.randint(300, (4, 12), generator=generator)
    tokens = [torch.cat([start[:count], end]) for count, end in zip((15, 9, 15, 0), ends, strict=True)]
    labels = [F.pad(ids[1:], (0, 1), value=7) for ids in tokens]
    for row in labels:
        row[:-10] = IGNORE_INDEX
    samples = [Sample(*pair) for pair in zip(tokens, labels, strict=True)]
    micro = pad(share_prefixes(pack(samples), lambda length: ()), 16)
    assert len(micro.tokens) == 64 < sum(map(len, tokens))
    check_equals_padded_peft(checkpoint, switches, samples, micro, tmp_path)


@pytest.mark.parametrize("number", range(len(LENGTHS)))
def test_loss_and_gradients_of_each_example_among_others_equal_those_of_peft_with_padding(checkpoint, number, tmp_path):
    labels = [row if n == number else torch.full_like(row, IGNORE_INDEX) for n, row in enumerate(batch()[1])]
    samples = [Sample(*pair) for pair in zip(batch()[0], labels, strict=True)]
    check_equals_padded_peft(checkpoint, SWITCHES, samples, pack(samples), tmp_path)


@pytest.mark.parametrize("switches", COMBINATIONS, ids="+".join)
@pytest.mark.parametrize("name", ["llama-gqa", "llama-3.2"], ids=["untied", "tied"])
def test_adapter_loads_in_peft_with_equal_logits(name, switches, checkpoints, tmp_path):
    config = lora_config(switches)
    model = adapted(checkpoints(name), config)
    write_adapter(
        tmp_path, model, config, checkpoints(name), Checkpoint.open(checkpoints(name)).fingerprint(), "alpaca"
    )
    tokens = batch()[0][1]
    with torch.no_grad():
        theirs = with_peft(checkpoints(name), tmp_path)(tokens[None]).logits[0]
        torch.testing.assert_close(model.lm_head(model(tokens, [len(tokens)])), theirs, atol=1e-5, rtol=0)
        assert (theirs - hugging_face(checkpoints(name))(tokens[None]).logits[0]).abs().max() > 1e-2
