"""Sampling tokens from a model with a KV cache."""
