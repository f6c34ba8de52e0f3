import json
import re
import shutil
from pathlib import Path

import pytest
import torch
from helpers.reference import hugging_face, with_peft
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file

from litlora.data.prompts.styles import StyleSettings
from litlora.errors import LitLoraError
from litlora.lora.adapter_folder import read_prompt_style
from litlora.lora.checkpoint import load_with_adapters, read_adapter, read_lora_config, write_adapter
from litlora.lora.config import LoRAConfig
from litlora.lora.layer import add_lora, lora_parameters
from litlora.lora.selection import Weighted
from litlora.models.checkpoint import Checkpoint

TOKENS = torch.arange(7, 30)


@pytest.fixture(scope="module")
def adapter(tiny, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("adapter")
    model = Checkpoint.open(tiny).load(torch.float32, torch.device("cpu"))
    config = LoRAConfig(4, 8, 0.1, ("q_proj", "v_proj"))
    add_lora(model, config)
    write_adapter(folder, model, config, tiny, Checkpoint.open(tiny).fingerprint(), "Q: {instruction}\nA:")
    return folder


@pytest.fixture
def copy(adapter, tmp_path) -> Path:
    return Path(shutil.copytree(adapter, tmp_path / "copy"))


def change_config(folder: Path, **keys: object) -> None:
    path = folder / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | keys))


def open_on(base: Path, adapter: Path) -> torch.nn.Module:
    model = Checkpoint.open(base).load(torch.float32, torch.device("cpu"))
    read_adapter(adapter, Checkpoint.open(base)).add_to(model)
    return model


TWO = ["q_proj", "v_proj"]
PATTERNS = {"rank_pattern": {"v_proj": 2, r"layers\.1\.mlp\..*": 3}, "alpha_pattern": {r"1\.self_attn\.q_proj": 5}}


@pytest.mark.parametrize(
    "options",
    [
        {"target_modules": TWO},
        {"target_modules": ["q_proj", "o_proj", "down_proj"], "use_rslora": True},
        {"target_modules": "all-linear"},
        {"target_modules": r".*\.1\.(self_attn\.k_proj|mlp\.up_proj)"},
        {"target_modules": ["v_proj", "lm_head"]},
        {"target_modules": ["q_proj", "down_proj", "lm_head"], "use_dora": True, "use_rslora": True},
        {"target_modules": [*TWO, "up_proj"], **PATTERNS},
        {"target_modules": [*TWO, "up_proj"], **PATTERNS, "use_rslora": True, "use_dora": True},
        {"target_modules": [*TWO, "lm_head"], "layers_to_transform": [1]},
        {"target_modules": TWO, "layers_to_transform": 0, "layers_pattern": "layers"},
        {"target_modules": "all-linear", "exclude_modules": ["model.layers.0.mlp.up_proj", "k_proj"]},
        {"target_modules": TWO, "exclude_modules": r".*\.0\.self_attn\.v_proj"},
        {"target_modules": TWO, "init_lora_weights": "mica"},
    ],
    ids=lambda options: "-".join(f"{key}={value}" for key, value in options.items()),
)
@pytest.mark.filterwarnings("ignore:Setting `save_embedding_layers`")
def test_adapters_go_from_peft_to_litlora_and_back(tiny, options, tmp_path):
    theirs = made_by_peft(tiny, tmp_path / "theirs", **options)
    expected = logits_of(theirs)
    model = open_on(tiny, tmp_path / "theirs")
    torch.testing.assert_close(our_logits(model), expected, atol=1e-5, rtol=2e-6)
    (tmp_path / "ours").mkdir()
    write_adapter(tmp_path / "ours", model, read_lora_config(tmp_path / "theirs"), tiny, "", "none")
    torch.testing.assert_close(logits_of(with_peft(tiny, tmp_path / "ours")), expected, atol=1e-5, rtol=2e-6)


@pytest.mark.filterwarnings("ignore:Setting `save_embedding_layers`")
def test_adapter_made_by_peft_loads_on_each_family(checkpoint, tmp_path):
    expected = logits_of(made_by_peft(checkpoint, tmp_path, target_modules="all-linear"))
    torch.testing.assert_close(our_logits(open_on(checkpoint, tmp_path)), expected, atol=1e-5, rtol=2e-6)


