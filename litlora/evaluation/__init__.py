"""Measuring a model: validation loss, sample completions, and metrics of rows. Nothing here trains or writes files."""
