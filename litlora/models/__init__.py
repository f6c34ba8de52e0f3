"""Base models: config.json, the transformer, its KV cache, and reading checkpoints.

Adapters live in `lora`, text and token ids in `data`.
"""
