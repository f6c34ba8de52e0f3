import json
from dataclasses import replace
from pathlib import Path

import make_random_checkpoint
import pytest
import torch
from transformers import AutoModelForCausalLM

from litlora.data.tokenizer import Tokenizer
from litlora.models.checkpoint import Checkpoint
from litlora.models.config import GPTConfig

SIZES = {"vocab_size": 500, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "head_dim": 16}
HEADS = {"num_attention_heads": 4, "num_key_value_heads": 4}
TINY = GPTConfig.from_hub({"model_type": "llama", "rms_norm_eps": 1e-5} | SIZES | HEADS)


@pytest.fixture
def made(tmp_path, pico) -> Path:
    make_random_checkpoint.make(tmp_path / "made", TINY, pico)
    return tmp_path / "made"


def test_checkpoint_has_the_requested_shape(made):
    assert Checkpoint.open(made).config == TINY
    assert len(list(made.glob("*.safetensors"))) == TINY.num_hidden_layers + 3
    index = json.loads((made / "model.safetensors.index.json").read_text(encoding="utf-8"))
    model = Checkpoint.open(made).load(torch.bfloat16, torch.device("cpu"))
    assert index["metadata"]["total_size"] == sum(weight.nbytes for weight in model.parameters())
    for name, weight in model.named_parameters():
        assert weight.detach().float().std() == pytest.approx(0.0 if "norm" in name else 0.02, rel=0.1)


def test_transformers_loads_every_tensor(made):
    ours = Checkpoint.open(made).load(torch.bfloat16, torch.device("cpu"))
    theirs, report = AutoModelForCausalLM.from_pretrained(made, output_loading_info=True)
    assert not any(report.values())
    assert all(torch.equal(weight, ours.get_parameter(name)) for name, weight in theirs.named_parameters())


def test_checkpoint_is_reproducible(made, tmp_path, pico):
    make_random_checkpoint.make(tmp_path / "again", TINY, pico)
    for path in made.iterdir():
        assert (tmp_path / "again" / path.name).read_bytes() == path.read_bytes()


def test_greedy_decoding_chooses_tokens_with_text(tmp_path, pico):
    make_random_checkpoint.make(tmp_path / "made", replace(TINY, vocab_size=600), pico)
    model = Checkpoint.open(tmp_path / "made").load(torch.bfloat16, torch.device("cpu"))
    tokenizer = Tokenizer(pico)
    silent = [*tokenizer.stop_ids, *range(tokenizer.vocab_size, 600)]
    assert not model.lm_head.weight[silent].any()
    assert model.lm_head.weight[: tokenizer.vocab_size].any(1).sum() == tokenizer.vocab_size - len(tokenizer.stop_ids)
