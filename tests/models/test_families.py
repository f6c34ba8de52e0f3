"""Every family against transformers, PEFT and bitsandbytes, on small random checkpoints."""

import re
import shutil
from collections.abc import Iterator
from dataclasses import MISSING, dataclass, field, fields, replace
from functools import cache, cached_property
from pathlib import Path

import pytest
import torch
from helpers.copies import edit_json
from helpers.families import MATRIX, VISION, WHOLE, Case
from helpers.reference import hugging_face, in_4_bits, with_peft
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from torch import Tensor

from litlora.__main__ import main
from litlora.errors import LitLoraError
from litlora.generation.batch import Request, complete_all
from litlora.generation.compile import prepare_for_decoding
from litlora.generation.sampler import Sampler
from litlora.generation.session import Session, generate
from litlora.lora.checkpoint import load_matrices, read_adapter, read_lora_config, write_adapter
from litlora.lora.config import TARGET_MODULES, LoRAConfig
from litlora.lora.layer import add_lora, linear_layers, lora_parameters
from litlora.lora.merge import merge_adapters
from litlora.lora.selection import Weighted
from litlora.lora.targets import excluded_modules, switch_targets
from litlora.models.checkpoint import Checkpoint
from litlora.models.config import GPTConfig
from litlora.models.families import SUPPORTED
from litlora.models.layer_names import linear_layer_names
from litlora.models.rope_config import ORIGINAL, RopeConfig
from litlora.models.transformer import GPT, evaluating
from litlora.models.unsupported import KINDS
from litlora.nn.loss import supervised_loss
from litlora.nn.nf4 import Quantization

CPU = torch.device("cpu")
LENGTHS = [9, 1, 24]
NAMES = "module_names", "left_out", "unapplied_dropouts"
"""Fields of a config that are no flags of the transformer."""
PROMPT = 6
"""Tokens of the longest sequence that are not supervised."""
GENERATED = 20
NF4 = Quantization("bnb.nf4", torch.float32)
QUANTIZED = "use the checkpoint that it was made from, which --quantize can quantize"
BLOCK_SWITCHES = [switch for switch in TARGET_MODULES if switch != "head"]


FIRST = [case for case in MATRIX if case.name.endswith("-0") or case.model_type in VISION]

MIXED = [case for case in MATRIX if case in FIRST or "lengths" in case.name]


