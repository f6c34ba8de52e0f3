"""From rows of a file to packed micro-batches: readers, prompt styles, tokenizers, the token cache, batching.

Nothing here knows a model.
"""
