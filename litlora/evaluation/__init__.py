"""Measuring a model: validation loss and sample completions. Nothing here trains or writes files."""