@pytest.mark.parametrize(
    ("start", "options"), [("pissa", {"rank_pattern": {"v_proj": 2}}), ("pissa", {"use_rslora": True}), ("olora", {})]
)
def test_adapter_that_peft_converted_to_lora_loads(tiny, start, options, tmp_path):
    config = LoraConfig(r=3, lora_alpha=6, init_lora_weights=start, target_modules=TWO, **options)
    theirs = get_peft_model(hugging_face(tiny), config).eval()
    theirs.peft_config["default"].init_lora_weights = True
    theirs.save_pretrained(tmp_path / "initial")
    spread_parameters(theirs)
    theirs.save_pretrained(tmp_path / "converted", path_initial_model_for_weight_conversion=tmp_path / "initial")
    torch.testing.assert_close(
        our_logits(open_on(tiny, tmp_path / "converted")), logits_of(theirs), atol=1e-5, rtol=2e-6
    )


# The files of other trainers, as they write them: what differs from PEFT's own are these keys.
OTHERS = {
    "unsloth": {
        "auto_mapping": {
            "base_model_class": "LlamaForCausalLM",
            "parent_library": "transformers.models.llama.modeling_llama",
            "unsloth_fixed": True,
        },
        "base_model_name_or_path": "unsloth/llama-3.2-1b-instruct-unsloth-bnb-4bit",
        "task_type": None,
        "target_modules": r"(?:.*?(?:language|text).*?(?:self_attn|attention|attn|mlp|feed_forward|ffn|dense).*?"
        r"(?:q_proj|v_proj).*?)|(?:\bmodel\.layers\.[\d]{1,}\.(?:self_attn|attention|attn|mlp|feed_forward|ffn|dense)"
        r"\.(?:(?:q_proj|v_proj)))",
    },
    "axolotl": {"base_model_name_or_path": "./base", "lora_bias": False, "fan_in_fan_out": None, "loftq_config": {}},
    "llama-factory": {"base_model_name_or_path": "/models/llama", "peft_version": "0.15.2", "eva_config": None},
    "old peft": {"enable_lora": None, "merge_weights": False, "fan_in_fan_out": True, "peft_version": None},
    "neutral keys of the future": {"use_later": False, "later_config": None, "later_list": [], "later_mode": "none"},
}


@pytest.mark.parametrize("name", OTHERS)
def test_adapters_of_other_trainers_load(tiny, name, tmp_path):
    expected = logits_of(made_by_peft(tiny, tmp_path, target_modules=TWO))
    change_config(tmp_path, **OTHERS[name])
    torch.testing.assert_close(our_logits(open_on(tiny, tmp_path)), expected, atol=1e-5, rtol=2e-6)


def made_by_peft(base: Path, folder: Path, **options: object) -> PeftModel:
    """Have PEFT make an adapter whose B is not zero, and save it."""
    torch.manual_seed(0)
    config = LoraConfig(**{"r": 4, "lora_alpha": 6, "task_type": "CAUSAL_LM"} | options)
    model = get_peft_model(hugging_face(base), config).eval()
    spread_parameters(model)
    model.save_pretrained(folder)
    return model


