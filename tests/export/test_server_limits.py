import json
import shutil
from pathlib import Path

import pytest
from helpers.copies import edit_json
from peft import LoraConfig

from litlora.__main__ import main
from litlora.args.common import Server
from litlora.export.server_limits import VLLM_RANKS, limits_of

LLAMA, TIED = {"model_type": "llama"}, {"model_type": "llama", "tie_word_embeddings": True}
SERVERS: tuple[Server, ...] = ("vllm", "llama.cpp", "peft", "ollama")


def adapter(**settings: object) -> dict[str, object]:
    """Return an adapter_config.json as PEFT writes it."""
    config = LoraConfig(task_type="CAUSAL_LM", **{"r": 8, "target_modules": ["q_proj"], **settings}).to_dict()
    return json.loads(json.dumps(config, default=sorted))


def found(config: dict[str, object], model: dict[str, object] = LLAMA) -> dict[str, str]:
    """Return the weight of the first limit of each server that has one."""
    return {limit.target: limit.weight for limit in reversed(limits_of(config, model, SERVERS))}


def test_a_plain_adapter_has_no_limit():
    assert found(adapter()) == {}


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({"use_dora": True}, {"vllm": "fault", "llama.cpp": "fault", "ollama": "fault"}),
        ({"modules_to_save": ["lm_head"]}, {"vllm": "fault", "llama.cpp": "fault", "ollama": "fault"}),
        ({"bias": "all"}, {"vllm": "fault", "llama.cpp": "fault", "ollama": "fault"}),
        ({"rank_pattern": {"q_proj": 4}}, {"vllm": "fault"}),
        ({"alpha_pattern": {"q_proj": 4}}, {"vllm": "fault", "llama.cpp": "fault", "ollama": "fault"}),
        ({"use_rslora": True}, {"llama.cpp": "note", "ollama": "note"}),
        ({"r": 24}, {"vllm": "note"}),
        ({"r": 513}, {"vllm": "fault"}),
        ({"target_modules": ["lm_head"]}, {"vllm": "note", "ollama": "fault"}),
        ({"target_modules": ".*head"}, {"vllm": "note", "ollama": "fault"}),
        ({"target_modules": "all-linear"}, {}),
        ({"target_modules": ["lm_head", "q_proj"], "exclude_modules": ["lm_head"]}, {}),
    ],
    ids=str,
)
def test_settings_and_the_servers_that_they_concern(settings, expected):
    assert found(adapter(**settings)) == expected


def test_a_tied_head_is_adapted_by_no_server():
    expected = {"vllm": "fault", "llama.cpp": "fault", "ollama": "fault", "peft": "note"}
    assert found(adapter(target_modules=["lm_head"]), TIED) == expected


def test_ollama_applies_adapters_to_few_model_types():
    assert found(adapter(), {"model_type": "qwen3"}) == {"ollama": "fault"}
    assert found(adapter(), {"model_type": "gemma2"}) == {}


def test_ollama_reads_whole_alphas():
    assert found(adapter() | {"lora_alpha": 22.6}) == {"ollama": "note"}


@pytest.mark.parametrize(("rank", "need"), [(17, 32), (200, 256), (300, 320)])
def test_vllm_is_started_with_one_of_its_ranks(rank, need):
    (limit,) = limits_of(adapter(r=rank), LLAMA, ["vllm"])
    assert need in VLLM_RANKS
    assert limit.fix.endswith(f"--max-lora-rank {need}")


def test_only_the_servers_that_are_named_count():
    assert limits_of(adapter(use_dora=True), LLAMA, ["peft"]) == []


def run(tiny, data_dir, out_dir, *flags: str) -> int:
    folders = ["--checkpoint_dir", tiny, "--data_dir", data_dir, "--out_dir", out_dir]
    return main(["finetune_lora", *map(str, folders), "--dry_run", "true", *flags])


def test_deploy_refuses_before_training(tiny, data_dir, tmp_path, capsys):
    assert run(tiny, data_dir, tmp_path / "out", "--deploy", "peft,vllm", "--lora_use_dora", "true") == 1
    assert "--deploy (peft,vllm): vllm does not load DoRA adapters" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_deploy_refuses_without_torch(tiny, data_dir, tmp_path, litlora):
    folders = ["--checkpoint_dir", tiny, "--data_dir", data_dir, "--out_dir", tmp_path / "out"]
    result = litlora("finetune_lora", *folders, "--deploy", "vllm", "--lora_alpha_pattern", "{q_proj: 4}")
    assert result.returncode == 1
    assert "vllm ignores alpha_pattern" in result.stderr


def test_deploy_refuses_a_network_that_llama_cpp_does_not_compute(tiny, data_dir, tmp_path, capsys):
    base = Path(shutil.copytree(tiny, tmp_path / "base"))
    yarn = {"rope_type": "yarn", "factor": 2.0, "original_max_position_embeddings": 64, "truncate": False}
    edit_json(base / "config.json", rope_parameters=yarn)
    assert run(base, data_dir, tmp_path / "out", "--deploy", "vllm") == 0
    assert run(base, data_dir, tmp_path / "out", "--deploy", "vllm,llama.cpp") == 1
    reason = "llama.cpp's llama does not implement yarn without truncation"
    sentence = f"--deploy (vllm,llama.cpp): llama.cpp does not compute this network ({reason}): serve it with vLLM; or"
    assert sentence in capsys.readouterr().err


def test_deploy_prints_what_must_be_set(tiny, data_dir, tmp_path, capsys):
    assert run(tiny, data_dir, tmp_path / "out", "--deploy", "vllm", "--lora_init", "pissa", "--lora_r", "9") == 0
    assert "this adapter has 18: start it with --max-lora-rank 32" in capsys.readouterr().err


def test_an_unknown_server_is_refused(tiny, data_dir, tmp_path, capsys):
    assert run(tiny, data_dir, tmp_path / "out", "--deploy", "vlm") == 2
    assert "--deploy" in capsys.readouterr().err


def test_a_finished_adapter_is_checked(adapter, tmp_path, capsys):
    command = ["export", str(adapter), "--check", "true"]
    assert main(command) == 0
    assert capsys.readouterr().out == "vllm, llama.cpp, peft, ollama: no limits\n"
    folder = Path(shutil.copytree(adapter, tmp_path / "final"))
    config = json.loads((folder / "adapter_config.json").read_text(encoding="utf-8"))
    (folder / "adapter_config.json").write_text(json.dumps(config | {"alpha_pattern": {"q_proj": 4}}), encoding="utf-8")
    assert main(["export", str(folder), "--check", "true"]) == 0
    assert "fault: vllm ignores alpha_pattern: merge" in capsys.readouterr().out
    assert main(["export", str(folder), "--check", "true", "--deploy", "peft"]) == 0
    assert main(["export", str(folder), "--check", "true", "--deploy", "vllm"]) == 1
    assert "--deploy (vllm): vllm ignores alpha_pattern" in capsys.readouterr().err


def test_export_without_a_folder_or_an_adapter_is_refused(adapter, tiny, capsys):
    for flags, sentence in (
        ([adapter], "missing --out_dir"),
        ([tiny, "--check", "true"], "--check needs an adapter"),
        ([adapter, "--out_dir", "out", "--deploy", "vllm"], "--deploy (vllm) is for --check true"),
    ):
        assert main(["export", *map(str, flags)]) in (1, 2)
        assert sentence in capsys.readouterr().err.splitlines()[-1]
