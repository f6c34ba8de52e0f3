"""Ask a checkpoint or an adapter the questions of a data set, and count the answers that are exactly right."""

import argparse
from collections.abc import Iterator
from pathlib import Path

import torch

from litlora.data.examples import Turn, read_examples
from litlora.data.tokenizer import Tokenizer
from litlora.generation.sampler import Sampler
from litlora.generation.session import generate
from litlora.lora.adapter_folder import find_base
from litlora.lora.checkpoint import load_with_adapter
from litlora.models.checkpoint import Checkpoint

STYLE = "alpaca"  # before and after fine-tuning, so that only the weights differ
MAX_NEW_TOKENS = 16  # twice the longest answer


def answers(directory: Path, turns: list[Turn]) -> Iterator[str]:
    """Yield the likeliest answer of a checkpoint, or of an adapter on its base, to each turn; … where it never ends."""
    base_dir, adapter = find_base(directory, None)
    model = load_with_adapter(Checkpoint.open(base_dir), adapter, torch.float32, torch.device("cpu"))
    tokenizer = Tokenizer(directory)
    style = tokenizer.prompt_style(STYLE)
    for turn in turns:
        prompt = tokenizer.encode(style.prompt(turn.instruction, turn.input), style.add_special_tokens).ids
        tokens = list(generate(model, prompt, Sampler(), max_new_tokens=MAX_NEW_TOKENS, stop_ids=tokenizer.stop_ids))
        unfinished = "…" if len(tokens) == MAX_NEW_TOKENS else ""
        yield tokenizer.decode(tokens).strip() + unfinished


def show(turn: Turn, answer: str) -> None:
    question = " ".join(filter(None, (turn.instruction, turn.input)))
    print(f"  {question}\n    expected: {turn.output}\n    answered: {answer}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("directory", type=Path, help="folder of a checkpoint or of an adapter")
    parser.add_argument("--data", type=Path, default=Path("data/pico/val.jsonl"), help="questions, as JSONL")
    parser.add_argument("--show", type=int, default=5, help="how many of the questions to show")
    args = parser.parse_args()
    turns = [example.turns[0] for example in read_examples(args.data)]
    right = 0
    for number, (turn, answer) in enumerate(zip(turns, answers(args.directory, turns), strict=True)):
        right += answer == turn.output
        if number < args.show:
            show(turn, answer)
    print(f"exact match: {right} of {len(turns)} = {right / len(turns):.1%}")


if __name__ == "__main__":
    main()
