"""finetune_lora: a checkpoint and prepared data in, an adapter out."""

from litlora.args.finetune import FinetuneLoraArgs
from litlora.models.checkpoint_files import CheckpointFiles
from litlora.train.setup import finetune, forecast
from litlora.utils.console import write


def finetune_lora(args: FinetuneLoraArgs, base: CheckpointFiles | None = None) -> None:
    """Fine-tune a checkpoint with LoRA, or print what that would take (--dry_run); `base` is what was read of it."""
    if args.dry_run:
        write(forecast(args, base))
    else:
        finetune(args, base)
