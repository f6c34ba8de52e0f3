"""Adapters: configuration, the LoRA layer, initializations, merging, and PEFT's files."""
