import json
import shutil
from pathlib import Path

import pytest
import torch
from helpers.reference import hugging_face
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file

from litlora.errors import LitLoraError
from litlora.lora.adapter_folder import read_prompt_style
from litlora.lora.checkpoint import load_adapter, read_lora_config, write_adapter
from litlora.lora.config import LoRAConfig
from litlora.lora.layer import add_lora, lora_parameters
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
    load_adapter(model, adapter, Checkpoint.open(base))
    return model


@pytest.mark.parametrize(
    "options",
    [
        {"target_modules": ["q_proj", "v_proj"]},
        {"target_modules": ["q_proj", "o_proj", "down_proj"], "use_rslora": True},
        {"target_modules": "all-linear"},
        {"target_modules": r".*\.1\.(self_attn\.k_proj|mlp\.up_proj)"},
        {"target_modules": ["v_proj", "lm_head"]},
        {"target_modules": ["q_proj", "down_proj", "lm_head"], "use_dora": True, "use_rslora": True},
    ],
    ids=["list", "rslora", "all-linear", "regex", "head", "dora"],
)
@pytest.mark.filterwarnings("ignore:Setting `save_embedding_layers`")
def test_an_adapter_made_by_peft_loads_with_equal_logits(checkpoint, options, tmp_path):
    torch.manual_seed(0)
    config = LoraConfig(r=4, lora_alpha=6, init_lora_weights=False, task_type="CAUSAL_LM", **options)
    theirs = get_peft_model(hugging_face(checkpoint), config).eval()
    theirs.save_pretrained(tmp_path)
    model = open_on(checkpoint, tmp_path)
    with torch.no_grad():
        reference = theirs(TOKENS[None]).logits[0]
        torch.testing.assert_close(model.lm_head(model(TOKENS, [23])), reference, atol=1e-5, rtol=2e-6)


def test_the_prompt_style_comes_back(adapter):
    assert read_prompt_style(adapter) == "Q: {instruction}\nA:"


def test_an_adapter_remembers_its_shape(adapter):
    assert read_lora_config(adapter) == LoRAConfig(4, 8, 0.0, ("q_proj", "v_proj"))


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("peft_type", "IA3"),
        ("bias", "all"),
        ("rank_pattern", {"q_proj": 8}),
        ("modules_to_save", ["lm_head"]),
        ("layers_to_transform", [0]),
        ("init_lora_weights", "pissa"),
        ("a_key_of_the_future", 1),
        ("r", 0),
        ("r", True),
        ("lora_alpha", "16"),
        ("target_modules", []),
        ("target_modules", None),
    ],
)
def test_a_config_that_is_not_implemented_is_refused_by_name_and_value(copy, key, value):
    change_config(copy, **{key: value})
    with pytest.raises(LitLoraError, match=f'"{key}": .*{str(value).strip("{}[]")[:6]}'):
        read_lora_config(copy)


def test_a_matrix_too_many_or_too_few_is_refused(copy, tiny):
    tensors = load_file(copy / "adapter_model.safetensors")
    name = sorted(tensors)[0]
    surplus = {"base_model.model.nothing.lora_A.weight": tensors[name].clone()}
    save_file(tensors | surplus, copy / "adapter_model.safetensors")
    with pytest.raises(LitLoraError, match=r"differ in nothing\.lora_A\.weight"):
        open_on(tiny, copy)
    save_file({key: t for key, t in tensors.items() if key != name}, copy / "adapter_model.safetensors")
    with pytest.raises(LitLoraError, match=name.removeprefix("base_model.model.")):
        open_on(tiny, copy)


def test_a_matrix_of_another_shape_is_refused(copy, tiny):
    change_config(copy, r=5)
    with pytest.raises(LitLoraError, match=r"lora_A\.weight is \(4, 32\), not \(5, 32\)"):
        open_on(tiny, copy)


def test_an_adapter_for_another_base_of_the_same_shape_is_refused(adapter, tiny, tmp_path):
    other = Path(shutil.copytree(tiny, tmp_path / "other"))
    weights = load_file(other / "model.safetensors")
    weights["model.norm.weight"][3] += 1
    save_file(weights, other / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(LitLoraError, match="was trained on another base"):
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
