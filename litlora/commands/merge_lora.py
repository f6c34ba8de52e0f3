"""merge_lora: an adapter and its base in, a checkpoint out."""

from litlora.args import MergeLoraArgs
from litlora.commands.early_checks import check_merge
from litlora.lora.merge import merge_adapter
from litlora.models.checkpoint import Checkpoint
from litlora.models.checkpoint_files import CheckpointFiles
from litlora.utils.console import log


def merge_lora(args: MergeLoraArgs, base: CheckpointFiles | None = None) -> None:
    """Merge an adapter into its base and write the result as a checkpoint; `base` is what was read of the base."""
    base = base or check_merge(args)
    merge_adapter(args.checkpoint_dir, Checkpoint.open(base), args.out_dir, dequantized=args.dequantized_base)
    log(f"merged checkpoint in {args.out_dir}")
