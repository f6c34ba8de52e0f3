"""merge_lora: adapters and their base in, a checkpoint out."""

from litlora.args.inference import MergeLoraArgs
from litlora.commands.early_checks import check_merge
from litlora.lora.merge import merge_adapters
from litlora.lora.selection import Adapters
from litlora.models.checkpoint import Checkpoint
from litlora.models.checkpoint_files import CheckpointFiles
from litlora.utils.console import log


def merge_lora(args: MergeLoraArgs, base: CheckpointFiles | None = None, adapters: Adapters = ()) -> None:
    """Merge adapters into their base and write the result as a checkpoint; base and adapters if they have been read."""
    if base is None:
        base, adapters = check_merge(args)
    merge_adapters(adapters, Checkpoint.open(base), args.out_dir, dequantized=args.dequantized_base)
    log(f"merged checkpoint in {args.out_dir}")
