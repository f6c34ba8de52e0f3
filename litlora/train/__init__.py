"""Fine-tuning: building a run from its arguments, the training loop, its state on disk, and its memory."""