class Network:
    """A checkpoint of the matrix, with the models that litlora and transformers make of it."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.checkpoint = folder, Checkpoint.open(folder)
        self.config = self.checkpoint.config
        self.theirs, self.ours = hugging_face(folder), self.load()

    def load(self) -> GPT:
        return self.checkpoint.load(torch.float32, CPU)

    def with_adapter(self) -> GPT:
        model = self.load()
        add_lora(model, read_lora_config(self.adapter))
        load_matrices(model, self.adapter, self.checkpoint)
        return model

    @cached_property
    def with_peft(self) -> PeftModel:
        return with_peft(self.folder, self.adapter, trainable=True)

    @cached_property
    def adapter(self) -> Path:
        """An adapter of all linear layers of the blocks, with random matrices, which litlora writes."""
        model, folder = self.load(), self.folder / "adapter"
        targets, excluded = switch_targets(BLOCK_SWITCHES, self.config), excluded_modules(self.config)
        lora = LoRAConfig(4, 6, 0.0, targets, exclude_modules=excluded)
        add_lora(model, lora)
        for parameter in lora_parameters(model).values():
            torch.nn.init.normal_(parameter, std=0.05)
        folder.mkdir()
        write_adapter(folder, model, lora, self.folder, self.checkpoint.fingerprint(), "alpaca")
        return folder


@pytest.fixture(scope="module", params=MATRIX, ids=lambda case: case.name)
def network(request, tmp_path_factory, tokenizer_files) -> Network:
    case: Case = request.param
    folder = tmp_path_factory.mktemp(case.name)
    case.write(folder, tokenizer_files)
    return Network(folder)


def sequences() -> list[Tensor]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randint(2, 300, (length,), generator=generator) for length in LENGTHS]


@torch.no_grad()
def logits(model: GPT) -> Tensor:
    """Return the logits of all sequences, packed (T, vocab)."""
    return model.logits(model(torch.cat(sequences()), LENGTHS))


@torch.no_grad()
def expected_logits(model: torch.nn.Module) -> Tensor:
    return torch.cat([model(input_ids=tokens[None]).logits[0] for tokens in sequences()])


def labels() -> Tensor:
    """Return the labels of the longest sequence, whose prompt is not supervised."""
    tokens = sequences()[-1]
    return torch.cat((torch.full((PROMPT,), -100), tokens[PROMPT:]))


def close(actual: Tensor, expected: Tensor, atol: float = 1e-5) -> None:
    torch.testing.assert_close(actual, expected, atol=atol, rtol=2e-6)


def test_logits_equal_transformers(network):
    close(logits(network.ours), expected_logits(network.theirs))


def test_names_of_linear_layers_are_those_of_the_model(network):
    """So a flag that names no layer is refused before there is a model."""
    assert linear_layer_names(network.config) == list(linear_layers(network.ours))


@torch.no_grad()
def test_shared_prefixes_leave_logits_unchanged(network):
    """On a CPU, a prefix that a window may cut is computed once for several sequences of a micro-batch."""
    *_, tokens = sequences()
    other = torch.cat((tokens[:12], tokens[12:].flip(0)))
    shared = network.ours(torch.cat((tokens, other[12:])), [24, 12], shared=[0, 12])
    apart = network.ours(torch.cat((tokens, other)), [24, 24])
    close(shared, torch.cat((apart[:24], apart[36:])))


def test_each_flag_matters(network):
    """A flag whose value could be another one without a difference would be untested."""
    expected, weights = expected_logits(network.theirs), network.ours.state_dict()
    for name, mutated in mutations(network.config):
        model = GPT(mutated)
        try:
            model.load_state_dict(weights)
        except RuntimeError:
            continue  # the weights are those of other layers
        difference = (logits(model) - expected).abs().max() / expected.abs().max()
        assert difference > 1e-3, name


def mutations(config: GPTConfig) -> Iterator[tuple[str, GPTConfig]]:
    """Yield the config with each of its flags at the value of Llama's, and each part of its embeddings left out."""
    for flag in fields(config):
        is_flag = flag.default is not MISSING and flag.name not in NAMES
        if is_flag and getattr(config, flag.name) != flag.default:
            yield flag.name, replace(config, **{flag.name: flag.default})
    if config.sliding_window:
        yield "sliding_window", replace(config, sliding_window=None)
    for rope in config.distinct_ropes:
        for name, other in rope_mutations(rope, config.head_dim):
            yield name, replace(config, ropes=tuple(other if its == rope else its for its in config.ropes))
    if None in config.ropes:
        rope = next(rope for rope in (*config.ropes, RopeConfig(1e4, config.head_dim)) if rope)
        yield "layers without rope", replace(config, ropes=(rope,) * len(config.ropes))


def rope_mutations(rope: RopeConfig, head_dim: int) -> Iterator[tuple[str, RopeConfig]]:
    yield "theta", replace(rope, theta=2 * rope.theta)
    yield "interleaved", replace(rope, interleaved=not rope.interleaved)
    if rope.dim < head_dim:
        yield "dim", replace(rope, dim=head_dim, scaling=None)
    if getattr(rope.scaling, ORIGINAL, 0) < max(LENGTHS) and rope.scaling:
        yield "scaling", replace(rope, scaling=None)
    if rope.attention_factor != 1:
        yield "attention_factor", replace(rope, scaling=replace(rope.scaling, attention_factor=1.0))
    if rope.query_scaling and rope.query_scaling.original_max_position_embeddings < max(LENGTHS):
        yield "query_scaling", replace(rope, query_scaling=None)


def test_masked_loss_equals_transformers(network):
    tokens, targets = sequences()[-1], labels()
    following = torch.cat((targets[1:], targets.new_full((1,), -100)))
    hidden = network.ours(tokens, [len(tokens)])
    ours = supervised_loss(hidden, network.ours.lm_head, following, network.config.logit_softcap)
    theirs = network.theirs(input_ids=tokens[None], labels=targets[None]).loss
    close(ours / int((following >= 0).sum()), theirs)


