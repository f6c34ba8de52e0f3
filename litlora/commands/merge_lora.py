"""merge_lora: an adapter and its base in, a checkpoint out."""

from litlora.args import MergeLoraArgs
from litlora.lora.adapter_folder import find_base, require_adapter
from litlora.lora.merge import merge_adapter
from litlora.models.checkpoint import Checkpoint
from litlora.utils.console import log
from litlora.utils.files import check_absent


def merge_lora(args: MergeLoraArgs) -> None:
    """Merge an adapter into its base and write the result as a checkpoint."""
    require_adapter(args.checkpoint_dir)
    base_dir, _ = find_base(args.checkpoint_dir, args.base_dir)
    check_absent(args.out_dir, "--out_dir")
    merge_adapter(args.checkpoint_dir, Checkpoint.open(base_dir), args.out_dir, dequantized=args.dequantized_base)
    log(f"merged checkpoint in {args.out_dir}")
