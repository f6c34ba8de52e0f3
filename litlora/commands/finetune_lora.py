"""finetune_lora: a checkpoint and prepared data in, an adapter out."""

from litlora.args import FinetuneLoraArgs
from litlora.train.setup import finetune


def finetune_lora(args: FinetuneLoraArgs) -> None:
    """Fine-tune a checkpoint with LoRA."""
    finetune(args)
