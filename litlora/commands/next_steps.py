"""The commands that a user runs next, printed where a command has succeeded."""

import shlex
from pathlib import Path

from litlora.args.common import CommandArgs
from litlora.args.data import PrepareArgs
from litlora.args.finetune import FinetuneLoraArgs
from litlora.args.hub import DownloadArgs
from litlora.args.inference import MergeLoraArgs
from litlora.lora.adapter_folder import FINAL

DATA_DIR = Path("data/alpaca")
PROMPT = ("--prompt", "Name three primary colors.")


def next_steps(args: CommandArgs) -> list[str]:
    """Return the command lines that make use of what a command has left."""
    return [shlex.join(["litlora", *map(str, words)]) for words in _next_steps(args)]


def _next_steps(args: CommandArgs) -> list[tuple[object, ...]]:
    match args:
        case DownloadArgs(tokenizer_only=False):
            prepared = (DATA_DIR / "train.jsonl").is_file()
            train = ("finetune_lora", args.checkpoint_root / args.repo_id, "--data_dir", DATA_DIR)
            return [train] if prepared else [("prepare_alpaca",), train]
        case PrepareArgs():
            return [("finetune_lora", "CHECKPOINT", "--data_dir", args.destination_path)]
        case FinetuneLoraArgs(dry_run=False):
            final = args.out_dir / FINAL
            return [("generate", final, *PROMPT), ("merge_lora", final, "--out_dir", args.out_dir / "merged")]
        case MergeLoraArgs():
            return [("generate", args.out_dir, *PROMPT)]
        case _:
            return []
