"""merge_lora: adapters and their base in, a checkpoint out."""

from dataclasses import replace

import torch

from litlora.args.inference import MergeLoraArgs
from litlora.commands.early_checks import check_merge
from litlora.export.receipt import RECEIPT, Receipt
from litlora.export.verdict import log_verdict
from litlora.export.verification import passes_receipt_on, verify_folder
from litlora.lora.merge import merge_adapters
from litlora.lora.selection import Adapters
from litlora.models.checkpoint import EMBEDDING, Checkpoint
from litlora.models.checkpoint_files import CheckpointFiles
from litlora.utils.console import log


def merge_lora(args: MergeLoraArgs, base: CheckpointFiles | None = None, adapters: Adapters = ()) -> None:
    """Merge adapters into their base and write the result as a checkpoint; base and adapters if they have been read."""
    if base is None:
        base, adapters = check_merge(args)
    checkpoint = Checkpoint.open(base)
    receipts = _receipts(adapters, checkpoint, dequantized=args.dequantized_base)
    changes = merge_adapters(adapters, checkpoint, args.out_dir, dequantized=args.dequantized_base, others=receipts)
    log(f"merged checkpoint in {args.out_dir}")
    if checkpoint.tensor(EMBEDDING).dtype is not torch.float32:
        log(str(changes))
    if receipts and args.verify:
        log_verdict(verify_folder(args.out_dir), args.out_dir)


def _receipts(adapters: Adapters, base: Checkpoint, *, dequantized: bool) -> dict[str, bytes]:
    """Return the receipt of what is merged, if there is one, by its name."""
    as_trained = dequantized or base.weights.is_quantized  # a GGUF file is the base of the training as it is
    if not passes_receipt_on(adapters, as_trained):
        return {}
    receipt = Receipt.read(adapters[0].folder)
    if base.merged_dtype is not None:
        receipt = replace(receipt, stored_dtype=str(base.merged_dtype).removeprefix("torch."))
    return {RECEIPT: receipt.content()}
