"""Time the greedy completion of many prompts: litlora together and one by one, and transformers' batched generate.

The prompts are the instructions without input of an Alpaca file, taken as they are. CPU seconds are shown as well:
those of one thread hardly depend on what else a machine does.
"""

import argparse
import json
import time
from collections.abc import Callable
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import litlora


def read_prompts(source: Path, count: int) -> list[str]:
    """Return the first instructions that have no input."""
    rows = json.loads(source.read_text(encoding="utf-8"))
    return [row["instruction"] for row in rows if not row.get("input")][:count]


def with_litlora(checkpoint: Path, new_tokens: int, *, together: bool) -> Callable[[list[str]], list[str]]:
    """Return a function that completes prompts by litlora.LLM."""
    llm = litlora.LLM.load(checkpoint, precision="32-true", prompt_style="none")

    def complete(prompts: list[str]) -> list[str]:
        settings = {"max_new_tokens": new_tokens, "temperature": 0}
        if together:
            return llm.generate(prompts, batch_size=len(prompts), **settings)
        return [llm.generate(prompt, **settings) for prompt in prompts]

    return complete


def with_transformers(checkpoint: Path, new_tokens: int) -> Callable[[list[str]], list[str]]:
    """Return a function that completes prompts by transformers, padded on the left."""
    tokenizer = AutoTokenizer.from_pretrained(checkpoint, padding_side="left")
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    model = AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.float32).eval()

    def complete(prompts: list[str]) -> list[str]:
        inputs = tokenizer(prompts, return_tensors="pt", padding=True)
        ids = model.generate(**inputs, max_new_tokens=new_tokens, do_sample=False, pad_token_id=tokenizer.pad_token_id)
        return tokenizer.batch_decode(ids[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)

    return complete


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("source", type=Path, help="a JSON list of Alpaca rows")
    parser.add_argument("--count", type=int, default=64)
    parser.add_argument("--new_tokens", type=int, default=64)
    parser.add_argument("--threads", type=int, default=1)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    prompts = read_prompts(args.source, args.count)
    programs = {
        "litlora, together": with_litlora(args.checkpoint, args.new_tokens, together=True),
        "transformers, together": with_transformers(args.checkpoint, args.new_tokens),
        "litlora, one by one": with_litlora(args.checkpoint, args.new_tokens, together=False),
    }
    first: list[str] = []
    for name, complete in programs.items():
        elapsed, cpu = time.perf_counter(), time.process_time()
        completions = complete(prompts)
        elapsed, cpu = time.perf_counter() - elapsed, time.process_time() - cpu
        first = first or completions
        same = sum(one == other for one, other in zip(first, completions, strict=True))
        print(
            f"{name}: {cpu:.1f} s CPU, {elapsed:.1f} s elapsed, {same} completions equal the first program's",
            flush=True,
        )


if __name__ == "__main__":
    main()
