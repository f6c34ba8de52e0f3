"""Different ranks for different layers, chosen blocks and targets: equal to PEFT, from the flags to the merge."""

import json
from pathlib import Path

import pytest
import torch
import yaml
from helpers.families import FAMILIES, MATRIX, WHOLE_BLOCKS
from helpers.parity import CPU, adapted, check_equals_peft, check_is_near_peft
from helpers.reference import hugging_face, in_4_bits, with_peft
from helpers.runs import QUERY_VALUE
from peft import PeftModel
from safetensors.torch import load_file

from litlora.__main__ import main
from litlora.args.finetune import FinetuneLoraArgs
from litlora.lora.config import LoRAConfig
from litlora.models.config import GPTConfig
from litlora.nn.nf4 import Quantization
from litlora.train.lora_flags import new_adapter

NF4 = Quantization("bnb.nf4", torch.float32)
CONFIGS = {
    "patterns": LoRAConfig(
        4, 6, 0.0, ("q_proj", "v_proj", "down_proj"),
        rank_pattern={r"layers\.0\..*": 2, "v_proj": 8}, alpha_pattern={"down_proj": 3.5},
    ),
    "rslora": LoRAConfig(4, 6, 0.0, ("q_proj", "up_proj"), use_rslora=True, rank_pattern={"up_proj": 9}),
    "dora": LoRAConfig(4, 6, 0.0, ("q_proj", "up_proj"), use_dora=True, rank_pattern={"up_proj": 9}),
    "blocks": LoRAConfig(4, 6, 0.0, ("q_proj", "lm_head"), layers_to_transform=(1,)),
    "expression": LoRAConfig(4, 6, 0.0, r".*\.(0\.self_attn\.[qk]_proj|1\.mlp\.up_proj)"),
}  # fmt: skip
EACH = pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)


@EACH
def test_logits_and_gradients_equal_peft(config, checkpoints, tmp_path):
    base = checkpoints("llama-gqa")
    model = adapted(base, tmp_path, config)
    check_equals_peft(model, with_peft(base, tmp_path, trainable=True), 1e-5)


@EACH
def test_logits_and_gradients_over_bfloat16_are_near_those_of_peft(config, checkpoints, tmp_path):
    base = checkpoints("llama-gqa", torch.bfloat16)
    model = adapted(base, tmp_path, config, torch.bfloat16)
    theirs = PeftModel.from_pretrained(hugging_face(base, torch.bfloat16), tmp_path, is_trainable=True)
    check_is_near_peft(model, theirs, 0.03)


@EACH
@pytest.mark.filterwarnings("ignore:Setting `save_embedding_layers`")
def test_logits_and_gradients_over_nf4_equal_peft(config, make_checkpoint, tmp_path):
    base = make_checkpoint(WHOLE_BLOCKS)
    model = adapted(base, tmp_path, config, quantization=NF4)
    check_equals_peft(model, PeftModel.from_pretrained(in_4_bits(base, NF4, CPU), tmp_path, is_trainable=True), 2e-4)


@EACH
def test_merge_equals_peft(config, checkpoints, tmp_path):
    base, adapter = checkpoints("llama-gqa"), tmp_path / "adapter"
    adapter.mkdir()
    adapted(base, adapter, config)
    assert main(["merge_lora", "--checkpoint_dir", str(adapter), "--out_dir", str(tmp_path / "merged")]) == 0
    ours, theirs = load_file(tmp_path / "merged/model.safetensors"), with_peft(base, adapter).merge_and_unload()
    expected = theirs.state_dict()
    assert ours.keys() == expected.keys()
    for name, tensor in ours.items():
        torch.testing.assert_close(tensor, expected[name], atol=1e-6, rtol=1e-6)


def finetune(base: Path, data_dir: Path, out_dir: Path, *flags: str) -> int:
    folders = ["--checkpoint_dir", base, "--data_dir", data_dir, "--out_dir", out_dir, "--eval.max_new_tokens", 0]
    settings = ["--precision", "32-true", "--train.max_steps", 1, "--train.global_batch_size", 2]
    return main(["finetune_lora", *map(str, [*folders, *settings]), *QUERY_VALUE, *flags])


