"""finetune_lora: a checkpoint and prepared data in, an adapter out."""

import sys

from litlora.args import FinetuneLoraArgs
from litlora.train.setup import finetune, forecast


def finetune_lora(args: FinetuneLoraArgs) -> None:
    """Fine-tune a checkpoint with LoRA, or print what that would take (--dry_run)."""
    if args.dry_run:
        sys.stdout.write(forecast(args))
    else:
        finetune(args)
