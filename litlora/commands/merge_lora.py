"""merge_lora: an adapter and its base in, a checkpoint out."""

from litlora.args import MergeLoraArgs
from litlora.lora.merge import merge_adapter


def merge_lora(args: MergeLoraArgs) -> None:
    """Merge an adapter into its base and write the result as a checkpoint."""
    merge_adapter(args)