def test_greedy_tokens_equal_transformers(network):
    prompt = sequences()[0]
    ours = list(generate(network.ours, prompt.tolist(), Sampler(), max_new_tokens=GENERATED, stop_ids=[]))
    settings = {"max_new_tokens": GENERATED, "do_sample": False, "eos_token_id": -1, "pad_token_id": 0}
    if network.config.rope_regimes(len(prompt)) != network.config.rope_regimes(len(prompt) + GENERATED):
        settings["use_cache"] = False  # transformers' cache would keep keys of other frequencies
    theirs = network.theirs.generate(prompt[None], attention_mask=torch.ones(1, len(prompt)), **settings)
    assert ours == theirs[0, len(prompt) :].tolist()


@pytest.mark.parametrize("network", MIXED, ids=lambda case: case.name, indirect=True)
def test_completions_together_equal_those_alone(network):
    """Up to where the two likeliest tokens are nearer than rounding: more rows in a product may round another way."""
    prompts = [tokens.tolist() for tokens in sequences()]
    sampler = Margins()
    expected = [list(generate(network.ours, ids, sampler, max_new_tokens=6, stop_ids=[])) for ids in prompts]
    certain = [
        next((n for n, margin in enumerate(margins) if margin < 1e-4), 6) for margins in batched(sampler.seen, 6)
    ]
    assert sum(certain) > 12
    found = complete_all(network.ours, [Request(ids, 6) for ids in prompts], Sampler(), stop_ids=[], batch_size=2)
    for (_, tokens), alone, count in zip(sorted(found), expected, certain, strict=True):
        assert tokens[:count] == alone[:count]


@dataclass(frozen=True)
class Margins(Sampler):
    """Records how far the likeliest token is above the next."""

    seen: list[float] = field(default_factory=list)

    def choose(self, logits: Tensor) -> Tensor:
        first, second = logits.topk(2).values.tolist()
        self.seen.append(first - second)
        return super().choose(logits)


def batched(values: list[float], size: int) -> list[list[float]]:
    return [values[start : start + size] for start in range(0, len(values), size)]


def test_joined_and_repacked_weights_give_the_same_logits(network):
    model = network.with_adapter()
    expected = step_logits(model)
    prepare_for_decoding(model)
    close(step_logits(model), expected)


@torch.inference_mode()
def step_logits(model: GPT) -> Tensor:
    """Return the logits after a prompt, and after one token more."""
    prompt, session = sequences()[0], Session(model, GENERATED)
    with evaluating(model):
        return torch.stack([session.next_logits(part) for part in (prompt[:-1], prompt[-1:])])


@pytest.mark.parametrize("network", FIRST, ids=lambda case: case.name, indirect=True)
def test_bfloat16_error_is_that_of_transformers(network):
    exact = logits(network.ours)
    ours = logits(network.checkpoint.load(torch.bfloat16, CPU))
    theirs = expected_logits(hugging_face(network.folder, torch.bfloat16))
    assert (ours - exact).abs().mean() < 1.5 * (theirs - exact).abs().mean()


def test_adapter_gradients_equal_peft(network):
    model, peft = network.with_adapter(), network.with_peft
    tokens, targets = sequences()[-1], labels()
    following = torch.cat((targets[1:], targets.new_full((1,), -100)))
    hidden = model(tokens, [len(tokens)])
    loss = supervised_loss(hidden, model.lm_head, following, network.config.logit_softcap)
    (loss / int((following >= 0).sum())).backward()
    peft(input_ids=tokens[None], labels=targets[None]).loss.backward()
    theirs = {name.replace(".default.", "."): p.grad for name, p in peft.named_parameters() if p.grad is not None}
    ours = {f"base_model.model.{name}": p.grad for name, p in lora_parameters(model).items()}
    assert ours.keys() == theirs.keys()
    for name, gradient in ours.items():
        close(gradient, theirs[name])