def test_flags_reach_the_adapter_and_hyperparameters_repeat_the_run(tiny, data_dir, tmp_path):
    patterns = ["--lora_rank_pattern", r"{v_proj: 2, layers\.1\.mlp.*: 3}", "--lora_alpha_pattern", "{v_proj: 5}"]
    chosen = ["--lora_layers", "0-1", "--lora_targets", "q_proj, v_proj,up_proj", "--lora_r", "6"]
    assert finetune(tiny, data_dir, tmp_path / "one", *patterns, *chosen) == 0
    config = json.loads((tmp_path / "one/final/adapter_config.json").read_text())
    assert config["rank_pattern"] == {"v_proj": 2, r"layers\.1\.mlp.*": 3}
    assert config["alpha_pattern"] == {"v_proj": 5}
    assert config["layers_to_transform"] == [0, 1]
    assert config["target_modules"] == ["q_proj", "v_proj", "up_proj"]
    tensors = load_file(tmp_path / "one/final/adapter_model.safetensors")
    ranks = {name.removeprefix("base_model.model.model.").removesuffix(".lora_A.weight"): len(tensor)
             for name, tensor in tensors.items() if name.endswith("lora_A.weight")}  # fmt: skip
    attention = {
        f"layers.{n}.self_attn.{layer}": rank for n in (0, 1) for layer, rank in (("q_proj", 6), ("v_proj", 2))
    }
    assert ranks == attention | {"layers.0.mlp.up_proj": 6, "layers.1.mlp.up_proj": 3}
    expected = "LoRA of rank 6 and alpha 16 on q_proj, v_proj, up_proj, ranks 2 for v_proj, 3 for layers\\.1\\.mlp.*"
    assert json.loads((tmp_path / "one/final/report.json").read_text())["adapter"].startswith(expected)
    assert (
        f"| adapter | {expected}, alphas 5 for v_proj, blocks 0, 1 only |"
        in (tmp_path / "one/final/README.md").read_text()
    )
    again = [str(tmp_path / "one/hyperparameters.yaml"), "--out_dir", str(tmp_path / "two")]
    assert main(["finetune_lora", "--config", *again]) == 0
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        assert (tmp_path / "one/final" / name).read_bytes() == (tmp_path / "two/final" / name).read_bytes()


@pytest.mark.parametrize(
    ("setting", "adapted"),
    [
        ({"lora_layers": 1}, {"layers.1.self_attn.q_proj", "layers.1.self_attn.v_proj"}),
        ({"lora_layers": [1, 0], "lora_query": False}, {"layers.0.self_attn.v_proj", "layers.1.self_attn.v_proj"}),
        ({"lora_targets": ["layers.1.mlp.up_proj"], "lora_mlp": True}, {"layers.1.mlp.up_proj"}),
        ({"lora_targets": r".*\.0\.self_attn\.[kv]_proj"}, {"layers.0.self_attn.k_proj", "layers.0.self_attn.v_proj"}),
        ({"lora_targets": "all-linear", "lora_layers": "1"}, {
            *(f"layers.1.self_attn.{name}_proj" for name in "qkvo"),
            *(f"layers.1.mlp.{name}_proj" for name in ("gate", "up", "down")),
        }),
    ],
    ids=["one", "list", "whole_name", "expression", "all_linear"],
)  # fmt: skip
def test_a_config_file_chooses_layers(setting, adapted, tiny, data_dir, tmp_path):
    (tmp_path / "choice.yaml").write_text(yaml.safe_dump(setting))
    assert finetune(tiny, data_dir, tmp_path / "out", "--config", str(tmp_path / "choice.yaml")) == 0
    tensors = load_file(tmp_path / "out/final/adapter_model.safetensors")
    assert {name.removeprefix("base_model.model.model.").rpartition(".lora_")[0] for name in tensors} == adapted


