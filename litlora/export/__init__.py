"""What others read of an adapter: GGUF files, model card, server limits, and the receipt that verifies a copy.

Trains nothing.
"""
