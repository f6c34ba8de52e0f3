"""Generate completions for a data set with a checkpoint or an adapter, and count those that match exactly."""

import argparse
from collections.abc import Iterator
from pathlib import Path

import torch

from litlora.args.inference import GenerateArgs
from litlora.data.dataset import read_examples
from litlora.data.examples import Turn
from litlora.data.tokenizer import Tokenizer
from litlora.generation.sampler import Sampler
from litlora.generation.session import generate
from litlora.lora.checkpoint import load_with_adapters
from litlora.lora.selection import find_folders
from litlora.models.checkpoint import Checkpoint

STYLE = "alpaca"  # for the base and the adapter, so that only the weights differ
MAX_NEW_TOKENS = 16  # twice the longest reference


def completions(directory: Path, turns: list[Turn]) -> Iterator[str]:
    """Yield the greedy completion for each turn, with … if it does not end."""
    base_dir, adapters = find_folders(GenerateArgs(directory))
    model = load_with_adapters(Checkpoint.open(base_dir), adapters, torch.float32, torch.device("cpu"))
    tokenizer = Tokenizer(directory)
    style = tokenizer.prompt_style(STYLE)
    for turn in turns:
        prompt = tokenizer.encode_prompt(style, style.prompt(turn.instruction, turn.input))
        tokens = list(generate(model, prompt, Sampler(), max_new_tokens=MAX_NEW_TOKENS, stop_ids=tokenizer.stop_ids))
        unfinished = "…" if len(tokens) == MAX_NEW_TOKENS else ""
        yield tokenizer.decode(tokens).strip() + unfinished


def show(turn: Turn, completion: str) -> None:
    prompt = " ".join(filter(None, (turn.instruction, turn.input)))
    print(f"  {prompt}\n    expected: {turn.output}\n    answered: {completion}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("directory", type=Path, help="checkpoint or adapter folder")
    parser.add_argument("--data", type=Path, default=Path("data/pico/val.jsonl"), help="rows as JSONL")
    parser.add_argument("--show", type=int, default=5, help="number of completions to print")
    args = parser.parse_args()
    turns = [example.turns[0] for example in read_examples(args.data)]
    matches = 0
    for number, (turn, completion) in enumerate(zip(turns, completions(args.directory, turns), strict=True)):
        matches += completion == turn.output
        if number < args.show:
            show(turn, completion)
    print(f"exact match: {matches} of {len(turns)} = {matches / len(turns):.1%}")


if __name__ == "__main__":
    main()