def spread_parameters(model: torch.nn.Module) -> None:
    """Set what an adapter trains to random values, near those that it has."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter += 0.05 * torch.randn_like(parameter)


def logits_of(model: torch.nn.Module) -> torch.Tensor:
    with torch.no_grad():
        return model(TOKENS[None]).logits[0]


def our_logits(model: torch.nn.Module) -> torch.Tensor:
    with torch.no_grad():
        return model.lm_head(model(TOKENS, [23]))


def test_the_prompt_style_comes_back(adapter):
    assert read_prompt_style(adapter) == StyleSettings("Q: {instruction}\nA:")


def test_an_adapter_remembers_its_shape(adapter):
    assert read_lora_config(adapter) == LoRAConfig(4, 8, 0.0, ("q_proj", "v_proj"))


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("peft_type", "IA3"),
        ("peft_type", None),
        ("bias", "all"),
        ("bias", "lora_only"),
        ("lora_bias", True),
        ("modules_to_save", ["lm_head"]),
        ("trainable_token_indices", [1, 2]),
        ("layer_replication", [[0, 2]]),
        ("target_parameters", ["q_proj.weight"]),
        ("alora_invocation_tokens", [5]),
        ("kasa_config", {"beta": 1}),
        ("use_qalora", True),
        ("init_lora_weights", "pissa"),
        ("init_lora_weights", "pissa_niter_16"),
        ("init_lora_weights", "olora"),
        ("init_lora_weights", "corda"),
        ("init_lora_weights", "loftq"),
        ("init_lora_weights", "lora_ga"),
        ("init_lora_weights", ["eva"]),
        ("a_key_of_the_future", 1),
        ("rank_pattern", {"q_proj": 0}),
        ("rank_pattern", {"q_proj": 2.5}),
        ("rank_pattern", {"(?i)q_proj": 2}),
        ("rank_pattern", ["q_proj"]),
        ("alpha_pattern", {"q_proj": "16"}),
        ("alpha_pattern", {"(": 16}),
        ("layers_to_transform", ["0"]),
        ("layers_to_transform", 1.5),
        ("layers_pattern", 5),
        ("layers_pattern", ["("]),
        ("exclude_modules", [1]),
        ("exclude_modules", "("),
        ("r", 0),
        ("r", True),
        ("lora_alpha", "16"),
        ("target_modules", []),
        ("target_modules", None),
    ],
)
def test_a_config_that_is_not_implemented_is_refused_by_name_and_value(copy, key, value):
    change_config(copy, **{key: value})
    with pytest.raises(LitLoraError, match=re.escape(f'"{key}": {value!r}')):
        read_lora_config(copy)


def test_a_matrix_too_many_or_too_few_is_refused(copy, tiny):
    tensors = load_file(copy / "adapter_model.safetensors")
    name = sorted(tensors)[0]
    surplus = {"base_model.model.nothing.lora_A.weight": tensors[name].clone()}
    save_file(tensors | surplus, copy / "adapter_model.safetensors")
    with pytest.raises(LitLoraError, match=r"the adapter has nothing\.lora_A\.weight, which its settings do not"):
        open_on(tiny, copy)
    save_file({key: t for key, t in tensors.items() if key != name}, copy / "adapter_model.safetensors")
    with pytest.raises(LitLoraError, match=f"the adapter lacks {name.removeprefix('base_model.model.')}$"):
        open_on(tiny, copy)


def test_matrices_as_a_pickle_are_refused(copy):
    (copy / "adapter_model.safetensors").rename(copy / "adapter_model.bin")
    with pytest.raises(LitLoraError, match=r"has its weights in adapter_model\.bin, a pickle"):
        read_lora_config(copy)


def test_rank_of_a_pattern_beyond_any_matrix_is_refused(copy):
    change_config(copy, rank_pattern={"v_proj": 10**12})
    with pytest.raises(LitLoraError, match=r'"v_proj": 1000000000000, but no matrix in adapter_model\.safetensors'):
        read_lora_config(copy)


@pytest.mark.filterwarnings("ignore:Setting `save_embedding_layers`")
def test_copy_of_the_head_must_be_that_of_the_base(tiny, tmp_path):
    """PEFT stores the frozen head beside its adapter, and puts it into the model when it loads the adapter."""
    made_by_peft(tiny, tmp_path, target_modules=["q_proj", "lm_head"])
    path, name = tmp_path / "adapter_model.safetensors", "base_model.model.lm_head.base_layer.weight"
    tensors = load_file(path)
    save_file(tensors | {name: tensors[name].half()}, path)
    open_on(tiny, tmp_path)
    for other in (tensors[name] + 0.01, tensors[name][:-1].clone()):
        save_file(tensors | {name: other}, path)
        with pytest.raises(LitLoraError, match=r"its lm_head\.base_layer\.weight differs from the base's"):
            open_on(tiny, tmp_path)


def test_rank_of_a_lie_allocates_nothing(copy, tiny):
    """The longest dimension of any matrix is the least absurd rank that a config can have."""
    change_config(copy, r=32, target_modules="all-linear")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Checkpoint, "load", None)
        with pytest.raises(LitLoraError, match="does not fit the base"):
            load_with_adapters(Checkpoint.open(tiny), [Weighted(copy)], torch.float32, torch.device("cpu"))


def test_a_matrix_of_another_shape_is_refused(copy, tiny):
    change_config(copy, r=5)
    with pytest.raises(LitLoraError, match=r"lora_A\.weight is \(4, 32\), not \(5, 32\)"):
        open_on(tiny, copy)


def test_an_adapter_for_another_base_of_the_same_shape_is_refused(adapter, tiny, tmp_path):
    other = Path(shutil.copytree(tiny, tmp_path / "other"))
    weights = load_file(other / "model.safetensors")
    weights["model.norm.weight"][3] += 1
    save_file(weights, other / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(LitLoraError, match="was trained on a base other than"):
        open_on(other, adapter)


def test_the_matrices_come_back_to_the_bit(adapter, tiny):
    stored = load_file(adapter / "adapter_model.safetensors")
    for name, parameter in lora_parameters(open_on(tiny, adapter)).items():
        assert torch.equal(parameter, stored[f"base_model.model.{name}"])


def test_the_same_adapter_is_the_same_file_byte_for_byte(adapter, tiny, tmp_path):
    model = open_on(tiny, adapter)
    for number in range(8):
        (tmp_path / str(number)).mkdir()
        write_adapter(tmp_path / str(number), model, LoRAConfig(4, 8, 0.1, ("q_proj", "v_proj")), tiny, "", "none")
    assert len({(tmp_path / str(number) / "adapter_model.safetensors").read_bytes() for number in range(8)}) == 1