def test_merged_checkpoint_equals_peft_in_transformers(network, tmp_path):
    merge_adapters([Weighted(network.adapter)], network.checkpoint, tmp_path / "merged", dequantized=False)
    merged = hugging_face(tmp_path / "merged")
    close(expected_logits(merged), expected_logits(network.with_peft))
    assert Checkpoint.open(tmp_path / "merged").weights.keys() == network.checkpoint.weights.keys()


def test_nf4_logits_equal_bitsandbytes(network):
    ours = network.checkpoint.load(torch.float32, CPU, NF4)
    close(logits(ours), expected_logits(in_4_bits(network.folder, NF4, CPU)), atol=1e-4)


@pytest.fixture(scope="module")
def written(tmp_path_factory, tokenizer_files):
    """Return a function that writes the checkpoint of a case of the matrix, once."""

    @cache
    def write(name: str) -> Path:
        folder = tmp_path_factory.mktemp(name)
        next(case for case in MATRIX if case.name == name).write(folder, tokenizer_files)
        return folder

    return write


def test_masks_that_old_checkpoints_store_are_left_as_they_are(written, tmp_path):
    """Pythia's files have the causal masks, and the rotary frequencies, of each block."""
    folder = Path(shutil.copytree(written("gpt_neox-0"), tmp_path / "base"))
    block, tensors = "gpt_neox.layers.1.attention", load_file(folder / "model.safetensors")
    stored = {
        f"{block}.bias": torch.ones(1, 1, 8, 8, dtype=torch.bool).tril(),
        f"{block}.masked_bias": torch.tensor(-1e9),
        f"{block}.rotary_emb.inv_freq": torch.ones(2),
    }
    save_file(tensors | stored, folder / "model.safetensors")
    old, new = Network(folder), Network(written("gpt_neox-0"))
    assert torch.equal(logits(old.ours), logits(new.ours))
    merge_adapters([Weighted(old.adapter)], old.checkpoint, tmp_path / "merged", dequantized=False)
    merged = load_file(tmp_path / "merged/model.safetensors")
    assert all(torch.equal(merged[name], tensor) for name, tensor in stored.items())
    name = f"{block}.query_key_value.bias"
    save_file(tensors | {name: tensors[name].to(torch.uint8)}, folder / "model.safetensors")
    with pytest.raises(LitLoraError, match=rf"{name} is stored as torch.uint8, but only F64, F32, F16, BF16 are supp"):
        Checkpoint.open(folder)


def test_vision_is_left_out_in_one_line_and_kept_in_a_merge(written, tmp_path, capsys):
    network = Network(written("gemma3"))
    lines = capsys.readouterr().err.splitlines()
    left_out = "vision_tower and multi_modal_projector are left out"
    assert f"{network.folder} is multi-modal: its text model is loaded, {left_out}" in lines
    merge_adapters([Weighted(network.adapter)], network.checkpoint, tmp_path / "merged", dequantized=False)
    before, after = (load_file(folder / "model.safetensors") for folder in (network.folder, tmp_path / "merged"))
    changed = {name for name, tensor in before.items() if not torch.equal(tensor, after[name])}
    assert changed
    assert all(name.startswith("language_model.model.layers.") for name in changed)


@pytest.mark.parametrize("name", ["gemma3", "mistral3"])
def test_adapter_of_the_vision_tower_is_refused_with_what_excludes_it(name, written, tmp_path):
    checkpoint = Checkpoint.open(written(name))
    excluded = excluded_modules(checkpoint.config)
    for options in ({}, {"exclude_modules": excluded}):
        config = LoraConfig(r=2, target_modules="all-linear", task_type="CAUSAL_LM", **options)
        get_peft_model(hugging_face(checkpoint.dir), config).save_pretrained(tmp_path / str(len(options)))
    fault = r"it adapts model\.(vision_tower|multi_modal_projector)\..* more, which litlora leaves out"
    hint = re.escape(f"with the rest of vision: train it with exclude_modules={excluded!r}")
    with pytest.raises(LitLoraError, match=f"{fault} {hint}$"):
        read_adapter(tmp_path / "0", checkpoint)
    assert read_adapter(tmp_path / "1", checkpoint).layers


