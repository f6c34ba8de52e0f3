"""What a command can refuse before torch is imported, which takes seconds. The command itself checks the rest."""

from pathlib import Path

from litlora.args import CommandArgs, FinetuneLoraArgs, GenerateArgs, MergeLoraArgs, PrepareArgs
from litlora.data.dataset import read_example, read_examples
from litlora.data.token_cache import FOLDER
from litlora.data.tokenizer import check_prompt_style
from litlora.lora.adapter_config import read_settings
from litlora.lora.adapter_folder import find_base, read_prompt_style
from litlora.models.checkpoint_files import read_config, weight_files
from litlora.models.config import GPTConfig
from litlora.train.resume import AUTO, Identity, starting_point
from litlora.utils.files import check_absent, check_writable

QUICK = 20_000_000  # bytes of rows that are read in less than a second


def check_early(args: CommandArgs) -> None:
    """Refuse what the files named by the arguments show at a glance."""
    match args:
        case FinetuneLoraArgs():
            _check_training(args)
        case GenerateArgs():
            base_dir, adapter_dir = find_base(args.checkpoint_dir, args.base_dir)
            if adapter_dir is not None:
                read_settings(adapter_dir)
            _check_base(base_dir, args.prompt_style or read_prompt_style(args.checkpoint_dir) or "none")
        case MergeLoraArgs():
            read_settings(args.checkpoint_dir)
            base_dir, _ = find_base(args.checkpoint_dir, args.base_dir)
            check_absent(args.out_dir, "--out_dir")
            _check_base(base_dir, "none")
        case PrepareArgs():
            check_writable(args.destination_path, "--destination_path")


def check_rows(args: CommandArgs) -> None:
    """Refuse a bad row of a data set, unless it is large or has been read by an earlier run."""
    if not isinstance(args, FinetuneLoraArgs) or (args.data_dir / FOLDER).exists():
        return
    for path in (args.data_dir / "train.jsonl", args.data_dir / "val.jsonl"):
        if path.stat().st_size <= QUICK:
            read_examples(path)


def _check_training(args: FinetuneLoraArgs) -> None:
    check_writable(args.out_dir, "--out_dir")
    # The run itself reports which checkpoint it takes, and with "auto" whether it is finished.
    start = None if args.resume == AUTO else starting_point(args, report=lambda _: None)
    config = _check_base(args.checkpoint_dir, args.prompt_style)
    args.train.sequence_limit(config.max_position_embeddings)
    if start is not None:
        Identity.of(args, {}).check(start)
    read_example(args.data_dir / "train.jsonl", 0, "--data_dir")
    read_example(args.data_dir / "val.jsonl", args.eval.evaluate_example, "--eval.evaluate_example")


def _check_base(checkpoint_dir: Path, prompt_style: str) -> GPTConfig:
    _, config = read_config(checkpoint_dir)
    weight_files(checkpoint_dir)
    check_prompt_style(checkpoint_dir, prompt_style)
    return config
