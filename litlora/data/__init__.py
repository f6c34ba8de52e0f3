"""From rows of a file to packed micro-batches: data sets, their checks, tokens, the token cache, batching.

Nothing here knows a model.
"""