@pytest.mark.parametrize("family", FAMILIES, ids=lambda family: family.name)
def test_the_default_switches_are_all_linear_layers_but_the_head(family):
    config = GPTConfig.from_hub(family.config().to_dict())
    default, all_linear = (
        new_adapter(FinetuneLoraArgs(Path(), Path(), lora_r=2, lora_targets=targets), config).target_modules
        for targets in (None, "all-linear")
    )
    assert set(default) == set(all_linear)


NOTE = "the whole of qkv_proj, which computes queries, keys and values"


def test_switch_on_a_part_of_a_fused_layer_is_reported(tokenizer_files, data_dir, tmp_path, capsys):
    base = tmp_path / "base"
    next(case for case in MATRIX if case.model_type == "phi3").write(base, tokenizer_files)
    assert finetune(base, data_dir, tmp_path / "part") == 0
    assert f"--lora_query and --lora_value adapt {NOTE}\n" in capsys.readouterr().err
    assert finetune(base, data_dir, tmp_path / "all", "--lora_key", "true") == 0
    assert finetune(base, data_dir, tmp_path / "named", "--lora_targets", "qkv_proj", "--lora_layers", "1") == 0
    assert NOTE not in capsys.readouterr().err
    tensors = load_file(tmp_path / "named/final/adapter_model.safetensors")
    assert {name.rpartition(".lora_")[0] for name in tensors} == {"base_model.model.model.layers.1.self_attn.qkv_proj"}


@pytest.mark.parametrize(
    ("flags", "sentence"),
    [
        (["--lora_rank_pattern", "{gate_proj: 4}"],
         "--lora_rank_pattern: gate_proj applies to no adapted layer: adapted are q_proj, v_proj, and the first"),
        (["--lora_alpha_pattern", "{_proj: 4}"], "--lora_alpha_pattern: _proj applies to no adapted layer"),
        (["--lora_rank_pattern", "{.*v_proj: 4, v_proj: 2}"], "--lora_rank_pattern: v_proj applies to no adapted"),
        (["--lora_rank_pattern", "{v_proj: 0}"], "--lora_rank_pattern, v_proj (0) must be at least 1"),
        (["--lora_rank_pattern", "{v_proj: 33}"],
         "--lora_rank_pattern, v_proj (33) must be at most the checkpoint's hidden_size (32)"),
        (["--lora_rank_pattern", "{'(': 4}"], "--lora_rank_pattern (() must be a mapping whose keys are layer names"),
        (["--lora_layers", "1-2"], "--lora_layers: there is no block 2, only the blocks 0-1"),
        (["--lora_layers", "1-0"], "--lora_layers (1-0) must be blocks, such as 8-15 or 0,2,5"),
        (["--lora_layers", "first"], "--lora_layers (first) must be blocks"),
        (["--lora_targets", "q_proj,qkv"], "--lora_targets: qkv names no linear layer; there are q_proj, k_proj, v_"),
        (["--lora_targets", "q_proj|v_proj"],
         "--lora_targets: the expression q_proj|v_proj matches no linear layer: it must match whole names"),
        (["--lora_targets", "all_linear"], "--lora_targets (all_linear) names no layer: did you mean all-linear?"),
        (["--lora_targets", "["], "--lora_targets ([) must be layer names, such as q_proj,down_proj, or a regular"),
        (["--lora_targets", ".*q_proj", "--lora_layers", "0"],
         "--lora_layers does not go with the regular expression in --lora_targets: choose the blocks in it"),
    ],
    ids=lambda value: " ".join(value[:2]) if isinstance(value, list) else "",
)  # fmt: skip
def test_what_chooses_no_layer_is_refused_by_name(flags, sentence, tiny, data_dir, tmp_path, capsys):
    assert finetune(tiny, data_dir, tmp_path / "out", *flags) == 1
    assert f"litlora: {sentence}" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