def test_adapted_head_of_a_multi_modal_model_is_untied(written, tmp_path):
    network, folder = Network(written("gemma3")), tmp_path / "adapter"
    model, lora = network.load(), LoRAConfig(4, 6, 0.0, ("lm_head",), exclude_modules=excluded_modules(network.config))
    add_lora(model, lora)
    for parameter in lora_parameters(model).values():
        torch.nn.init.normal_(parameter, std=0.05)
    folder.mkdir()
    write_adapter(folder, model, lora, network.folder, network.checkpoint.fingerprint(), "alpaca")
    merge_adapters([Weighted(folder)], network.checkpoint, tmp_path / "merged", dequantized=False)
    close(expected_logits(hugging_face(tmp_path / "merged")), logits(model))


def test_dropout_of_the_base_is_reported(written, data_dir, tmp_path, capsys):
    folder = Path(shutil.copytree(written("starcoder2-0"), tmp_path / "base"))
    edit_json(folder / "config.json", attention_dropout=0.1, residual_dropout=0.2)
    flags = ["--data_dir", data_dir, "--out_dir", tmp_path / "out", "--train.max_steps", 1, "--precision", "bf16-mixed"]
    assert main(["finetune_lora", str(folder), *map(str, flags)]) == 0
    dropouts = '"attention_dropout": 0.1, "residual_dropout": 0.2'
    sentence = f"config.json has {dropouts}, which is not applied: the dropout of fine-tuning is --lora_dropout"
    assert sentence in capsys.readouterr().err.splitlines()


def test_switch_adapts_a_fused_layer_as_a_whole(written):
    phi3, neox = (Network(written(name)).config for name in ("phi3-0", "gpt_neox-0"))
    assert switch_targets(["query", "value"], phi3) == ("qkv_proj",)
    assert switch_targets(TARGET_MODULES, phi3) == ("qkv_proj", "o_proj", "gate_up_proj", "down_proj", "lm_head")
    assert switch_targets(["key", "mlp"], neox) == ("query_key_value", "dense_h_to_4h", "dense_4h_to_h")


def refusal(hub: dict[str, object]) -> str:
    """Return the sentence with which a config.json is refused, without the key and its value."""
    with pytest.raises(LitLoraError) as refused:
        GPTConfig.from_hub(WHOLE | hub)
    return str(refused.value).partition("which litlora does not support: ")[2]


DENSE = "and only dense decoders are implemented: choose one, such as a Llama, Qwen or Gemma model"


def test_no_supported_type_is_listed_as_unsupported():
    assert not set(SUPPORTED) & {name for types in KINDS.values() for name in types}


@pytest.mark.parametrize(
    ("hub", "kind"),
    [
        ({"model_type": "mixtral"}, "a mixture of experts"),
        ({"model_type": "of_the_future", "num_local_experts": 8}, "a mixture of experts"),
        ({"model_type": "mamba2"}, "a model with state-space, recurrent or linear-attention layers"),
        ({"model_type": "bert"}, "an encoder, or an encoder with a decoder"),
        ({"model_type": "of_the_future", "is_encoder_decoder": True}, "an encoder, or an encoder with a decoder"),
        ({"model_type": "siglip"}, "a model of images, sound or video"),
        ({"model_type": "of_the_future", "vision_config": {}}, "a model of images, sound or video"),
    ],
)
def test_model_that_is_not_a_dense_decoder_is_refused_by_its_kind(hub, kind):
    assert refusal(hub) == f"it is {kind}, {DENSE}"


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        (None, "it must be an object"),
        ({"model_type": "mixtral"}, f"it is a mixture of experts, {DENSE}"),
        ({"quantization_config": {"quant_method": "fp8"}}, QUANTIZED),
    ],
)
def test_text_model_of_a_multi_modal_config_is_checked(text, reason):
    assert refusal({"model_type": "mistral3", "text_config": text if text is None else {**WHOLE, **text}}) == reason


def test_quantized_multi_modal_checkpoint_is_refused():
    hub = {"model_type": "mistral3", "text_config": WHOLE, "quantization_config": {"quant_method": "fp8"}}
    assert refusal(hub) == QUANTIZED
