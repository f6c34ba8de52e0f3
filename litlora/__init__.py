"""litlora: fine-tune language models with LoRA, from Hub checkpoints to PEFT adapters."""

__version__ = "0.1.0"
